"""Labels by asking: the users whose label would help most, and the labels that people give."""
