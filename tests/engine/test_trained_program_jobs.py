"""Jobs that train a program's parameters on the live engine: exact, undisturbing, resumable."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tests.edits.small_models import CONFIGS, encode, model, random_ids, words
from tests.engine.drive import ask, run
from tests.engine.test_finetune import UNHURRIED, Job, Listed, drive, nothing_is_held, start
from tests.engine.test_programs_runs import ask as ask_program
from tests.engine.test_programs_runs import carried, engine_of, result

from invivo.edits.blobs import Blobs
from invivo.edits.oracle import run_program
from invivo.edits.program import parse_program
from invivo.edits.resolve import resolve
from invivo.engine import run_edits
from invivo.engine.engine import Engine
from invivo.engine.job_spec import JobSpec, Text
from invivo.engine.optimizer import learning_rate
from invivo.engine.trained_program import ProgramParameters, ProgramSpec
from invivo.errors import Conflict, InvalidRequest, TooLarge
from invivo.instruments.planted import induction
from invivo.models.load import LoadedModel

PROGRAM: dict[str, Any] = {
    "params": {"mask": {"shape": [4, 1], "init": 0.7}, "v": {"shape": [16]},
               "turn": {"shape": [2, 16]}},
    "steps": [
        {"at": "layers.0.attn.head.*.z", "pos": "@prompt", "do": "lerp", "w": {"param": "mask"},
         "from": "cf"},
        {"at": "layers.1.resid.post", "do": "add", "v": {"param": "v"}},
        {"at": "layers.2.resid.mid", "pos": "@prompt", "do": "swap_coords",
         "basis": {"param": "turn"}, "from": "plain"},
    ],
}  # fmt: skip
TRAIN = ("mask", "v", "turn")


def spec_of(
    program: Mapping[str, Any] = PROGRAM,
    train: tuple[str, ...] = TRAIN,
    sparsity: float = 0.0,
    objective: Any = "cross_entropy",
    **options: Any,
) -> JobSpec:
    cf = {"runs": {"cf": {"prompt": "other"}}}
    chosen = ProgramSpec(parse_program(cf | dict(program)), train, Blobs(), sparsity, objective)
    usual = {"name": "found", "bypasses": (), "steps": 4, "learning_rate": 0.05}
    return JobSpec(program=chosen, **(usual | options))


def text_of(spec: JobSpec, family: str, seed: int) -> Text:
    """A prompt, the tokens behind it that are learned, and a counterfactual prompt."""
    assert spec.program is not None
    rng = random.Random(seed)
    n_prompt, n = rng.randint(5, 20), rng.randint(1, 6)
    ids = random_ids(seed, n_prompt + n)
    labels = [-100] * (n_prompt - 1) + ids[n_prompt:] + [-100]
    prompts = {
        "main": words(ids, n_prompt=n_prompt),
        "cf": words(random_ids(seed + 500, n_prompt)),
    }
    resolved = resolve(spec.program.program, CONFIGS[family], prompts, encode=encode)
    return Text(ids, labels, resolved=resolved)


def texts(spec: JobSpec, family: str = "llama", n: int = 5) -> Listed:
    return Listed([text_of(spec, family, seed) for seed in range(n)])


def served(family: str, **options: Any) -> Engine:
    return engine_of(family, max_batch_tokens=16, **(UNHURRIED | options))


def values_of(job: Job) -> dict[str, torch.Tensor]:
    return job.of("published")[-1]["values"]


def by_autograd(
    family: str, spec: JobSpec, data: Iterator[Text]
) -> tuple[list[float], dict[str, torch.Tensor]]:
    """The same job by the oracle under autograd and torch's own optimizer."""
    assert spec.program is not None
    decoder = model(family)
    values = ProgramParameters(spec.program, decoder.config, decoder.embed, seed=spec.seed)
    masters = list(values.masters.values())
    adam = torch.optim.AdamW(masters, lr=0.0, weight_decay=0.0)
    losses = []
    for step in range(spec.steps):
        total, count = torch.zeros((), dtype=torch.float64), 0
        for _ in range(spec.gradient_accumulation):
            text = next(data)
            assert text.resolved is not None
            (row,) = run_program(decoder, text.resolved, params=values)
            labels = torch.tensor(list(text.labels))
            total = total + F.cross_entropy(row.logits["main"], labels, reduction="sum")
            count += int((labels >= 0).sum())
        mean = total / count
        losses.append(mean.item())
        distance = values.masters["v"].abs().sum() + (values.masters["mask"] - 1).abs().sum()
        (mean + spec.program.sparsity * distance).backward()
        adam.param_groups[0]["lr"] = learning_rate(spec, step)
        adam.step()
        adam.zero_grad()
        with torch.no_grad():
            values.masters["mask"].clamp_(0, 1)
    return losses, values.trained()


