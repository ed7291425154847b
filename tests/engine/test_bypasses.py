"""Bypasses: gradients, table form equal to the differentiable form, refusals."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.engine.bypass_cases import KINDS, hidden_of, logits_of, random_parameters
from tests.tiny import tiny_loaded

from invivo.engine.adapters import AdapterStore
from invivo.engine.bypasses import (
    BypassSpec,
    LowRank,
    TrainBypass,
    check_parameters,
    checked_specs,
    init_parameters,
    n_virtual,
    overlay,
    virtual_rows,
)
from invivo.engine.types import VirtualRows
from invivo.errors import InvalidRequest
from invivo.kernels.bottleneck import bottleneck_add, bottleneck_reference
from invivo.models.bypass import ROW_PLACES
from invivo.models.load import LoadedModel

TOKENS = [5, 77, 260, 3, 9, 141, 280, 33]


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_are_those_of_finite_differences(kind: str, tiny: LoadedModel) -> None:
    specs = KINDS[kind]
    parameters = random_parameters(tiny.config, specs, dtype=torch.float64)
    names = [name for name in parameters if name == "soft_prompt" or name.startswith("layers.1.")]
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64, requires_grad=True)

    c = tiny.config
    widths = {"qkv": (c.d_model, (c.n_heads + 2 * c.n_kv_heads) * c.head_dim),
              "o": (c.n_heads * c.head_dim, c.d_model), "down": (c.d_ff, c.d_model),
              "gate_up": (c.d_model, 2 * c.d_ff)}  # fmt: skip
    rows, leaves = 3, [parameters[name].requires_grad_() for name in names]

    def run(*given: torch.Tensor) -> tuple[torch.Tensor, ...]:
        bypass = TrainBypass(c, specs, parameters | dict(zip(names, given, strict=False)))
        bypass = bypass.window(1, 1 + rows)
        values = list(given[len(names) :])
        out = []
        for linear in widths:
            x, y = values.pop(0), values.pop(0)
            out.append(bypass(1, linear, x, y))
        for name in sorted(bypass.at):
            out.append(bypass.rows(name, -1 if name == "embed" else 1, values.pop(0)))
        return tuple(out)

    inputs = [draw(rows, width) for pair in widths.values() for width in pair]
    for name in sorted(TrainBypass(c, specs, parameters).at):
        heads = "kvhead" in name
        width = c.d_ff if name == "mlp.neuron" else c.d_model
        inputs.append(draw(rows, c.n_kv_heads, c.head_dim) if heads else draw(rows, width))
    assert torch.autograd.gradcheck(run, (*leaves, *inputs), fast_mode=True)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", ["llama", "gemma3_text", "gpt2", "olmo2"])
def test_tables_compute_what_training_does(family: str, kind: str, tmp_path: Path) -> None:
    model = tiny_loaded(tmp_path, family, dtype=torch.float64)
    specs = KINDS[kind]
    parameters = random_parameters(model.config, specs, dtype=torch.float64)
    n = n_virtual(specs)
    store = AdapterStore(model.config, device="cpu", dtype=torch.float64, max_slots=3, max_rank=8)
    store.publish("a", specs, parameters)
    slot = store.place(store.hold("a"))
    index = torch.full((n + len(TOKENS),), slot, dtype=torch.int32)
    served = store.bypass(index, [VirtualRows(0, n, 0, slot)] if n else [])
    trained = TrainBypass(model.config, specs, parameters).window(0, n + len(TOKENS))
    expected = logits_of(model, TOKENS, trained, n)
    assert (logits_of(model, TOKENS, served, n) - expected).abs().max() < 1e-10
    assert (logits_of(model, TOKENS, None, 0) - expected).abs().max() > 1e-3


def test_fresh_bypasses_change_nothing_but_virtual_tokens(tiny: LoadedModel) -> None:
    base = logits_of(tiny, TOKENS, None, 0)
    for kind in ("lora", "ia3", "adapter", "steering"):
        specs = KINDS[kind]
        parameters = {
            k: v for s in specs for k, v in init_parameters(s, tiny.config, seed=1).items()
        }
        bypass = TrainBypass(tiny.config, specs, parameters)
        assert (logits_of(tiny, TOKENS, bypass, 0) - base).abs().max() < 1e-6


def test_every_hook_is_called_at_its_place(tiny: LoadedModel) -> None:
    """Shifting a site by a vector is the same as shifting what is added there."""
    base = logits_of(tiny, TOKENS, None, 0)
    v = torch.randn(tiny.config.d_model, generator=torch.Generator().manual_seed(3))
    answers = {}
    for site in (
        "resid.pre",
        "attn.in",
        "attn.out",
        "resid.mid",
        "mlp.in",
        "mlp.out",
        "resid.post",
    ):
        spec = BypassSpec("steering", (site,), layers=(1,))
        bypass = TrainBypass(tiny.config, [spec], {f"layers.1.{site}.steering": v})
        assert bypass.at == {site} <= set(ROW_PLACES)
        answers[site] = logits_of(tiny, TOKENS, bypass, 0)
        assert (answers[site] - base).abs().max() > 1e-3
    for one, other in (("attn.out", "resid.mid"), ("mlp.out", "resid.post")):
        assert (answers[one] - answers[other]).abs().max() < 1e-5
    assert (answers["attn.in"] - answers["mlp.in"]).abs().max() > 1e-3


class Onlooker:
    """Taps that read everything and change nothing."""

    def wants(self, site: str, layer: int) -> bool:
        return True

    def __call__(self, site: str, layer: int, value: torch.Tensor) -> torch.Tensor:
        return value


@pytest.mark.parametrize("kind", KINDS)
def test_taps_beside_a_bypass_change_nothing(kind: str, tmp_path: Path) -> None:
    model = tiny_loaded(tmp_path, "gemma3_text", dtype=torch.float64)
    specs = KINDS[kind]
    n = n_virtual(specs)
    parameters = random_parameters(model.config, specs, dtype=torch.float64)
    bypass = TrainBypass(model.config, specs, parameters).window(0, n + len(TOKENS))
    plain = hidden_of(model, TOKENS, bypass, n)
    tapped = hidden_of(model, TOKENS, bypass, n, taps=Onlooker())
    assert (plain - tapped).abs().max() < 1e-10


def test_bypasses_go_around_experts(tmp_path: Path) -> None:
    model = tiny_loaded(tmp_path, "mixtral", dtype=torch.float64)
    specs = (
        BypassSpec("lora", ("q", "o"), 3),
        BypassSpec("ia3"),
        BypassSpec("adapter", size=2),
        BypassSpec("prefix", size=2),
    )
    parameters = random_parameters(model.config, specs, dtype=torch.float64)
    assert not any("down.ia3" in name for name in parameters)
    store = AdapterStore(model.config, device="cpu", dtype=torch.float64, max_slots=1, max_rank=8)
    store.publish("a", specs, parameters)
    slot = store.place(store.hold("a"))
    index = torch.full((2 + len(TOKENS),), slot, dtype=torch.int32)
    served = store.bypass(index, [VirtualRows(0, 2, 0, slot)])
    trained = TrainBypass(model.config, specs, parameters).window(0, 2 + len(TOKENS))
    expected = logits_of(model, TOKENS, trained, 2)
    assert (logits_of(model, TOKENS, served, 2) - expected).abs().max() < 1e-10


@given(st.data())
@settings(max_examples=40, deadline=None)
def test_windows_see_their_own_virtual_rows(data: st.DataObject) -> None:
    n = data.draw(st.integers(1, 5))
    lengths = data.draw(st.lists(st.integers(n + 1, n + 6), min_size=1, max_size=3))
    segments = [sum(lengths[:i]) for i in range(len(lengths))]
    total = sum(lengths)
    cut = data.draw(st.integers(1, total - 1))
    value = torch.zeros(total, 2)
    source = torch.arange(1.0, n + 1)[:, None].expand(n, 2)

    def filled(a: int, b: int) -> torch.Tensor:
        return overlay(value[a:b], [(rows, source, 0) for rows in virtual_rows(a, b, segments, n)])

    whole = filled(0, total)
    parts = [filled(a, b) for a, b in ((0, cut), (cut, total))]
    assert torch.equal(whole, torch.cat(parts))
    assert not value.any()
    for begin, length in zip(segments, lengths, strict=True):
        assert whole[begin : begin + length, 0].tolist() == [*range(1, n + 1)] + [0] * (length - n)


@pytest.mark.parametrize("kind", ["relu", "gelu", "silu"])
def test_bottlenecks_of_all_slots_in_two_products(kind: str) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(7, 6, generator=generator)
    down, up = torch.randn(3, 4, 6, generator=generator), torch.randn(3, 6, 4, generator=generator)
    down[0], up[0] = 0, 0
    index = torch.tensor([0, 1, 2, 2, 5, 0, 1], dtype=torch.int32)
    expected = bottleneck_reference(x, down, up, index, kind)
    assert (bottleneck_add(x, down, up, index, kind) - expected).abs().max() < 1e-5
    assert torch.equal(expected[0], x[0])


@pytest.mark.parametrize(
    ("spec", "word"),
    [
        (BypassSpec("lora", ("down",), 4, alpha=float("nan")), "alpha"),
        (BypassSpec("adapter", ("mlp.out",), 4, activation="sine"), "activation"),
        (BypassSpec("prefix", size=3, layers=(0,)), "layers"),
        (BypassSpec("lora", ("nowhere",), 4), "linear map"),
        (BypassSpec("lora", ("down",)), "size"),
    ],
)
def test_specs_that_mean_nothing_are_refused(
    spec: BypassSpec, word: str, tiny: LoadedModel
) -> None:
    with pytest.raises(InvalidRequest, match=word):
        checked_specs(tiny.config, [spec])


def test_parameters_must_be_those_of_the_specs(tiny: LoadedModel) -> None:
    specs = checked_specs(tiny.config, [BypassSpec("steering")])
    good = random_parameters(tiny.config, specs)
    name = "layers.0.resid.post.steering"
    broken: list[tuple[dict[str, Any], str]] = [
        ({k: v for k, v in good.items() if k != name}, "is missing"),
        (good | {"more": torch.zeros(1)}, "belongs to no bypass"),
        (good | {name: torch.zeros(3)}, "does not fit the model"),
    ]
    for parameters, word in broken:
        with pytest.raises(InvalidRequest, match=word):
            check_parameters(tiny.config, specs, parameters)
    store = AdapterStore(tiny.config, device="cpu", dtype=torch.float32, max_slots=1, max_rank=8)
    with pytest.raises(InvalidRequest, match="not finite"):
        store.publish("a", specs, good | {name: torch.full_like(good[name], float("nan"))})


def test_a_loras_narrow_matrices_follow_its_parameters() -> None:
    a, b = (torch.randn(3, 4, requires_grad=True) for _ in range(2))
    part = LowRank(0, 4, a, b, 2.0)
    once, again = part.cast(torch.bfloat16), part.cast(torch.bfloat16)
    assert all(x is y for x, y in zip(once, again, strict=True))
    with torch.no_grad():
        b += 1.0  # as an optimizer does
    for dtype in (torch.bfloat16, torch.float16):
        for narrow, parameter in zip(part.cast(dtype), (a, b), strict=True):
            assert torch.equal(narrow, parameter.to(dtype))
            assert not narrow.requires_grad
    a.data = torch.zeros(3, 4)  # as a parameter that came back from elsewhere
    assert not part.cast(torch.float16)[0].any()
