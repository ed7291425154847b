"""Growing a model: so far the forward pass that its parameters train through."""
