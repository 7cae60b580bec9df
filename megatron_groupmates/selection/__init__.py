"""Clustering, greedy group selection, token budgets and baselines: arrays in, rows out; knows nothing of models."""
