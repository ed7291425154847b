"""Gated linear attention on Hopper-class GPUs; import ``ops`` only where there is one."""
