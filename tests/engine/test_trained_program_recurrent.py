"""Law 9 where a state is carried: gradients of programs' parameters are the oracle's, however a
text is cut, and jobs learn them."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from tests.edits.recurrent_models import RECURRENT, recurrent_model
from tests.edits.small_models import encode, random_ids, words
from tests.engine.drive import run
from tests.engine.test_finetune import UNHURRIED, Listed, drive, start
from tests.engine.test_programs_recurrent import engine_of, generate
from tests.models.gla_models import spans_layout

from invivo.edits.apply import Context
from invivo.edits.blobs import Blobs
from invivo.edits.oracle import run_program
from invivo.edits.program import parse_program
from invivo.edits.resolve import resolve
from invivo.engine.edit_taps import EditedSpan, EditTaps
from invivo.engine.job_spec import JobSpec, Text
from invivo.engine.optimizer import learning_rate
from invivo.engine.train_sequence import TrainSequence
from invivo.engine.trained_hooks import hooks_from
from invivo.engine.trained_program import (
    ProgramParameters,
    ProgramSpec,
    check_trained,
    lowest_layer,
)
from invivo.engine.training_runs import training_runs
from invivo.engine.window import WindowTrainer
from invivo.errors import InvalidRequest
from invivo.models.cache import allocate_kv_cache

LENGTH, N_PROMPT = 13, 8


def trained(at: str, do: str, argument: str, shape: list[int], **more: Any) -> dict[str, Any]:
    step = {"at": at, "do": do, argument: {"param": "p"}, **more}
    return {"params": {"p": {"shape": shape, "init": 0.4}}, "steps": [step]}


PROGRAMS: dict[str, dict[str, Any]] = {
    "mask over states": trained("layers.0.gla.head.*.state", "lerp", "w", [2, 1, 1],
                                **{"from": "cf"}, pos={"index": [2, 7]}),
    "how fast it forgets": trained("layers.*.gla.head.*.gate", "scale", "a", [2, 1]),
    "what a memory is": trained("layers.2.gla.head.1.memory", "set", "x", [4, 8],
                                pos={"index": 6}),
    "mask over what is read": trained("layers.2.gla.head.*.z", "lerp", "w", [2, 1],
                                      **{"from": "cf"}),
    "keys": trained("layers.0.gla.head.0.k", "add", "v", [4], pos="@prompt"),
    "steering behind a cut": {
        "params": {"p": {"shape": [16], "init": 0.2}},
        "steps": [
            {"at": "layers.*.gla.head.*.state", "do": "state_reset", "pos": {"index": 5}},
            {"at": "layers.0.resid.post", "do": "add", "v": {"param": "p"}},
        ],
    },
}  # fmt: skip


def both_ways(family: str, name: str, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The gradient of the oracle, and that by windows cut at random."""
    decoder, rng = recurrent_model(family), random.Random(seed)
    config, program = decoder.config, {"runs": {"cf": {"prompt": "other"}}} | PROGRAMS[name]
    spec = ProgramSpec(parse_program(program), ("p",), Blobs())
    check_trained(spec, config)
    ids = random_ids(seed + 20, LENGTH)
    prompts = {
        "main": words(ids, n_prompt=N_PROMPT),
        "cf": words(random_ids(seed + 21, LENGTH), n_prompt=N_PROMPT),
    }
    resolved = resolve(spec.program, config, prompts, encode=encode)
    values = ProgramParameters(spec, config, decoder.embed)
    labels = torch.full((LENGTH,), -100)
    labels[N_PROMPT - 1 : -1] = torch.tensor(ids[N_PROMPT:])
    (master,) = values.masters.values()
    (row,) = run_program(decoder, resolved, params=values)
    loss = F.cross_entropy(row.logits["main"], labels, reduction="sum")
    loss.backward()
    assert master.grad is not None
    wanted, master.grad = master.grad, None

    cache = allocate_kv_cache(
        config, n_blocks=40, block_size=4, device="cpu", dtype=torch.float64, n_slots=5
    )
    trainer = WindowTrainer(
        decoder,
        cache,
        (),
        {},
        mode="rerun",
        order="window",
        hooks=hooks_from(config, lowest_layer(spec, config)),
    )
    context = Context(torch.float64, torch.device("cpu"), Blobs(), values)
    for slot, one in enumerate(training_runs(resolved, context, max_bytes=1 << 20), 1):
        first_block = 10 * (slot - 1) + 1
        sequence = TrainSequence(
            torch.tensor(one.tokens),
            labels if one.is_main else torch.full_like(labels, -100),
            list(range(first_block, first_block + 4)),
            held_out=not one.is_main,
            edits=one.edits,
        )
        trainer.begin(sequence)
        start = 0
        while start < LENGTH:
            stop = min(LENGTH, start + rng.randint(1, 7))
            trainer.enters(sequence, start, slot)
            taps = EditTaps(config, [EditedSpan(one.edits, 0, 0, range(start, stop))])
            with torch.inference_mode():
                layout = spans_layout([(start, stop, slot)])
                tokens = torch.tensor(one.tokens[start:stop])
                hidden = decoder(tokens, layout, cache, taps=taps)
            trainer.forward_done(sequence, start, stop, hidden.clone())
            start = stop
        assert one.edits.error is None
        one.through()
    while (unit := trainer.next_unit(sequence, rng.randint(1, LENGTH))) is not None:
        trainer.run(sequence, unit)
    assert sequence.loss is not None
    assert float(sequence.loss) == pytest.approx(loss.item(), rel=1e-11)
    assert master.grad is not None
    return master.grad, wanted


