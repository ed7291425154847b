"""What was planted is found through the LM interface, exactly, and nothing on the nulls.

The engine answers in float32: its effects are within 1e-3 of the planted ones; the interpreter
in float64 is held to 1e-6.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from tests.instruments.planted.live import WAYS, answer, difference, served
from tests.instruments.planted.test_planted import BUILDERS

from invivo.errors import InvalidRequest
from invivo.instruments.attention_pattern import attention_pattern
from invivo.instruments.direct_attribution import direct_attribution
from invivo.instruments.head_patching import consistent_heads, head_patching
from invivo.instruments.planted.blueprint import Sizes
from invivo.instruments.planted.checkpoint import PlantedModel
from invivo.instruments.planted.nulls import random_weights, shuffled_truth, silenced

TOLERANCE = {"engine": 1e-3, "oracle": 1e-6}
N_CASES = 12
KEEP = {"at": "final.norm.scale", "do": "freeze"}  # the rest of the way is then linear


@pytest.fixture(scope="module")
def models() -> dict[str, PlantedModel]:
    return {name: build(0, n_cases=N_CASES) for name, build in BUILDERS.items()}


@pytest.fixture(scope="module", params=[(n, w) for n in BUILDERS for w in WAYS], ids="-".join)
def asked(request, models, tmp_path_factory) -> Iterator[tuple[PlantedModel, Any, float]]:
    name, way = request.param
    with served(models[name], tmp_path_factory.mktemp("planted"), way) as lm:
        yield models[name], lm, TOLERANCE[way]


def table(model: PlantedModel, figures: dict[tuple[int, int], float]) -> np.ndarray:
    config = model.decoder.config
    found = np.zeros((config.n_layers, config.n_heads))
    for at, value in figures.items():
        found[at] = value
    return found


def patched(lm: Any, model: PlantedModel, n: int) -> list[np.ndarray]:
    """Effects [L, H] for each of the first cases."""
    found = [
        head_patching(
            lm, list(case.tokens), list(case.counterfactual), answer=case.answer,
            other=case.other, keep_scale=True,
        )
        for case in model.cases[:n]
    ]  # fmt: skip
    assert all(one.layers == list(range(model.decoder.config.n_layers)) for one in found)
    return [one.effects for one in found]


def shares(lm: Any, model: PlantedModel, n: int) -> list[np.ndarray]:
    """Direct shares [L, H] for each of the first cases."""
    return [
        direct_attribution(lm, list(case.tokens), token=case.answer, minus=case.other).heads
        for case in model.cases[:n]
    ]


READINGS = {"patching": patched, "attribution": shares}


@pytest.mark.parametrize("reading", READINGS)
def test_every_head_has_the_planted_effect(asked, reading):
    model, lm, tolerance = asked
    expected = table(model, model.truth.of_heads(getattr(model.truth, reading)))
    for one in READINGS[reading](lm, model, 3):
        np.testing.assert_allclose(one, expected, rtol=0, atol=tolerance)


@pytest.mark.parametrize("seed", [1, 2])
@pytest.mark.parametrize("name", BUILDERS)
def test_other_seeds_and_sizes(name, seed, tmp_path):
    """Other places, another basis, more layers, more heads to a key head."""
    sizes = Sizes(n_symbols=16, n_layers=4, n_heads=6, n_kv_heads=3 if seed == 1 else 2)
    model = BUILDERS[name](seed, sizes, n_cases=1)
    with served(model, tmp_path, "engine") as lm:
        for reading, read in READINGS.items():
            expected = table(model, model.truth.of_heads(getattr(model.truth, reading)))
            np.testing.assert_allclose(
                read(lm, model, 1)[0], expected, rtol=0, atol=TOLERANCE["engine"]
            )


def test_every_edge_that_is_needed_and_none_in_other_layers(asked):
    """Blocking an edge in its layer undoes what the head does; elsewhere it changes nothing."""
    model, lm, tolerance = asked
    case = model.cases[0]
    base = difference(lm, case, [])
    for edge in model.truth.edges:
        at = {
            "do": "edge_block",
            "from": {"index": case.places[edge.key]},
            "to": {"index": case.places[edge.query]},
        }
        own = model.truth.heads[edge.role].layer
        for layer in range(model.decoder.config.n_layers):
            moved = difference(lm, case, [at | {"at": f"layers.{layer}.attn.edge"}, KEEP]) - base
            assert abs(moved) > 0.5 if layer == own else abs(moved) < tolerance


def test_routes_from_head_to_head(asked):
    """Path patching: the sender's other value reaches one input of the receiver alone."""
    model, lm, tolerance = asked
    case = model.cases[0]
    base = difference(lm, case, [])
    for route in model.truth.routes:
        sender, receiver = model.truth.heads[route.sender], model.truth.heads[route.receiver]
        reader = receiver.site("q") if route.by == "q" else receiver.kv_site(route.by)
        steps = [
            {"run": "sent", "at": "layers.*.attn.head.*.z", "do": "freeze", "to": "plain",
             "except": sender.site("z")},
            {"run": "sent", "at": sender.site("z"), "do": "replace", "from": {"run": "cf"}},
            {"at": reader, "do": "replace", "from": {"run": "sent"}},
            KEEP,
        ]  # fmt: skip
        moved = difference(lm, case, steps, runs={"sent": {"same": "main"}}) - base
        assert moved == pytest.approx(route.effect, abs=tolerance)


