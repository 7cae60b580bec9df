"""Reference and evaluation sets, and what the pool shares with them."""