@pytest.mark.parametrize("name", PROGRAMS)
@pytest.mark.parametrize("family", RECURRENT)
def test_gradients_are_those_of_the_oracle(family: str, name: str) -> None:
    got, wanted = both_ways(family, name, 1)
    assert wanted.abs().max() > 1e-6
    torch.testing.assert_close(got, wanted, rtol=1e-9, atol=1e-9)


@settings(max_examples=12, deadline=None, phases=[Phase.generate])
@given(
    family=st.sampled_from(sorted(RECURRENT)),
    name=st.sampled_from(sorted(PROGRAMS)),
    seed=st.integers(0, 1000),
)
def test_no_cut_changes_a_gradient(family: str, name: str, seed: int) -> None:
    got, wanted = both_ways(family, name, seed)
    torch.testing.assert_close(got, wanted, rtol=1e-9, atol=1e-9)


def test_keys_are_not_followed_through_states() -> None:
    edge = {"at": "layers.0.gla.edge", "do": "edge_scale", "a": {"param": "p"},
            "from": {"index": 1}, "to": "@all"}  # fmt: skip
    program = {"params": {"p": {"shape": [], "init": 0.5}}, "steps": [edge]}
    with pytest.raises(InvalidRequest, match="follows no keys") as caught:
        check_trained(ProgramSpec(parse_program(program), ("p",)), RECURRENT["gla"])
    assert caught.value.remedy


@pytest.mark.parametrize("family", ["gla-conv", "hybrid"])
def test_a_job_beside_requests_is_the_plain_loop(family: str) -> None:
    cf = {"runs": {"cf": {"prompt": "other"}}}
    program = ProgramSpec(parse_program(cf | PROGRAMS["mask over states"]), ("p",))
    spec = JobSpec(name="found", bypasses=(), steps=3, learning_rate=0.05, program=program)
    config, decoder = RECURRENT[family], recurrent_model(family)
    texts = []
    for seed in range(3):
        ids = random_ids(seed, LENGTH)
        labels = [-100] * (N_PROMPT - 1) + ids[N_PROMPT:] + [-100]
        prompts = {"main": words(ids, n_prompt=N_PROMPT), "cf": words(random_ids(seed + 9, 8))}
        resolved = resolve(program.program, config, prompts, encode=encode)
        texts.append(Text(ids, labels, resolved=resolved))

    values = ProgramParameters(program, config, decoder.embed)
    (master,) = values.masters.values()
    adam, losses = torch.optim.AdamW([master], lr=0.0, weight_decay=0.0), []
    for step, text in enumerate(texts):
        assert text.resolved is not None
        (row,) = run_program(decoder, text.resolved, params=values)
        mean = F.cross_entropy(row.logits["main"], torch.tensor(list(text.labels)))
        losses.append(mean.item())
        mean.backward()
        adam.param_groups[0]["lr"] = learning_rate(spec, step)
        adam.step()
        adam.zero_grad()
        with torch.no_grad():
            master.clamp_(0, 1)

    engine = engine_of(family, **UNHURRIED)
    job = start(engine, spec, Listed(texts))
    beside = [generate(engine, random_ids(seed, 9), None) for seed in range(3)]
    drive(engine, job)
    run(engine, *beside)
    assert job.kinds()[-1] == "succeeded", job.events[-1]
    assert [event["loss"] for event in job.of("step")] == pytest.approx(losses, rel=1e-9)
    got = job.of("published")[-1]["values"]["p"]
    torch.testing.assert_close(got, values.trained()["p"], rtol=1e-8, atol=1e-8)
    for seed, inquiry in enumerate(beside):
        apart = engine_of(family, prefix_cache=False)
        alone = generate(apart, random_ids(seed, 9), None)
        run(apart, alone)
        assert inquiry.logprobs() == pytest.approx(alone.logprobs(), abs=1e-10)
