"""Placing bypasses on a sharded model: known candidates, their ranking, each carried out."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from invivo.errors import InvalidRequest
from invivo.sharding.parallel_plan import (
    Backbone,
    Candidate,
    Linear,
    Mesh,
    Stage,
    State,
    Weight,
    adapter_stages,
    ia3_stages,
    lora_stages,
    plan_parallel,
    sent_share,
)

COLUMN = (State.REPLICATED, State.FEATURES)
ROW = (State.FEATURES, State.PARTIAL)


def plan(
    stages: tuple[Stage, ...], states: tuple[State, State], tokens: int, mesh: Mesh
) -> tuple[Candidate, ...]:
    return plan_parallel(stages, Backbone(*states, tokens), mesh)


def outline(candidate: Candidate) -> tuple[tuple[str, str], ...]:
    """Weights' states and what is sent."""
    weights = tuple((name, w.value) for name, w in candidate.weights.items())
    return weights + candidate.transfers


REPLICATED_A = (("A", "[=, =]"), ("B", "[-, |]"))
PARTIAL_A = (("A", "[|, -]"), ("B", "[-, |]"), ("all-reduce", "A'"))
TOKENS_TO_THE_END = (("A", "[=, =]"), ("B", "[=, =]"), ("all-to-all", "Y"))
TOKENS_TO_THE_RANK = (("A", "[=, =]"), ("B", "[-, |]"), ("all-gather", "A'"))


def test_lora_beside_a_column_parallel_linear_has_the_four_known_candidates() -> None:
    found = plan(lora_stages(4096, 14336, 16), COLUMN, 512, Mesh(4))
    assert {outline(c) for c in found} == {
        REPLICATED_A,
        PARTIAL_A,
        TOKENS_TO_THE_END,
        TOKENS_TO_THE_RANK,
    }
    assert len(found) == 4
    assert [c.seconds for c in found] == sorted(c.seconds for c in found)


def test_ranking_changes_with_rank_tokens_and_bandwidth() -> None:
    def best(rank: int, tokens: int, link: float, d_out: int = 4096) -> tuple[tuple[str, str], ...]:
        mesh = Mesh(8, link=link, link_latency=10e-6)
        return outline(plan(lora_stages(8192, d_out, rank), COLUMN, tokens, mesh)[0])

    # Few tokens: no transfer is worth its latency.
    assert best(16, 64, 400e9) == REPLICATED_A
    # Many tokens and a large rank: A on every device costs more than moving the narrow tensor.
    assert best(256, 16_384, 400e9) == TOKENS_TO_THE_RANK
    # The same with a smaller rank, or with a slow link: stay without transfers.
    assert best(16, 16_384, 10e9) == REPLICATED_A
    assert best(256, 16_384, 5e9) == REPLICATED_A
    # A rank wider than a device's share of the output: better move the output.
    assert best(1024, 16_384, 400e9, d_out=1024) == TOKENS_TO_THE_END


def test_costs_are_those_of_the_closed_form() -> None:
    mesh = Mesh(4, flops=1e12, memory=1e30, link=1e9, link_latency=1e-3, launch=1e-4)
    found = {outline(c): c for c in plan(lora_stages(64, 32, 8), COLUMN, 100, mesh)}
    none = found[REPLICATED_A]
    assert none.flops == 2 * 100 * 8 * (64 + 32 / 4)
    assert none.weight_bytes == 2 * 8 * (64 + 32 / 4)
    assert none.seconds == pytest.approx(none.flops / 1e12 + 2e-4)
    reduced = found[PARTIAL_A]
    assert reduced.flops == 2 * 100 * 8 * (64 + 32) / 4
    assert reduced.sent_bytes == 2 * 3 / 4 * 100 * 8 * 2
    assert reduced.seconds == pytest.approx(
        reduced.flops / 1e12 + 2e-4 + reduced.sent_bytes / 1e9 + 1e-3
    )
    assert found[TOKENS_TO_THE_END].sent_bytes == 3 / 16 * 100 * 32 * 2
    assert found[TOKENS_TO_THE_RANK].sent_bytes == 3 / 4 * 100 * 8 * 2


def test_lora_beside_a_row_parallel_linear_lets_the_backbone_reduce() -> None:
    found = plan(lora_stages(14336, 4096, 16), ROW, 512, Mesh(4))
    best = found[0]
    assert best.weights == {"A": Weight.ROWS, "B": Weight.REPLICATED}
    assert best.transfers == ()
    others = {c.transfers for c in found[1:]}
    assert others == {(("all-reduce", "A'"),), (("reduce-scatter", "A'"),), (("all-to-all", "X"),)}
    # After the backbone's all-reduce nothing can be deferred: the narrow tensor is reduced.
    after = plan(lora_stages(14336, 4096, 16), (State.FEATURES, State.REPLICATED), 512, Mesh(4))
    assert after[0].transfers == (("all-reduce", "A'"),)


def test_one_device_leaves_nothing_to_choose() -> None:
    for stages in (lora_stages(64, 32, 4), adapter_stages(64, 8), ia3_stages(64)):
        for states in (COLUMN, ROW):
            (only,) = plan(stages, states, 10, Mesh(1))
            assert only.transfers == ()
            assert all(w is Weight.WHOLE for w in only.weights.values())