@pytest.mark.parametrize("family", ["llama", "gemma", "moe"])
def test_a_job_beside_requests_is_the_plain_loop(family: str) -> None:
    spec = spec_of(gradient_accumulation=2, sparsity=0.01)
    losses, wanted = by_autograd(family, spec, iter(texts(spec, family).next, None))
    alone = []
    for seed in range(3):
        engine = served(family)
        alone.append(
            ask(engine, random_ids(seed, 9), max_tokens=12, seed=seed, ignore_eos=True, logprobs=0)
        )
        run(engine, alone[-1])
    engine = served(family)
    job = start(engine, spec, texts(spec, family))
    beside = [
        ask(engine, random_ids(seed, 9), max_tokens=12, seed=seed, ignore_eos=True, logprobs=0)
        for seed in range(3)
    ]
    looked = ask_program(engine, carried(engine, {"out": [{"measure": "logit", "token": 3}]}))
    drive(engine, job)
    run(engine, *beside, looked)
    assert job.kinds()[-1] == "succeeded", job.events[-1]
    assert [event["loss"] for event in job.of("step")] == pytest.approx(losses, rel=1e-9)
    assert all(event["penalty"] > 0 for event in job.of("step")[1:])
    got = values_of(job)
    assert got.keys() == wanted.keys()
    for name in wanted:
        torch.testing.assert_close(got[name], wanted[name], rtol=1e-8, atol=1e-8)
    for mine, theirs in zip(beside, alone, strict=True):
        assert mine.tokens() == theirs.tokens()
        assert mine.logprobs() == pytest.approx(theirs.logprobs(), rel=0, abs=1e-12)
    result(looked)
    nothing_is_held(engine)


@pytest.mark.parametrize("objective", ["logit_diff", "kl"])
@pytest.mark.parametrize("family", ["llama", "gemma"])
def test_other_objectives_are_those_of_autograd(family: str, objective: str) -> None:
    spec = spec_of(steps=2, objective=objective)
    rng = random.Random(4)
    data = [
        replace(text, others=[rng.randrange(40) for _ in text.labels])
        for text in texts(spec, family).texts[:2]
    ]
    decoder = model(family)
    assert spec.program is not None
    values = ProgramParameters(spec.program, decoder.config, decoder.embed, seed=spec.seed)
    text = data[0]
    assert text.resolved is not None
    assert text.others is not None
    (row,) = run_program(decoder, text.resolved, params=values)
    rows = [i for i, label in enumerate(text.labels) if label >= 0]
    logits = row.logits["main"][rows]
    if objective == "kl":
        plain = row.logits["plain"][rows].log_softmax(-1)
        loss = (plain.exp() * (plain - logits.log_softmax(-1))).sum(-1).mean()
    else:
        places = torch.arange(len(rows))
        labels, others = (
            torch.tensor([tokens[i] for i in rows]) for tokens in (text.labels, text.others)
        )
        loss = (logits[places, others] - logits[places, labels]).mean()
    gradients = torch.autograd.grad(loss, list(values.masters.values()))
    norm = torch.cat([gradient.flatten() for gradient in gradients]).norm()
    engine = served(family)
    job = start(engine, spec, Listed(data))
    drive(engine, job)
    assert job.kinds()[-1] == "succeeded", job.events[-1]
    first = job.of("step")[0]
    assert first["loss"] == pytest.approx(loss.item(), rel=1e-9)
    assert first["gradient_norm"] == pytest.approx(norm.item(), rel=1e-9)


