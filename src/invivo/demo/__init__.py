"""A show of the whole: a real model under a mixed load of real prompts, measured."""
