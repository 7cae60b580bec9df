"""The megatron-core GPT, its losses and its sizes."""
