"""Law 9 in the window core: programs' parameters have the gradients of the oracle under autograd,
and those of finite differences, however a text is cut."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from tests.edits.small_models import CONFIGS, encode, model, random_ids, words
from tests.models.pages import Pages, Text

from invivo.edits.apply import Context
from invivo.edits.blobs import Blobs
from invivo.edits.oracle import run_program
from invivo.edits.program import parse_program
from invivo.edits.resolve import resolve
from invivo.edits.resolved import ResolvedProgram
from invivo.engine.edit_taps import EditedSpan, EditTaps
from invivo.engine.train_sequence import TrainSequence
from invivo.engine.trained_hooks import hooks_from
from invivo.engine.trained_program import (
    ProgramParameters,
    ProgramSpec,
    check_trained,
    lowest_layer,
)
from invivo.engine.training_runs import TrainingRun, training_runs
from invivo.engine.window import WindowTrainer
from invivo.errors import InvalidRequest

LENGTH, N_PROMPT = 13, 8
FAMILIES = ["llama", "gemma", "gpt2", "moe", "olmo2"]
_DRAWN = torch.randn(16, 2, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
BLOBS = Blobs({"b": torch.linalg.qr(_DRAWN).Q.T.contiguous()})


def lerp(at: str, shape: list[int], **more: Any) -> dict[str, Any]:
    step = {"at": at, "do": "lerp", "w": {"param": "p"}, "from": {"run": "cf"}, **more}
    return {"params": {"p": {"shape": shape, "init": 0.4}}, "steps": [step]}


PROGRAMS: dict[str, dict[str, Any]] = {
    "mask over heads": lerp("layers.1.attn.head.*.z", [4, 1], pos="@prompt"),
    "mask of a whole stream": lerp("layers.0.resid.mid", [16]),
    "mask over keys": lerp("layers.1.attn.kvhead.*.k", [1, 1], pos={"range": [2, 7]}),
    "mask over values": lerp("layers.0.attn.kvhead.*.v", [1, 1]),
    "mask over attention": lerp("layers.1.attn.head.*.prob", []),
    "mask that changes nothing yet": {
        "params": {"p": {"shape": [4, 1], "init": 1.0}},
        "steps": [{"at": "layers.*.attn.head.*.z", "do": "lerp", "w": {"param": "p"},
                   "from": "cf"}],
    },
    "steering": {
        "params": {"p": {"shape": [16], "init": 0.0}},
        "steps": [{"at": "layers.1.resid.post", "do": "add", "v": {"param": "p"}, "c": 0.5}],
    },
    "steering what is generated": {
        "params": {"p": {"shape": [16], "init": 0.1}},
        "steps": [{"at": "layers.2.mlp.out", "pos": "@generated", "do": "add",
                   "v": {"param": "p"}}],
    },
    "at the start and the end": {
        "params": {"p": {"shape": [16], "init": 0.1}, "q": {"shape": [1], "init": 1.5}},
        "steps": [{"at": "embed.out", "pos": {"index": 2}, "do": "add", "v": {"param": "p"}},
                  {"at": "final.norm.out", "do": "scale", "a": {"param": "q"}}],
    },
    "coordinates": {
        "params": {"p": {"shape": [2], "init": 0.3}},
        "steps": [{"at": "layers.0.mlp.out", "do": "set_coords", "basis": "blob:b",
                   "c": {"param": "p"}}],
    },
    "a rotation": {
        "params": {"p": {"shape": [3, 16]}},
        "steps": [{"at": "layers.1.resid.post", "pos": "@prompt", "do": "swap_coords",
                   "basis": {"param": "p"}, "from": "cf"}],
    },
    "a direction taken out": {
        "params": {"p": {"shape": [2, 16], "init": "blob:b"}},
        "steps": [{"at": "layers.0.resid.post", "do": "project_out", "basis": {"param": "p"}}],
    },
    "one behind the other": {
        "params": {"p": {"shape": [16], "init": 0.0}, "q": {"shape": [4, 1], "init": 0.5}},
        "steps": [{"at": "layers.0.resid.post", "do": "add", "v": {"param": "p"}},
                  {"at": "layers.1.attn.edge", "do": "edge_block", "from": {"index": 2},
                   "to": {"range": [4, 8]}},
                  {"at": "layers.2.attn.head.*.z", "do": "lerp", "w": {"param": "q"},
                   "from": "plain"},
                  {"run": "cf", "at": "layers.0.mlp.out", "do": "zero"}],
    },
}  # fmt: skip


class Case:
    """A program on a text of a model."""

    def __init__(self, family: str, program: dict[str, Any], seed: int = 0) -> None:
        self.decoder = model(family)
        self.ids = random_ids(seed + 20, LENGTH)
        cf = {"runs": {"cf": {"prompt": "other"}}}
        names = tuple(program["params"])
        self.spec = ProgramSpec(parse_program(cf | program), names, BLOBS)
        check_trained(self.spec, self.decoder.config)
        prompts = {
            "main": words(self.ids, n_prompt=N_PROMPT),
            "cf": words(random_ids(seed + 21, LENGTH), n_prompt=N_PROMPT),
        }
        self.resolved: ResolvedProgram = resolve(
            self.spec.program, self.decoder.config, prompts, blobs=BLOBS, encode=encode
        )
        self.values = ProgramParameters(self.spec, self.decoder.config, self.decoder.embed)
        self.labels = torch.full((LENGTH,), -100)
        self.labels[N_PROMPT - 1 : -1] = torch.tensor(self.ids[N_PROMPT:])
        embed = self.decoder.embed
        self.context = Context(embed.dtype, embed.device, BLOBS, self.values)

    def take(self) -> dict[str, torch.Tensor]:
        taken = {}
        for name, master in self.values.masters.items():
            taken[name] = torch.zeros_like(master) if master.grad is None else master.grad
            master.grad = None
        return taken

    def oracle_loss(self) -> torch.Tensor:
        (row,) = run_program(self.decoder, self.resolved, blobs=BLOBS, params=self.values)
        return F.cross_entropy(row.logits["main"], self.labels, reduction="sum")

    def by_windows(self, seed: int) -> float:
        """The loss by windows; masters gather their gradients."""
        rng = random.Random(seed)
        pages = Pages(self.decoder)
        config = self.decoder.config
        trainer = WindowTrainer(
            self.decoder,
            pages.cache,
            (),
            {},
            mode="rerun",
            order="window",
            hooks=hooks_from(config, lowest_layer(self.spec, config)),
        )
        for run in training_runs(self.resolved, self.context, max_bytes=1 << 20):
            sequence = self._forward(run, trainer, pages, rng)
            run.through()
        while (unit := trainer.next_unit(sequence, rng.randint(1, LENGTH))) is not None:
            trainer.run(sequence, unit)
        assert sequence.loss is not None
        return float(sequence.loss)

    def _forward(
        self, run: TrainingRun, trainer: WindowTrainer, pages: Pages, rng: random.Random
    ) -> TrainSequence:
        text = Text(run.tokens)
        while len(text.blocks) * pages.block_size < len(text.tokens):
            text.blocks.append(pages.free.pop())
        labels = self.labels if run.is_main else torch.full_like(self.labels, -100)
        sequence = TrainSequence(
            torch.tensor(text.tokens),
            labels,
            text.blocks,
            held_out=not run.is_main,
            edits=run.edits,
        )
        trainer.begin(sequence)
        while text.n_done < len(text.tokens):
            start = text.n_done
            stop = min(len(text.tokens), start + rng.randint(1, 7))
            layout = pages.layout([(text, stop - start)])
            taps = EditTaps(self.decoder.config, [EditedSpan(run.edits, 0, 0, range(start, stop))])
            with torch.inference_mode():
                hidden = self.decoder(
                    torch.tensor(text.tokens[start:stop]), layout, pages.cache, taps=taps
                )
            trainer.forward_done(sequence, start, stop, hidden.clone())
            text.n_done = stop
        assert run.edits.error is None
        return sequence


@pytest.mark.parametrize("name", PROGRAMS)
@pytest.mark.parametrize("family", ["llama", "gemma", "moe"])
def test_gradients_are_those_of_the_oracle(family: str, name: str) -> None:
    case = Case(family, PROGRAMS[name])
    loss = case.oracle_loss()
    loss.backward()
    wanted = case.take()
    assert any(gradient.abs().max() > 1e-6 for gradient in wanted.values())
    assert case.by_windows(1) == pytest.approx(loss.item(), rel=1e-12)
    for parameter, gradient in case.take().items():
        torch.testing.assert_close(gradient, wanted[parameter], rtol=1e-9, atol=1e-9)


@settings(max_examples=15, deadline=None, phases=[Phase.generate])
@given(
    family=st.sampled_from(FAMILIES),
    name=st.sampled_from(sorted(PROGRAMS)),
    seed=st.integers(0, 1000),
)
def test_no_cut_changes_a_gradient(family: str, name: str, seed: int) -> None:
    case = Case(family, PROGRAMS[name], seed)
    case.oracle_loss().backward()
    wanted = case.take()
    case.by_windows(seed)
    for parameter, gradient in case.take().items():
        torch.testing.assert_close(gradient, wanted[parameter], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", PROGRAMS)
def test_gradients_match_finite_differences(name: str) -> None:
    case = Case("llama", PROGRAMS[name])
    case.by_windows(3)
    got = case.take()
    rng = torch.Generator().manual_seed(5)
    for parameter, master in case.values.masters.items():
        direction = torch.randn(master.shape, generator=rng, dtype=torch.float64)
        if name in ("a rotation", "a direction taken out"):
            direction = direction.tril(-1) + direction.triu(1)  # signs are not trained
        losses = []
        with torch.no_grad():
            for step in (1e-5, -2e-5):
                master.add_(direction, alpha=step)
                losses.append(case.oracle_loss().item())
            master.add_(direction, alpha=1e-5)
        slope = (losses[0] - losses[1]) / 2e-5
        assert float((got[parameter] * direction).sum()) == pytest.approx(slope, rel=1e-5, abs=1e-7)


def test_a_trained_basis_stays_orthonormal() -> None:
    case = Case("llama", PROGRAMS["a rotation"])
    (master,) = case.values.masters.values()
    for seed in range(3):
        case.by_windows(seed)
        gradient = case.take()["p"]
        with torch.no_grad():
            master.sub_(gradient, alpha=0.5)
        rows = case.values["p"]
        torch.testing.assert_close(rows @ rows.T, torch.eye(3, dtype=torch.float64))


def test_a_basis_starts_from_its_tensor() -> None:
    case = Case("llama", PROGRAMS["a direction taken out"])
    torch.testing.assert_close(case.values["p"].detach(), BLOBS.get("b", ""), rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("program", "train"),
    [
        (PROGRAMS["steering"], ()),
        (PROGRAMS["steering"], ("nobody",)),
        (PROGRAMS["steering"] | {"sweep": {"a": "0..3"}}, ("p",)),
        ({"params": {"p": {"shape": [16]}}}, ("p",)),
        (lerp("layers.1.attn.head.*.score", []), ("p",)),
        (lerp("logits", []), ("p",)),
        (
            {
                "runs": {"b": {"same": "main"}},
                "params": {"p": {"shape": [16]}},
                "steps": [
                    {"run": "b", "at": "embed.out", "do": "add", "v": {"param": "p"}},
                    {"at": "layers.1.resid.post", "do": "replace", "from": "b"},
                ],
            },
            ("p",),
        ),
    ],
)
def test_what_cannot_be_trained_is_refused(program: dict[str, Any], train: tuple[str, ...]) -> None:
    cf = {"runs": {"cf": {"prompt": "other"}}}
    spec = ProgramSpec(parse_program(cf | program), train, BLOBS)
    with pytest.raises(InvalidRequest):
        check_trained(spec, CONFIGS["llama"])
