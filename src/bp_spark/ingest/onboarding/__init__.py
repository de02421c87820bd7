"""A shop's first hour: look at its files, write a mapping with guesses and doubts, and check a mapping on a sample."""
