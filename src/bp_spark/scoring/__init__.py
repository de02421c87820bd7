"""Scores of all users of a date, what is made from them, and where each of them comes from."""