def test_adapter_and_ia3_need_nothing_where_their_tensor_is_replicated_or_split() -> None:
    for state in (State.REPLICATED, State.TOKENS):
        assert plan(adapter_stages(64, 8), (state, state), 10, Mesh(4))[0].transfers == ()
    for state in (State.REPLICATED, State.TOKENS, State.FEATURES, State.PARTIAL):
        assert plan(ia3_stages(64), (state, state), 10, Mesh(4))[0].transfers == ()


def test_an_activation_never_sees_partial_sums() -> None:
    for states in ((State.FEATURES, State.REPLICATED), ROW, COLUMN):
        for candidate in plan(adapter_stages(64, 8), states, 10, Mesh(4)):
            steps = [s for s in candidate.steps if s.what == "act"]
            assert all(s.state is not State.PARTIAL for s in steps)


def test_wrong_requests_are_refused() -> None:
    with pytest.raises(InvalidRequest, match=r"mesh\.devices"):
        plan(lora_stages(8, 8, 2), COLUMN, 10, Mesh(0))
    with pytest.raises(InvalidRequest, match=r"backbone\.tokens"):
        plan(lora_stages(8, 8, 2), COLUMN, 0, Mesh(2))
    with pytest.raises(InvalidRequest, match=r"backbone\.y"):
        plan(lora_stages(8, 8, 2), (State.REPLICATED, State.WHOLE), 10, Mesh(2))


# --- each candidate is carried out on simulated devices ------------------------------------------
def shards(full: np.ndarray, state: State, n: int) -> list[np.ndarray]:
    """One array a device."""
    if state is State.WHOLE:
        return [full] + [np.full_like(full, np.nan)] * (n - 1)
    if state is State.REPLICATED:
        return [full] * n
    if state is State.PARTIAL:
        noise = [np.random.default_rng(i).normal(size=full.shape) for i in range(n - 1)]
        return [*noise, full - sum(noise)]
    return np.split(full, n, axis=0 if state is State.TOKENS else 1)


def joined(parts: list[np.ndarray], state: State) -> np.ndarray:
    if state is State.WHOLE:
        return parts[0]
    if state is State.REPLICATED:
        for part in parts[1:]:
            np.testing.assert_allclose(part, parts[0])
        return parts[0]
    if state is State.PARTIAL:
        return np.sum(parts, axis=0)
    return np.concatenate(parts, axis=0 if state is State.TOKENS else 1)


def weight_shards(full: np.ndarray, weight: Weight, n: int) -> list[np.ndarray]:
    if weight is Weight.ROWS:
        return np.split(full, n, axis=0)
    if weight is Weight.COLUMNS:
        return np.split(full, n, axis=-1)
    return [full] * n


def carried_out(
    candidate: Candidate, stages: tuple[Stage, ...], weights: list[np.ndarray], x: np.ndarray,
    start: State, n: int,
) -> tuple[np.ndarray, State]:  # fmt: skip
    parts, state = shards(x, start, n), start
    by_name = dict(zip((s.name for s in stages), zip(stages, weights, strict=True), strict=True))
    for step in candidate.steps:
        if step.weight is None:
            # A transfer changes how a tensor lies, never its value.
            parts = shards(joined(parts, state), step.state, n)
        else:
            stage, full = by_name[step.what]
            if isinstance(stage, Linear):
                local = weight_shards(full, step.weight, n)
                parts = [p @ w for p, w in zip(parts, local, strict=True)]
            elif stage.linear:
                local = weight_shards(full, step.weight, n)
                parts = [p * w for p, w in zip(parts, local, strict=True)]
            else:
                parts = [np.maximum(p, 0) for p in parts]
        state = step.state
    return joined(parts, state), state


KINDS = {
    "lora": lora_stages(8, 16, 3),
    "adapter": adapter_stages(8, 3),
    "ia3": ia3_stages(8),
}


@settings(max_examples=60, deadline=None)
@given(
    kind=st.sampled_from(sorted(KINDS)),
    x=st.sampled_from(list(State)),
    y=st.sampled_from([s for s in State if s is not State.WHOLE]),
    n=st.sampled_from([2, 4]),
)
def test_every_candidate_computes_the_bypass_and_ends_where_the_backbone_wants_it(
    kind: str, x: State, y: State, n: int
) -> None:
    stages = KINDS[kind]
    rng = np.random.default_rng(0)
    given_x = rng.normal(size=(8, 8))
    weights, expected = [], given_x
    for stage in stages:
        if isinstance(stage, Linear):
            weights.append(rng.normal(size=(stage.d_in, stage.d_out)))
            expected = expected @ weights[-1]
        else:
            weights.append(rng.normal(size=stage.width))
            expected = expected * weights[-1] if stage.linear else np.maximum(expected, 0)
    try:
        found = plan(stages, (x, y), 8, Mesh(n))
    except InvalidRequest:
        # Only a tensor that is not split cannot become a partial sum within one transfer.
        assert y is State.PARTIAL
        return
    for candidate in found:
        with np.errstate(invalid="ignore"):
            result, state = carried_out(candidate, stages, weights, given_x, x, n)
        assert state is y
        np.testing.assert_allclose(result, expected)


@given(n=st.integers(2, 64))
def test_reducing_and_gathering_cost_as_much_as_their_parts(n: int) -> None:
    gather = sent_share("all-gather", State.TOKENS, n)
    scatter = sent_share("reduce-scatter", State.PARTIAL, n)
    assert sent_share("all-reduce", State.PARTIAL, n) == pytest.approx(gather + scatter)
    assert sent_share("all-to-all", State.TOKENS, n) < gather
