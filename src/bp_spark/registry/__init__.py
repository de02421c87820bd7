"""Bundles, their signatures, and the MLflow store that registers them."""
