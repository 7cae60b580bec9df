"""Reading DeepSpeed's ZeRO checkpoints into any tensor-parallel layout, without running any code from them."""