def test_pauses_and_restarts_leave_no_trace(tmp_path: Path) -> None:
    spec = spec_of(steps=6, checkpoint_every=2, gradient_accumulation=2)
    options = {"policy": "temporal:1"}  # whole iterations: the same cuts, hence the same bits
    engine = served("llama", **options)
    whole = start(engine, spec, texts(spec))
    drive(engine, whole)
    first = served("llama", **options)
    job = start(first, spec, texts(spec), tmp_path)
    drive(first, job, until=lambda: len(job.of("step")) >= 3)
    assert job.handle is not None
    job.handle.pause()
    drive(first, job, until=lambda: job.handle.state == "paused")
    job.handle.resume()
    drive(first, job, until=lambda: len(job.of("step")) >= 4)
    first.close()
    second = served("llama", **options)
    again = start(second, spec, texts(spec), tmp_path)
    drive(second, again)
    assert again.kinds()[-1] == "succeeded"
    assert again.of("started")[0]["step"] >= 4
    assert again.handle is not None
    assert again.handle.losses == whole.handle.losses if whole.handle else False
    for name, value in values_of(whole).items():
        assert torch.equal(values_of(again)[name], value)
    other = spec_of(steps=6, checkpoint_every=2, gradient_accumulation=2, sparsity=0.5)
    with pytest.raises(Conflict):
        start(second, other, texts(other), tmp_path)


def test_training_gives_way_to_requests_and_begins_anew() -> None:
    spec = spec_of(steps=3)
    losses, wanted = by_autograd("llama", spec, iter(texts(spec).next, None))
    engine = served("llama", kv_bytes=26 * 4 * 3 * 2 * 2 * 4 * 8)  # 26 blocks
    job = start(engine, spec, texts(spec))
    asked = [ask(engine, random_ids(seed, 12), max_tokens=30, ignore_eos=True) for seed in range(6)]
    drive(engine, job, until=lambda: all(inquiry.done for inquiry in asked))
    drive(engine, job)
    assert [event["loss"] for event in job.of("step")] == pytest.approx(losses, rel=1e-9)
    for name, value in wanted.items():
        torch.testing.assert_close(values_of(job)[name], value, rtol=1e-8, atol=1e-8)
    nothing_is_held(engine)