def test_answers_flip_where_they_should(asked):
    model, lm, _tolerance = asked
    case = model.cases[0]
    for role, factor in model.truth.flips.items():
        at = {"at": model.truth.heads[role].site("z"), "pos": "@last", "do": "scale"}
        below, above = (difference(lm, case, [at | {"a": factor * f}]) for f in (0.99, 1.01))
        assert below * above < 0


def test_what_cancels_is_silent_together(asked):
    model, lm, tolerance = asked
    case = model.cases[0]
    base = difference(lm, case, [])
    off = [
        {"at": model.truth.heads[role].site("z"), "pos": "@last", "do": "zero"}
        for role in model.truth.silent
    ]
    assert difference(lm, case, off) == pytest.approx(base, abs=tolerance)
    for role, step in zip(model.truth.silent, off, strict=True):
        alone = difference(lm, case, [step, KEEP]) - base
        assert alone == pytest.approx(-model.truth.attribution[role], abs=tolerance)


def test_the_task_falls_without_a_needed_head(asked):
    model, lm, _tolerance = asked
    if model.name != "P3":  # there the fact outweighs the text
        assert all(answer(lm, case, []) == case.answer for case in model.cases[:4])
        for role in model.truth.needed:
            off = [{"at": model.truth.heads[role].site("z"), "do": "zero"}]
            assert any(answer(lm, case, off) != case.answer for case in model.cases[:4])


def test_decoys_look_like_the_mechanism_and_are_not(asked):
    """Attention and size name the decoys; what is found by changing does not."""
    model, lm, tolerance = asked
    case = model.cases[0]
    effects = patched(lm, model, 1)[0]
    for role, reading in model.truth.decoys.items():
        head = model.truth.heads[role]
        assert abs(effects[head.layer, head.head]) < tolerance
        if reading == "attention":
            pattern = attention_pattern(lm, list(case.tokens), at=head.site("prob"))
            assert pattern.probs[0, 0, 0, case.places["answer"]] > 0.99
        else:
            norm = {"capture": "layers.*.attn.head.*.out", "pos": "@last", "reduce": "norm",
                    "name": "size"}  # fmt: skip
            sizes = lm.run({"out": [norm]}, list(case.tokens)).array("size")
            sizes = sizes.reshape(model.decoder.config.n_layers, -1)
            assert np.unravel_index(sizes.argmax(), sizes.shape) == (head.layer, head.head)


# Nulls. Over many prompts the heads that were planted are named, and none where nothing is.


@pytest.mark.parametrize("name", BUILDERS)
def test_only_planted_heads_are_consistent(name, models, tmp_path):
    model = models[name]
    with served(model, tmp_path, "engine") as lm:
        for reading, read in READINGS.items():
            planted = model.truth.of_heads(getattr(model.truth, reading))
            expected = sorted(at for at, effect in planted.items() if effect)
            assert consistent_heads(read(lm, model, N_CASES)) == expected


@pytest.mark.parametrize("name", BUILDERS)
@pytest.mark.parametrize("null", [random_weights, shuffled_truth, silenced])
def test_nothing_is_found_on_the_nulls(null, name, models, tmp_path):
    model = null(models[name])
    with served(model, tmp_path, "engine") as lm:
        found = {reading: read(lm, model, N_CASES) for reading, read in READINGS.items()}
        for effects in found.values():
            assert consistent_heads(effects) == []
            if null is silenced:
                assert np.abs(effects).max() < TOLERANCE["engine"]
        if null is not silenced:  # there is much that moves the answer, now here, now there
            assert np.abs(found["patching"]).max() > 0.1


def test_too_few_prompts_are_refused():
    with pytest.raises(InvalidRequest, match="too few prompts"):
        consistent_heads([np.ones((2, 4))] * 4)
