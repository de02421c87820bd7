"""Features: from events to user days, from user days to the table that models read, and the labels beside it."""
