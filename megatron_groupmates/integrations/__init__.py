"""Group-MATES inside a checkout of Megatron-DeepSpeed or Megatron-LM: arguments, data, step boundaries, entry modules."""
