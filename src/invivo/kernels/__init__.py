"""Arithmetic on tensors: one file an operation, a plain reference and fast paths behind it."""
