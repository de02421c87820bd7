"""Pages for people, each one HTML file: what a backtest came to, how a night went."""
