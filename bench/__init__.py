"""Measurements side by side; results go to ``build/bench``."""
