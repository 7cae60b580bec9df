"""The selection server: waits for checkpoints, runs rounds, publishes generations."""