def test_an_operation_that_raises_fails_the_job_and_nothing_else(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    spec = spec_of(steps=3)
    engine = served("llama")
    real = run_edits.change_rows
    seen = []

    def broken(touch: Any, *args: Any) -> Any:
        if touch.do == "swap_coords":
            seen.append(touch)
            if len(seen) > 3:
                raise RuntimeError("no")
        return real(touch, *args)

    monkeypatch.setattr(run_edits, "change_rows", broken)
    job = start(engine, spec, texts(spec))
    beside = ask(engine, random_ids(3), max_tokens=20, ignore_eos=True)
    drive(engine, job)
    run(engine, beside)
    assert job.kinds()[-1] == "failed"
    assert beside.reason() == "length"
    nothing_is_held(engine)


def test_what_a_job_does_not_take_is_refused() -> None:
    engine = served("llama")
    basis = spec_of(weight_decay=0.1)
    with pytest.raises(InvalidRequest):
        start(engine, basis, texts(basis))
    nobody = spec_of(train=())
    with pytest.raises(InvalidRequest):
        start(engine, nobody, texts(nobody))


def test_what_runs_read_of_each_other_is_bounded() -> None:
    spec = spec_of()
    engine = served("llama", max_capture_bytes=100)
    job = start(engine, spec, texts(spec))
    drive(engine, job)
    assert job.kinds()[-1] == "failed"
    assert job.handle is not None
    assert isinstance(job.handle.error, TooLarge)
    nothing_is_held(engine)


# What training finds.


def test_a_steering_vector_lowers_the_loss_and_serves_at_once() -> None:
    program = {
        "params": {"v": {"shape": [16]}},
        "steps": [{"at": "layers.1.resid.post", "do": "add", "v": {"param": "v"}}],
    }
    spec = spec_of(program, ("v",), steps=25, learning_rate=0.3, gradient_accumulation=3)
    engine = served("llama")
    data = texts(spec, n=3)
    job = start(engine, spec, data)
    drive(engine, job)
    losses = [event["loss"] for event in job.of("step")]
    assert losses[-1] < 0.92 * losses[0]
    given = {"steps": [program["steps"][0] | {"v": values_of(job)["v"].tolist()}]}  # type: ignore[index]
    scores = []
    for steps in ({}, given):
        total = 0.0
        for text in data.texts:
            assert text.resolved is not None
            n_prompt = text.resolved.rows[0].runs["main"].prompt.n_prompt
            whole = words(list(text.tokens))
            inquiry = ask_program(
                engine, carried(engine, steps, whole), whole, "score", score_from=n_prompt
            )
            run(engine, inquiry)
            total += sum(inquiry.prompt_logprobs())
        scores.append(total)
    assert scores[1] > 0.95 * scores[0]  # log-probabilities: nearer to zero is better


def test_a_mask_finds_the_planted_induction_head() -> None:
    planted = induction.build(1)
    config = planted.decoder.config
    n_heads = config.n_heads
    layers = range(config.n_layers)
    program = parse_program(
        {
            "runs": {"cf": {"prompt": "other"}},
            "params": {f"m{i}": {"shape": [n_heads, 1], "init": 1} for i in layers},
            "steps": [
                {"at": f"layers.{i}.attn.head.*.z", "pos": "@last", "do": "lerp",
                 "w": {"param": f"m{i}"}, "from": "cf"}
                for i in layers
            ],
        }
    )  # fmt: skip
    chosen = ProgramSpec(program, tuple(f"m{i}" for i in layers), Blobs(), sparsity=0.05)
    found = []
    for case in planted.cases[:6]:
        ids = [*case.tokens, case.other]  # what the counterfactual would answer
        n = len(case.tokens)
        prompts = {
            "main": words(ids, n_prompt=n),
            "cf": words(list(case.counterfactual)),
        }
        labels = [-100] * (n - 1) + [case.other, -100]
        found.append(Text(ids, labels, resolved=resolve(program, config, prompts)))
    loaded = LoadedModel("planted", Path("."), config, planted.decoder, None, "planted")
    engine = Engine(loaded, _roomy())
    spec = JobSpec("mask", (), steps=12, learning_rate=0.2, gradient_accumulation=3,
                   program=chosen)  # fmt: skip
    job = start(engine, spec, Listed(found))
    drive(engine, job)
    assert job.kinds()[-1] == "succeeded", job.events[-1]
    masks = torch.stack([values_of(job)[f"m{i}"][:, 0] for i in layers])
    head = planted.truth.heads["induction"]
    assert masks[head.layer, head.head] < 0.3
    masks[head.layer, head.head] = 1.0
    assert masks.min() > 0.9  # nobody else is needed for it
    losses = [event["loss"] for event in job.of("step")]
    assert losses[-1] < 0.5 * losses[0]


def _roomy() -> Any:
    from invivo.engine.config import EngineConfig

    return EngineConfig(kv_bytes=4 << 20, max_running=4, max_batch_tokens=64, **UNHURRIED)
