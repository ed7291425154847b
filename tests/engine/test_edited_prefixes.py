"""Edited prefixes in the cache: whoever asks for the same finds them, nobody else, and the answer
is that of a cold run."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from tests.edits.recurrent_models import RECURRENT, recurrent_model
from tests.edits.small_models import CONFIGS, encode, model, random_ids, words
from tests.engine.drive import Inquiry, ask, run, small_engine

from invivo.edits.apply import Context
from invivo.edits.blobs import Blobs
from invivo.edits.program import parse_program
from invivo.edits.resolve import resolve
from invivo.edits.resolved import Touch
from invivo.edits.selectors import Positions
from invivo.edits.site_names import SiteRef
from invivo.engine.changes import Changes
from invivo.engine.engine import Engine
from invivo.engine.run_edits import RunEdits
from invivo.engine.types import Intervention
from invivo.errors import TooLarge
from invivo.models.cache import bytes_per_block
from invivo.models.load import LoadedModel

BLOCK = 4
N_NEW = 4
GREEDY: dict[str, Any] = {"temperature": 0.0, "ignore_eos": True, "logprobs": 0}
TEXT = random_ids(21, 40)
COUNTER = [random_ids(seed, 8) for seed in (22, 23)]
Program = dict[str, Any]


def engine_of(family: str, **options: Any) -> Engine:
    recurrent = family in RECURRENT
    decoder = recurrent_model(family) if recurrent else model(family)
    loaded = LoadedModel(family, None, decoder.config, decoder, None, family)  # type: ignore[arg-type]
    small: dict[str, Any] = {"block_size": BLOCK, "max_running": 4, "max_batch_tokens": 64}
    if recurrent:
        small["snapshot_tokens"] = 4
    return small_engine(loaded, **(small | options))


def intervention(
    family: str, program: Program, ids: list[int], *, n_new: int, cf: int = 0, v: float = 1.0
) -> Intervention:
    config = (RECURRENT | CONFIGS)[family]
    blobs = Blobs(
        {
            "v": v * torch.linspace(-1, 1, 16, dtype=torch.float64),
            "rows": torch.linspace(-1, 1, 5, dtype=torch.float64)[:, None].expand(5, 16),
        }
    )
    prompts = {"main": words(ids, n_prompt=len(ids), n_new=n_new), "cf": words(COUNTER[cf])}
    data = {"runs": {"cf": {"prompt": "x"}}} | program
    resolved = resolve(parse_program(data), config, prompts, blobs=blobs, encode=encode)
    return Intervention(resolved, blobs)


def generate(
    engine: Engine, ids: list[int], program: Program | None, *, cf: int = 0, v: float = 1.0,
    **more: Any,
) -> Inquiry:  # fmt: skip
    if program is not None:
        more["intervention"] = intervention(
            engine.model.name, program, ids, n_new=N_NEW, cf=cf, v=v
        )
    return ask(engine, ids, max_tokens=N_NEW, **GREEDY, **more)


def run_alone(engine: Engine, ids: list[int], program: Program) -> Inquiry:
    """The program without text."""
    return ask(
        engine, ids, kind="run", intervention=intervention(engine.model.name, program, ids, n_new=0)
    )


def assert_same(got: Inquiry, wanted: Inquiry) -> None:
    assert got.outputs[-1].error is None
    assert got.tokens() == wanted.tokens()
    assert got.logprobs() == pytest.approx(wanted.logprobs(), abs=1e-9)
    ours, theirs = got.outputs[-1].program, wanted.outputs[-1].program
    assert (ours is None) == (theirs is None)
    for mine, cold in zip(ours.rows if ours else (), theirs.rows if theirs else (), strict=True):
        for a, b in zip(mine.captures, cold.captures, strict=True):
            torch.testing.assert_close(a.value, b.value, rtol=1e-9, atol=1e-9)
        for c, d in zip(mine.measures, cold.measures, strict=True):
            torch.testing.assert_close(c.values, d.values, rtol=1e-9, atol=1e-9)


def cold(family: str, ids: list[int], program: Program | None, **more: Any) -> Inquiry:
    engine = engine_of(family, prefix_cache=False)
    got = generate(engine, ids, program, **more)
    run(engine, got)
    return got


def cached(engine: Engine, ids: list[int], program: Program | None, **more: Any) -> int:
    """Tokens that a request finds; its answer is that of a cold run."""
    got = generate(engine, ids, program, **more)
    run(engine, got)
    assert_same(got, cold(engine.model.name, ids, program, **more))
    return got.outputs[-1].cached_tokens


def steer(pos: Any = "@all", at: str = "layers.0.resid.post", **more: Any) -> Program:
    return {"at": at, "pos": pos, "do": "add", "v": "blob:v", **more}


def only(*steps: Program) -> Program:
    return {"steps": list(steps)}


def test_equal_programs_share_and_others_part_where_they_act_differently() -> None:
    engine, ids = engine_of("llama"), TEXT[:18]
    early, late = steer({"range": [2, 5]}), steer({"index": 13}, "layers.1.mlp.out", c=2)
    assert cached(engine, ids, only(early)) == 0
    assert cached(engine, ids, only(early)) == 16
    assert cached(engine, ids, only(early, late)) == 12
    assert cached(engine, ids, only(early, late)) == 16
    assert cached(engine, ids, only(late)) == 0
    assert cached(engine, ids, None) == 12  # what nothing has met yet is plain
    assert cached(engine, ids, only(late)) == 16
    assert cached(engine, ids, only(steer({"range": [2, 4]}))) == 4  # alike at tokens 2 and 3
    assert cached(engine, ids, only(steer({"range": [1, 5]}))) == 0
    assert cached(engine, ids, None) == 16


_RANGES = st.lists(st.integers(0, 40), min_size=2, max_size=6, unique=True).map(
    lambda ends: tuple(zip(sorted(ends)[0::2], sorted(ends)[1::2], strict=False))
)


@settings(max_examples=40, deadline=None)
@given(
    places=st.lists(_RANGES, min_size=1, max_size=3),
    order=st.lists(st.integers(0, 11), min_size=1, max_size=12),
)
def test_a_block_is_marked_alike_whichever_was_asked_before(
    places: list[tuple[tuple[int, int], ...]], order: list[int]
) -> None:
    plan = intervention("llama", {"steps": []}, TEXT[:8], n_new=40).resolved.rows[0].runs["main"]
    ref = SiteRef("resid.post", 0)
    touches = [
        Touch(i, "main", ref, "scale", "affine", Positions(ranges), {"a": float(i)})
        for i, ranges in enumerate(places)
    ]
    context = Context(torch.float64, torch.device("cpu"), Blobs(), {})

    def changes() -> Changes:
        return Changes(plan, touches, context, lambda name, stop: "", BLOCK)

    asked = changes()
    for block in order:
        tokens = range(block * BLOCK, (block + 1) * BLOCK)
        met = any(p in touch.positions for touch in touches for p in tokens)
        assert asked.at(block) == changes().at(block)
        assert (asked.at(block) is not None) == met


def test_a_steered_conversation_goes_on_from_its_own_memory() -> None:
    engine = engine_of("llama")
    first = generate(engine, TEXT[:10], only(steer()))
    run(engine, first)
    longer = TEXT[:10] + first.tokens() + TEXT[14:20]
    assert cached(engine, longer, only(steer())) == 12
    assert cached(engine, longer, only(steer("@generated"))) == 0
    assert cached(engine, longer, only(steer("@prompt"))) == 20 - 4
    assert cached(engine, longer, None) == 16  # of the steered answer's own prompt


def test_tensors_are_told_apart_by_content_and_not_by_name() -> None:
    engine, ids = engine_of("gpt2"), TEXT[:12]
    assert cached(engine, ids, only(steer())) == 0
    assert cached(engine, ids, only(steer()), v=2.0) == 0
    assert cached(engine, ids, only(steer())) == 8
    inline = steer(v=(2.0 * torch.linspace(-1, 1, 16, dtype=torch.float64)).tolist())
    assert cached(engine, ids, only(inline)) == 0
    rows = {"at": "layers.0.resid.post", "do": "set", "x": "blob:rows"}
    assert cached(engine, ids, only(rows | {"pos": {"range": [1, 6]}})) == 0
    assert cached(engine, ids, only(rows | {"pos": {"range": [2, 7]}})) == 0
    assert cached(engine, ids, only(rows | {"pos": {"range": [1, 6]}})) == 8


def test_values_of_other_runs_are_told_apart_by_what_those_are_made_from() -> None:
    engine, ids = engine_of("llama"), TEXT[:12]
    patch = {"at": "layers.1.resid.post", "pos": {"index": [1, 2]}, "do": "replace",
             "from": {"run": "cf", "map": "index", "pos": {"index": [3, 4]}}}  # fmt: skip
    patch["from"] = {"run": "cf", "pos": {"index": [3, 4]}}
    assert cached(engine, ids, only(patch)) == 0
    assert cached(engine, ids, only(patch)) == 8
    assert cached(engine, ids, only(patch), cf=1) == 0
    before = {"run": "cf", **steer({"index": 2})}
    behind = {"run": "cf", **steer({"index": 6})}
    assert cached(engine, ids, only(before, patch)) == 0
    assert cached(engine, ids, only(behind, patch)) == 8  # nothing that is read has changed


@pytest.mark.parametrize(
    ("step", "shares"),
    [
        ({"at": "logits", "do": "add", "v": 0.5}, True),
        ({"at": "layers.2.resid.post", "do": "scale", "a": 2}, True),
        ({"at": "layers.2.attn.head.1.q", "do": "zero"}, True),
        ({"at": "layers.2.mlp", "do": "skip"}, True),
        ({"at": "layers.2.attn.edge", "do": "edge_block", "from": "@first", "to": "@last"}, True),
        ({"at": "layers.2.attn.kvhead.0.k", "do": "zero"}, False),
        ({"at": "layers.2.norm1.scale", "do": "scale", "a": 2}, False),
        ({"at": "layers.1.resid.post", "do": "scale", "a": 2}, False),
        ({"at": "embed.out", "do": "scale", "a": 2}, False),
    ],
)
def test_what_reaches_no_key_leaves_the_plain_prefix(step: Program, shares: bool) -> None:
    engine, ids = engine_of("llama"), TEXT[:12]
    assert cached(engine, ids, None) == 0
    assert cached(engine, ids, only(step)) == 8 * shares
    assert cached(engine, ids, None) == 8


def test_a_program_without_text_shares_with_one_that_writes() -> None:
    engine, ids = engine_of("llama"), TEXT[:14]
    looking = only(steer({"index": 3})) | {"out": [{"capture": "layers.2.resid.post",
                                                   "pos": "@last"}]}  # fmt: skip
    run(engine, run_alone(engine, ids, looking))
    assert cached(engine, ids, only(steer({"index": 3}))) == 12
    before = engine.scheduler.prefix_hits
    run(engine, run_alone(engine, ids, looking))
    assert engine.scheduler.prefix_hits - before == 12
    everything = looking | {"out": [{"capture": "layers.2.resid.post", "pos": {"index": 5}}]}
    assert cached(engine, ids, everything) == 4  # what is looked at is computed again


@pytest.mark.parametrize("at", ["layers.0.attn.edge", "input.mask"])
def test_hidden_keys_are_told_apart_as_far_as_they_are_there(at: str) -> None:
    engine, ids = engine_of("llama"), TEXT[:14]

    def hide(*keys: int, to: Any = None) -> Program:
        to = to or {"range": [4, 8]}
        return only({"at": at, "do": "edge_block", "from": {"index": list(keys)}, "to": to})

    assert cached(engine, ids, hide(1)) == 0
    assert cached(engine, ids, hide(1)) == 12
    assert cached(engine, ids, hide(2)) == 4
    assert cached(engine, ids, hide(1, 9)) == 12  # no query sees that one
    assert cached(engine, ids, hide(1, to="@all")) == 0
    assert cached(engine, ids, None) == 4
    assert cached(engine, ids, hide(9, to="@all")) == 8  # as if it were plain up to there


@pytest.mark.parametrize("fan_out", [True, False])
def test_rows_of_a_sweep_share_what_all_of_them_change(fan_out: bool) -> None:
    ids = TEXT[:20]
    out = [{"capture": "layers.2.resid.post", "pos": "@last"}, {"measure": "prob", "token": 3}]
    sweep = only(steer({"index": 2}), steer("@last", "layers.$L.mlp.out")) | {
        "sweep": {"L": "0..2"}, "out": out}  # fmt: skip
    engine = engine_of("llama", fan_out=fan_out)
    swept = run_alone(engine, ids, sweep)
    run(engine, swept)
    hits = engine.scheduler.prefix_hits
    assert hits >= 2 * 16
    output = swept.outputs[-1].program
    assert output is not None
    apart = engine_of("llama", prefix_cache=False, fan_out=False)
    for layer, row in enumerate(output.rows):
        one = only(steer({"index": 2}), steer("@last", f"layers.{layer}.mlp.out")) | {"out": out}
        alone = run_alone(apart, ids, one)
        run(apart, alone)
        (wanted,) = alone.outputs[-1].program.rows  # type: ignore[union-attr]
        torch.testing.assert_close(row.captures[0].value, wanted.captures[0].value, rtol=1e-9,
                                   atol=1e-9)  # fmt: skip
        torch.testing.assert_close(row.measures[0].values, wanted.measures[0].values, rtol=1e-9,
                                   atol=1e-9)  # fmt: skip
    assert cached(engine, ids, only(steer({"index": 2}))) == 16
    assert cached(engine, ids, None) == 0


@pytest.mark.parametrize("seed", [0, 1])
def test_edited_blocks_that_hold_infinities_hurt_nobody_when_they_are_evicted(seed: int) -> None:
    block = bytes_per_block(CONFIGS["llama"], block_size=BLOCK, dtype=torch.float64)
    engine = engine_of("llama", kv_bytes=9 * block)
    huge = {"at": "layers.*.attn.kvhead.*.v", "do": "scale", "a": 1e300}
    ids = random_ids(30 + seed, 16)
    run(engine, generate(engine, ids, only(huge, huge)))
    for n in (5, 9, 17):
        plain = random_ids(40 + n + seed, n)
        got = generate(engine, plain, None)
        run(engine, got)
        assert_same(got, cold("llama", plain, None))


# Anything at once.

_PLACES = st.sampled_from(
    ["@all", "@prompt", "@generated", "@last", {"range": [1, 4]}, {"range": [3, 9]},
     {"index": [0, 6]}]
)  # fmt: skip
_WHERE = st.sampled_from(
    ["embed.out", "layers.0.resid.post", "layers.1.mlp.out", "layers.*.resid.mid",
     "layers.2.resid.post", "logits"]
)  # fmt: skip
_ROWS = st.sampled_from(
    [{"do": "zero"}, {"do": "scale", "a": 0.5}, {"do": "add", "v": 0.3}, {"do": "noise", "s": 0.2},
     {"do": "clamp", "max": 0.1}]
)  # fmt: skip
_ATTENTION = st.sampled_from(
    [
        {"at": "layers.1.attn.edge", "do": "edge_block", "from": {"range": [1, 3]}, "to": "@all"},
        {"at": "layers.0.attn.edge", "do": "edge_scale", "a": 0.3, "from": "@prompt", "to": "@all"},
        {"at": "input.mask", "do": "edge_block", "from": {"index": 2}, "to": {"range": [4, 9]}},
        {"at": "layers.1.attn.kvhead.0.k", "do": "scale", "a": 2, "pos": {"index": 4}},
    ]
)
_READING = st.sampled_from(
    [
        {"at": "layers.0.resid.post", "pos": {"range": [2, 5]}, "do": "replace",
         "from": {"run": "cf", "pos": {"range": [1, 4]}}},
        {"at": "layers.1.mlp.out", "pos": "@last", "do": "lerp", "w": 0.3,
         "from": {"run": "cf", "pos": {"index": 5}}},
        {"at": "layers.1.resid.post", "pos": {"index": 7}, "do": "replace",
         "from": {"run": "plain", "pos": {"index": 3}}},
        {"run": "cf", "at": "layers.0.mlp.out", "pos": {"index": 2}, "do": "zero"},
    ]
)  # fmt: skip
_STATES = st.sampled_from(
    [
        {"at": "layers.0.gla.head.*.state", "pos": {"index": 4}, "do": "state_reset"},
        {"at": "layers.2.gla.head.0.state", "pos": "@all", "do": "scale", "a": 0.5},
        {"at": "layers.2.gla.head.1.k", "pos": {"range": [3, 7]}, "do": "zero"},
        {"at": "layers.0.gla.head.*.gate", "pos": "@prompt", "do": "scale", "a": 0.5},
    ]
)
_EDIT = st.tuples(_WHERE, _PLACES, _ROWS).map(lambda d: {"at": d[0], "pos": d[1], **d[2]})
_OUT = st.sampled_from(
    [
        [],
        [],
        [{"capture": "layers.1.resid.post", "pos": "@last"}],
        [{"capture": "layers.1.resid.post", "pos": {"index": 5}},
         {"measure": "logprob", "token": 5, "pos": "@all"}],
    ]
)  # fmt: skip


def programs(special: st.SearchStrategy[Program]) -> st.SearchStrategy[Program]:
    steps = st.lists(st.one_of(_EDIT, _EDIT, special), min_size=1, max_size=2)
    return st.builds(lambda s, out: {"steps": s, "out": out}, steps, _OUT)


def variants(program: Program) -> list[Program | None]:
    """Programs that are easily taken for each other, and none at all."""
    found: list[Program | None] = [program, None, program | {"out": []}]
    for i, step in enumerate(program["steps"]):
        for key, value in step.items():
            other: Any = None
            if key in ("a", "v", "s", "max", "w"):
                other = value + 0.25
            elif key == "from" and "run" in value:
                other = value | {"run": "plain" if value["run"] == "cf" else "cf"}
            elif key == "from" or (key == "pos" and "from" not in step):
                other = {"index": [2, 3]}
            if other is not None:
                steps = [*program["steps"]]
                steps[i] = step | {key: other}
                found.append(program | {"steps": steps})
    return found


_TEXTS = st.builds(
    lambda n, other: [*TEXT[: n - other], *random_ids(50, other)],
    st.sampled_from([9, 13, 17]),
    st.sampled_from([0, 0, 3]),
)
_COLD: dict[str, Inquiry] = {}


def _cold(family: str, ids: list[int], program: Program | None, cf: int) -> Inquiry:
    key = repr((family, ids, program, cf))
    if key not in _COLD:
        _COLD[key] = cold(family, ids, program, cf=cf)
    return _COLD[key]


@settings(
    max_examples=20,
    deadline=None,
    phases=[Phase.generate],
    suppress_health_check=list(HealthCheck),
)
@given(data=st.data())
def test_any_load_answers_as_if_nothing_were_cached(data: st.DataObject) -> None:
    """Prompts that begin alike, programs drawn again and again, plain requests between them, in
    memory for all or for hardly any of them (then sequences are preempted and blocks evicted)."""
    family = data.draw(st.sampled_from(["llama", "gemma", "gpt2", "moe", "gla", "hybrid"]))
    recurrent = family in RECURRENT
    special = _STATES if recurrent else st.one_of(_ATTENTION, _READING)
    first = data.draw(programs(special))
    drawn = data.draw(st.lists(st.sampled_from(variants(first)), min_size=1, max_size=3))
    drawn += [first, first]
    options: dict[str, Any] = {"max_batch_tokens": data.draw(st.sampled_from([5, 64]))}
    options["overlap"] = data.draw(st.booleans())  # as on a GPU: a step ahead of its tokens
    n_blocks = data.draw(st.sampled_from([8, 60, 60]))
    if not recurrent:
        size = bytes_per_block(CONFIGS[family], block_size=BLOCK, dtype=torch.float64)
        options["kv_bytes"] = n_blocks * size
    engine = engine_of(family, **options)
    for _ in range(3):
        asked = []
        for _ in range(data.draw(st.integers(2, 3))):
            ids, program = data.draw(_TEXTS), data.draw(st.sampled_from(drawn))
            cf = data.draw(st.sampled_from([0, 0, 1]))
            asked.append((generate(engine, ids, program, cf=cf), program, cf))
        run(engine, *[got for got, _, _ in asked])
        for got, program, cf in asked:
            assert_same(got, _cold(family, list(got.request.tokens), program, cf))


@pytest.mark.parametrize("family", list(RECURRENT))
def test_edited_states_are_taken_over_as_snapshots(family: str) -> None:
    engine, ids = engine_of(family), TEXT[:18]
    reset = {"at": "layers.0.gla.head.*.state", "pos": {"index": 3}, "do": "state_reset"}
    late = {"at": "layers.2.gla.head.1.k", "pos": {"index": 17}, "do": "zero"}
    assert cached(engine, ids, only(reset)) == 0
    assert cached(engine, ids, only(reset)) == 16
    assert cached(engine, ids, only(reset, late)) == 16
    assert cached(engine, ids, None) == 0
    assert cached(engine, ids, only(reset)) == 16


def test_who_shares_what_failed_ends_with_it_and_who_does_not_goes_on(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Both are in one step with the run that fails; one of them has its blocks."""
    ids, failing = TEXT[:14], only(steer({"range": [2, 5]}), steer({"index": 13}, c=3))
    engine = engine_of("llama")
    real = RunEdits._changed

    def breaking(self: RunEdits, touch: Touch, *rest: Any) -> torch.Tensor:
        if self.plan.touches[-1].args.get("c") == 3 and touch.positions.first == 2:
            raise TooLarge("no room", field="interventions")
        return real(self, touch, *rest)

    monkeypatch.setattr(RunEdits, "_changed", breaking)
    broken = generate(engine, ids, failing)
    sharing = generate(engine, ids, only(steer({"range": [2, 5]})))
    apart = generate(engine, ids, only(steer({"range": [2, 6]}, c=2)))
    run(engine, broken, sharing, apart)
    assert [inquiry.outputs[-1].finish_reason for inquiry in (broken, sharing)] == ["error"] * 2
    assert_same(apart, cold("llama", ids, only(steer({"range": [2, 6]}, c=2))))
    monkeypatch.undo()
    assert cached(engine, ids, only(steer({"range": [2, 5]}))) == 0
    assert cached(engine, ids, failing) == 12
