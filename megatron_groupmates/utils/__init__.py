"""Atomic files, digests, logging and progress bars: knows nothing of models or data."""
