"""The trainer: DeepSpeed engine, data in generation-log order, adoption of new generations at step boundaries."""
