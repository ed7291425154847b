"""Instruments: what is measured inside a model, written against LM alone."""
