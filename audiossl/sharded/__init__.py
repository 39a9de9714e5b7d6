"""A run whose optimiser state, and gradients and weights if need be, are spread over its ranks (DeepSpeed ZeRO)."""
