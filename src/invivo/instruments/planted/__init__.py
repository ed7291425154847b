"""Models in which the right answer is known by construction.

Each file has one function ``build(seed=, sizes=, ...) -> PlantedModel``: an ordinary checkpoint of
the Llama family, prompts with counterfactuals, and a ``Truth`` (``truth.py``). The construction is
in ``blueprint.py``.
"""
