"""Commands: ``python -m megatron_groupmates <command>``."""
