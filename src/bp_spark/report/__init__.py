"""Pages for people, each one HTML file: the results of a backtest, and a scoring run."""
