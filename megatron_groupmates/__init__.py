"""Group-level, model-aware data selection for DeepSpeed/Megatron pretraining (Group-MATES, arXiv 2502.14709)."""

__version__ = "0.1.0"
