"""Judge predictions: metrics, bootstrap, promotion, drift and fairness."""
