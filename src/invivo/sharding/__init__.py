"""How tensors, weights and bypasses lie over several devices; used by the engine and training."""
