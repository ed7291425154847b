"""Sites that are not what their names say are found out, and refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tests.edits.recurrent_models import RECURRENT, recurrent_model
from tests.edits.small_models import CONFIGS, MAIN, model
from tests.tiny import FAMILIES, tiny_loaded, tiny_model_folder

import invivo
from invivo.edits.oracle import Interpreter
from invivo.edits.program import parse_program
from invivo.edits.resolve import resolve
from invivo.edits.site_check import failed_sites
from invivo.errors import InvalidRequest
from invivo.models.decoder import Decoder
from invivo.models.sites import Taps

Change = Callable[[torch.Tensor], torch.Tensor]


def decoder_of(name: str) -> Decoder:
    return recurrent_model(name) if name in RECURRENT else model(name)


@pytest.mark.parametrize("name", [*CONFIGS, *RECURRENT])
def test_all_equations_hold(name: str) -> None:
    assert failed_sites(decoder_of(name)) == {}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family", list(FAMILIES))
def test_all_equations_hold_as_far_as_numbers_are_rounded(
    family: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    assert failed_sites(tiny_loaded(tmp_path, family, dtype=dtype).decoder) == {}


def seen_as(monkeypatch: pytest.MonkeyPatch, site: str, layer: int, change: Change) -> None:
    """From here on captures of one site bring back another quantity; the model is the same."""
    whole: Callable[[Taps, str, int, torch.Tensor], torch.Tensor] = Interpreter.__call__

    def wrong(taps: Interpreter, name: str, at: int, value: torch.Tensor) -> torch.Tensor:
        new = whole(taps, name, at, value)
        if (name, at) == (site, layer):
            taps.after[name, at] = change(taps.after[name, at])
        return new

    monkeypatch.setattr(Interpreter, "__call__", wrong)


@pytest.mark.parametrize(
    ("name", "site"),
    [
        ("llama", "embed.out"),
        *(("llama", s) for s in ("resid.pre", "attn.out", "resid.mid", "mlp.out", "resid.post")),
        *(("llama", f"attn.head.{s}") for s in ("q.rot", "score", "prob", "z", "out")),
        *(("llama", f"attn.kvhead.{s}") for s in ("k.rot", "v")),
        *(("llama", f"mlp.{s}") for s in ("gate", "up", "neuron")),
        *(("llama", s) for s in ("final.norm.out", "logits")),
        *(("gemma", s) for s in ("attn.proj", "mlp.proj")),
        *(("moe", f"moe.{s}") for s in ("expert.weight", "expert.out", "shared.out")),
        *(("gla", f"gla.head.{s}") for s in ("q", "k", "v", "gate", "z")),
    ],
)
def test_another_quantity_under_a_name_is_found_out(
    monkeypatch: pytest.MonkeyPatch, name: str, site: str
) -> None:
    config = decoder_of(name).config
    outside = site in ("embed.out", "final.norm.out", "logits")
    layer = -1 if outside else max(i for i in range(config.n_layers) if i != 1)
    seen_as(monkeypatch, site, layer, lambda value: 1.3 * value)
    found = failed_sites(decoder_of(name))
    assert (site, layer) in found
    assert " = " in found[site, layer]
    plain = {"resid.pre", "resid.mid", "resid.post", "attn.out", "mlp.out", "embed.out"}
    if site not in plain:  # the stream stays sound, whatever is wrong inside a layer
        assert not {name for name, _ in found} & {"resid.pre", "resid.mid", "resid.post"}


def test_numbers_that_are_none_are_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    seen_as(monkeypatch, "attn.head.z", 0, lambda value: value * torch.nan)
    assert ("attn.head.z", 0) in failed_sites(model("llama"))


@pytest.mark.parametrize(
    ("program", "field"),
    [
        ({"out": [{"capture": "layers.*.attn.head.*.z"}]}, "out[0].capture"),
        ({"out": [{"capture": "layers.1.attn.head.2.prob"}]}, "out[0].capture"),
        ({"steps": [{"at": "layers.1.attn.head.2.z", "do": "zero"}]}, "steps[0].at"),
        (
            {"steps": [{"at": "layers.1.attn.edge", "do": "edge_block", "from": "@first",
                        "to": "@last"}]},
            "steps[0].at",
        ),
        (
            {"steps": [{"at": "layers.0.attn.head.0.z", "do": "replace",
                        "from": {"run": "plain", "at": "layers.1.attn.head.0.z"}}]},
            "steps[0].from.at",
        ),
    ],
)  # fmt: skip
def test_sites_that_failed_are_refused_with_the_reason(
    program: dict[str, object], field: str
) -> None:
    failed = {(f"attn.head.{site}", 1): "a + b = c does not hold" for site in ("z", "prob")}
    config = CONFIGS["llama"]
    with pytest.raises(InvalidRequest, match=r"a \+ b = c does not hold") as refused:
        resolve(parse_program(program), config, {"main": MAIN}, failed=failed)
    assert refused.value.field == field
    sound = {"steps": [{"at": "layers.0.attn.head.2.z", "do": "zero"}]}
    resolve(parse_program(sound), config, {"main": MAIN}, failed=failed)


def test_a_model_is_checked_with_its_first_program(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    seen_as(monkeypatch, "mlp.up", 1, torch.zeros_like)
    folder = tiny_model_folder(tmp_path)
    with invivo.load(str(folder), device="cpu", dtype="float32", kv_bytes=1 << 20) as lm:
        lm.generate("the cat", max_tokens=1)
        assert lm.run({"out": [{"capture": "layers.0.mlp.up"}]}, "the cat").captures
        with pytest.raises(InvalidRequest, match=r"act\(mlp.gate\) times mlp.up = mlp.neuron"):
            lm.run({"out": [{"capture": "layers.1.mlp.up"}]}, "the cat")
