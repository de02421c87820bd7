"""Experiments: users drawn into groups, how many of them it takes, and what came of it."""
