"""Every operation does what its line in the table says, at the rows it names and nowhere else."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from tests.edits.small_models import (
    MAIN,
    OTHER,
    captured,
    close,
    model,
    plain_logits,
    run,
    run_rows,
    words,
)

from invivo.edits.blobs import Blobs
from invivo.errors import InvalidRequest

SITE = "layers.1.attn.head.2.z"
LLAMA, MOE = model("llama"), model("moe")
GENERATOR = torch.Generator().manual_seed(0)
V = torch.randn(4, generator=GENERATOR, dtype=torch.float64)
BASIS = torch.linalg.qr(torch.randn(4, 2, generator=GENERATOR, dtype=torch.float64))[0].T
POOL = torch.randn(6, 3, 1, 4, generator=GENERATOR, dtype=torch.float64)
BLOBS = Blobs(
    {
        "v": V,
        "b": BASIS,
        "rows": torch.randn(3, 1, 4, generator=GENERATOR).double(),
        "pool": POOL,
        "drawn": POOL[:, 0],
        "one": V.expand(5, 1, 4),
    }
)


def value(step: dict[str, Any], *, run_name: str = "main", **more: Any) -> torch.Tensor:
    """The site after the step: [9, 4]."""
    program = {
        "steps": [{"at": SITE, **step}] if step else [],
        "out": [{"capture": SITE, "run": run_name}],
        **more,
    }
    return run(LLAMA, program, blobs=BLOBS).captures[0].value[:, 0]


OWN, THEIRS = value({}), value({}, run_name="cf")
ROWS = [2, 3, 4]
POS = {"range": [2, 5]}


@pytest.mark.parametrize(
    ("step", "expected"),
    [
        ({"do": "zero"}, torch.zeros(3, 4).double()),
        ({"do": "scale", "a": 2.5}, 2.5 * OWN[ROWS]),
        ({"do": "scale", "a": [1, 2, 3, 4]}, OWN[ROWS] * torch.tensor([1, 2, 3, 4])),
        ({"do": "add", "v": "blob:v"}, OWN[ROWS] + V),
        ({"do": "add", "v": "blob:v", "c": -2}, OWN[ROWS] - 2 * V),
        ({"do": "add", "v": "blob:rows"}, OWN[ROWS] + BLOBS.get("rows", "")[:, 0]),
        ({"do": "set", "x": 7}, torch.full((3, 4), 7.0).double()),
        ({"do": "set", "x": "blob:v"}, V.expand(3, 4)),
        ({"do": "clamp", "min": -0.1, "max": 0.2}, OWN[ROWS].clamp(-0.1, 0.2)),
        ({"do": "clamp", "max": 0}, OWN[ROWS].clamp(max=0)),
        ({"do": "replace", "from": "cf"}, THEIRS[ROWS]),
        ({"do": "replace", "from": {"run": "cf", "pos": {"range": [4, 7]}}}, THEIRS[4:7]),
        ({"do": "replace", "from": {"run": "cf", "pos": "@last", "map": "one"}}, THEIRS[[8] * 3]),
        ({"do": "replace", "from": {"run": "main", "pos": "@first", "map": "one"}}, OWN[[0] * 3]),
        ({"do": "replace", "from": "blob:v"}, V.expand(3, 4)),
        ({"do": "lerp", "w": 0.25, "from": "cf"}, 0.25 * OWN[ROWS] + 0.75 * THEIRS[ROWS]),
        ({"do": "mean", "over": ["cf", "plain"], "positions": "each"}, (OWN + THEIRS)[ROWS] / 2),
        ({"do": "mean", "over": ["cf"], "positions": "all"}, THEIRS[ROWS].mean(0).expand(3, 4)),
        ({"do": "resample", "pool": ["cf"], "seed": 3}, THEIRS[ROWS]),
        ({"do": "mean", "over": "blob:pool", "positions": "each"}, POOL.mean(0)[:, 0]),
        ({"do": "mean", "over": "blob:pool", "positions": "all"}, POOL.mean((0, 1)).expand(3, 4)),
        ({"do": "resample", "pool": "blob:one", "seed": 2}, V.expand(3, 4)),
        ({"do": "freeze", "to": "cf"}, THEIRS[ROWS]),
        ({"do": "project_out", "basis": "blob:b"}, OWN[ROWS] - OWN[ROWS] @ BASIS.T @ BASIS),
    ],
    ids=lambda p: p["do"] if isinstance(p, dict) else "",
)
def test_rows_become_what_the_operation_says(step: dict[str, Any], expected: torch.Tensor) -> None:
    after = value({**step, "pos": POS})
    close(after[ROWS], expected)
    others = [i for i in range(9) if i not in ROWS]
    assert torch.equal(after[others], OWN[others])


def test_coordinates_in_a_basis_are_set_and_swapped() -> None:
    after = value({"do": "set_coords", "basis": "blob:b", "c": [0.5, -1]})
    close(after @ BASIS.T, torch.tensor([0.5, -1.0]).double().expand(9, 2))
    rest = torch.eye(4) - BASIS.T @ BASIS
    close(after @ rest, OWN @ rest)
    swapped = value({"do": "swap_coords", "basis": "blob:b", "from": "cf"})
    close(swapped @ BASIS.T, THEIRS @ BASIS.T)
    close(swapped @ rest, OWN @ rest)


def test_noise_depends_on_its_seed_and_place_alone() -> None:
    step = {"do": "noise", "s": 0.5, "seed": 1}
    noise = value(step) - OWN
    close(value({**step, "pos": POS})[ROWS] - OWN[ROWS], noise[ROWS])
    both = {"at": "layers.1.attn.head.*.z", **step}
    result = run(LLAMA, {"steps": [both], "out": [{"capture": SITE}]})
    close(result.captures[0].value[:, 0] - OWN, noise)
    assert (value({**step, "seed": 2}) - OWN - noise).abs().max() > 0.1
    assert 0.3 < float(noise.std()) < 0.7


def test_rows_of_a_tensor_are_drawn_by_seed_and_place_alone() -> None:
    step = {"do": "resample", "pool": "blob:drawn", "seed": 1}
    drawn = value(step)
    rows = [int((POOL[:, 0, 0] == row).all(-1).nonzero()) for row in drawn]  # each is one of them
    assert len(set(rows)) > 1
    assert torch.equal(value({**step, "pos": POS})[ROWS], drawn[ROWS])
    assert not torch.equal(value({**step, "seed": 2}), drawn)
    whole = {"at": "layers.1.attn.head.*.z", **step}
    heads = run(LLAMA, {"steps": [whole], "out": [{"capture": SITE}]}, blobs=BLOBS)
    assert torch.equal(heads.captures[0].value[:, 0], drawn)  # heads share the row


def test_the_mean_of_what_runs_left_is_the_mean_over_these_runs() -> None:
    runs = ["cf", "plain"]
    left = [value({}, run_name=name)[ROWS] for name in runs]
    blobs = Blobs({"left": torch.stack(left)[:, :, None]})
    for positions in ("each", "all"):
        after = [
            run(
                LLAMA,
                {"steps": [{"at": SITE, "do": "mean", "over": over, "positions": positions}
                           | {"pos": POS}]},
                blobs=blobs,
            ).logits["main"]
            for over in (runs, "blob:left")
        ]  # fmt: skip
        close(*after)


@pytest.mark.parametrize(
    ("step", "field"),
    [
        ({"do": "resample", "pool": "blob:pool"}, "steps[0].pool"),  # one dimension too many
        ({"do": "resample", "pool": "blob:v"}, "steps[0].pool"),  # one too few
        ({"do": "resample", "pool": "blob:nobody"}, "steps[0].pool"),
        ({"do": "resample", "pool": "blob:drawn", "map": "end"}, "steps[0].map"),
        ({"do": "mean", "over": "blob:drawn", "positions": "each"}, "steps[0].over"),
        ({"do": "mean", "over": "cf", "positions": "each"}, "steps[0].over"),
    ],
)
def test_a_tensor_that_does_not_fit_is_refused(step: dict[str, Any], field: str) -> None:
    with pytest.raises(InvalidRequest) as refused:
        value({**step, "pos": POS})
    assert refused.value.field == field


def test_single_numbers_of_a_site_can_be_touched() -> None:
    neurons = {"at": "layers.1.mlp.neuron[3,5]", "do": "set", "x": [1, 2]}
    result = run(LLAMA, {"steps": [neurons], "out": [{"capture": "layers.1.mlp.neuron"}]})
    plain = run(LLAMA, {"out": [{"capture": "layers.1.mlp.neuron"}]}).captures[0].value
    after = result.captures[0].value
    assert torch.equal(after[:, [3, 5]], torch.tensor([[1.0, 2.0]]).double().expand(9, 2))
    kept = [i for i in range(24) if i not in (3, 5)]
    assert torch.equal(after[:, kept], plain[:, kept])


def test_steps_at_one_site_go_in_the_order_written() -> None:
    add, scale = {"at": SITE, "do": "add", "v": 1}, {"at": SITE, "do": "scale", "a": 2}
    out = [{"capture": SITE}, {"capture": SITE, "when": "before"}]
    one = run(LLAMA, {"steps": [add, scale], "out": out}).captures
    other = run(LLAMA, {"steps": [scale, add], "out": out}).captures
    close(one[0].value[:, 0], 2 * (OWN + 1))
    close(other[0].value[:, 0], 2 * OWN + 1)
    close(one[1].value[:, 0], OWN)


# Attention.


def pattern(steps: list[dict[str, Any]], layer: int = 1) -> torch.Tensor:
    """[T, H, K] probabilities after the steps."""
    out = [{"capture": f"layers.{layer}.attn.head.*.prob"}]
    return run(LLAMA, {"steps": steps, "out": out}).captures[0].value


def test_blocked_edges_get_no_attention_and_the_rest_shares_it() -> None:
    edge = {"from": {"range": [1, 3]}, "to": {"index": [5, 6]}}
    plain = pattern([])
    after = pattern([{"at": "layers.1.attn.edge", "do": "edge_block", **edge}])
    expected = plain.clone()
    expected[5:7, :, 1:3] = 0
    close(after, expected / expected.sum(-1, keepdim=True))
    left = pattern(
        [{"at": "layers.1.attn.head.2.edge", "do": "edge_block", "renormalise": False, **edge}]
    )
    expected = plain.clone()
    expected[5:7, 2, 1:3] = 0
    close(left, expected)


def test_only_the_named_edges_are_left() -> None:
    edge = {"from": {"range": [1, 3]}, "to": {"index": 5}}
    after = pattern([{"at": "layers.1.attn.head.1.edge", "do": "edge_only", **edge}])
    plain = pattern([])
    expected = plain[5, 1, 1:3] / plain[5, 1, 1:3].sum()
    close(after[5, 1, 1:3], expected)
    close(after[5, 1].sum(), torch.ones(()).double())
    assert torch.equal(after[:, [0, 2, 3]], plain[:, [0, 2, 3]])
    assert torch.equal(after[[4, 6]], plain[[4, 6]])


def test_scaled_edges_are_scaled_after_the_softmax() -> None:
    step = {
        "at": "layers.1.attn.head.0.edge",
        "do": "edge_scale",
        "a": 0.5,
        "from": {"index": 0},
        "to": "@all",
    }
    plain, after = pattern([]), pattern([step])
    close(after[:, 0, 0], 0.5 * plain[:, 0, 0])
    close(after[:, 0, 1:], plain[:, 0, 1:])
    close(after[:, 1:], plain[:, 1:])
    normal = pattern([{**step, "renormalise": True}])
    close(normal.sum(-1), torch.ones(9, 4).double())


def test_a_row_without_any_edge_mixes_nothing() -> None:
    block = {"at": "layers.0.attn.head.1.edge", "do": "edge_block", "from": "@all", "to": "@all"}
    zero = {"at": "layers.0.attn.head.1.z", "do": "zero"}
    close(
        run(LLAMA, {"steps": [block]}).logits["main"], run(LLAMA, {"steps": [zero]}).logits["main"]
    )
    for flag in (False, True):
        none = {**block, "do": "edge_scale", "a": 0, "renormalise": flag}
        got = run(LLAMA, {"steps": [none]}).logits["main"]
        close(got, run(LLAMA, {"steps": [zero]}).logits["main"])


def test_hiding_a_prefix_is_the_prompt_without_it() -> None:
    """A mask and position numbers of its own make the end of a prompt a prompt."""
    steps = [
        {
            "at": "input.mask",
            "do": "edge_block",
            "from": {"range": [0, 3]},
            "to": {"range": [3, 9]},
        },
        {
            "at": "input.position",
            "do": "set_positions",
            "pos": {"range": [3, 9]},
            "values": list(range(6)),
        },
    ]
    for name in ("llama", "gpt2", "gemma"):
        decoder = model(name)
        alone = plain_logits(decoder, words(MAIN.ids[3:]))
        close(run(decoder, {"steps": steps}).logits["main"][3:], alone)


def test_tokens_can_be_exchanged() -> None:
    step = {"at": "input.tokens", "do": "set_tokens", "ids": list(OTHER.ids)}
    assert torch.equal(run(LLAMA, {"steps": [step]}).logits["main"], plain_logits(LLAMA, OTHER))


def test_windows_count_position_numbers() -> None:
    decoder = model("gemma")  # windows of 5
    wide = [0, 10, 20, 30, 40, 41, 42, 43, 44]
    step = {"at": "input.position", "do": "set_positions", "values": wide}
    out = [{"capture": "layers.0.attn.head.*.prob"}]
    probs = run(decoder, {"steps": [step], "out": out}).captures[0].value
    assert torch.equal(probs[3, 0, :4] > 0, torch.tensor([False, False, False, True]))
    assert (probs[8, 0, 4:9] > 0).all()
    assert (probs[8, 0, :4] == 0).all()


# Mixtures of experts.


def weights(step: dict[str, Any] | None, layer: int = 0) -> torch.Tensor:
    program = {
        "steps": [step] if step else [],
        "out": [{"capture": f"layers.{layer}.moe.expert.*.weight"}],
    }
    return run(MOE, program).captures[0].value


def test_experts_are_switched_off() -> None:
    plain = weights(None)
    assert ((plain > 0).sum(-1) == 2).all()
    step = {"at": "layers.0.moe.expert.1.on", "do": "expert_off", "renormalise": False}
    off = weights(step)
    assert (off[:, 1] == 0).all()
    assert torch.equal(off[:, [0, 2, 3]], plain[:, [0, 2, 3]])
    shared = weights({**step, "renormalise": True})
    close(shared.sum(-1), plain.sum(-1))
    others = weights({**step, "reroute": True})
    assert (others[:, 1] == 0).all()
    assert ((others > 0).sum(-1) == 2).all()


def test_experts_are_switched_on_with_the_routers_weight() -> None:
    plain = weights(None)
    step = {"at": "layers.0.moe.expert.1.on", "do": "expert_on", "renormalise": False}
    on = weights(step)
    router = run(MOE, {"out": [{"capture": "layers.0.moe.router"}]}).captures[0].value
    close(on[:, 1], torch.softmax(router, -1)[:, 1])
    chosen = plain[:, 1] > 0
    assert torch.equal(on[chosen], plain[chosen])
    close(weights({**step, "renormalise": True}).sum(-1), plain.sum(-1))


def test_experts_are_forced() -> None:
    step = {"at": "layers.0.moe.expert.[1,2].on", "do": "expert_force", "pos": {"range": [0, 4]}}
    forced, plain = weights(step), weights(None)
    assert (forced[:4, [0, 3]] == 0).all()
    assert (forced[:4, [1, 2]] > 0).all()
    assert torch.equal(forced[4:], plain[4:])


def test_the_router_can_be_pushed() -> None:
    push = {"at": "layers.0.moe.router", "do": "router_add", "v": [0, 0, 0, 100]}
    assert (weights(push)[:, 3] > 0.99).all()


# Blocks.


def test_skipped_layers_write_nothing() -> None:
    out = [{"capture": f"layers.1.resid.{part}", "name": part} for part in ("pre", "mid", "post")]

    def stream(at: str) -> list[torch.Tensor]:
        result = run(LLAMA, {"steps": [{"at": at, "do": "skip"}], "out": out})
        return [captured(result, part)[1] for part in ("pre", "mid", "post")]

    pre, mid, post = stream("layers.1")
    assert torch.equal(pre, mid)
    assert torch.equal(mid, post)
    pre, mid, post = stream("layers.1.attn")
    assert torch.equal(pre, mid)
    assert not torch.equal(mid, post)


def test_stopping_gives_what_the_whole_run_gives_up_to_there() -> None:
    out = [{"capture": "layers.0-1.resid.post", "reduce": "lens", "top": 3}]
    whole = run(LLAMA, {"out": out})
    short = run(LLAMA, {"steps": [{"at": "layers.1", "do": "stop"}], "out": out})
    assert short.logits == {}
    for a, b in zip(short.captures, whole.captures, strict=True):
        assert torch.equal(a.value, b.value)
        assert a.tokens is not None
        assert b.tokens is not None
        assert torch.equal(a.tokens, b.tokens)


# Runs.


def test_path_patching_is_a_run_of_its_own() -> None:
    """Freeze the heads, replace a sender, and let the receiver alone see the difference."""
    sender, receiver = "layers.0.attn.head.1.z", "layers.2.attn.head.3.q"
    program = {
        "runs": {"cf": {"prompt": "other"}, "sent": {"same": "main"}},
        "steps": [
            {"run": "sent", "at": "layers.*.attn.head.*.z", "do": "freeze"},
            {"run": "sent", "at": sender, "pos": "@last", "do": "replace", "from": "cf"},
            {"at": receiver, "do": "replace", "from": "sent"},
        ],
        "out": [{"capture": receiver}, {"capture": receiver, "run": "sent"}],
    }
    result = run(LLAMA, program, {"main": MAIN, "cf": OTHER})
    mine, sent = (c.value for c in result.captures)
    assert torch.equal(mine, sent)
    assert (result.logits["main"] - plain_logits(LLAMA)).abs().max() > 1e-6
    # By hand: what the receiver would see, put there as a tensor.
    direct = {"at": receiver, "do": "replace", "from": "blob:q"}
    by_hand = run(LLAMA, {"steps": [direct]}, blobs=Blobs({"q": sent}))
    assert torch.equal(by_hand.logits["main"], result.logits["main"])


def test_freezing_leaves_out_what_it_is_told_to() -> None:
    zero = {"at": "embed.out", "do": "scale", "a": 2}
    freeze = {
        "at": ["layers.*.attn.head.*.z", "layers.*.mlp.out"],
        "do": "freeze",
        "except": ["layers.1.attn.head.2-3.z", "layers.0.mlp.out"],
    }
    out = [{"capture": ["layers.*.attn.head.*.z", "layers.*.mlp.out"]}]
    plain = run(LLAMA, {"out": out}).captures
    frozen = run(LLAMA, {"steps": [zero, freeze], "out": out}).captures
    for a, b in zip(plain, frozen, strict=True):
        ref = a.ref.ref
        differs = (a.value != b.value).transpose(0, 1).flatten(1).any(-1)  # by head
        if ref.site == "mlp.out":
            assert torch.equal(a.value, b.value) == (ref.layer != 0)
        else:
            free = {2, 3} if ref.layer == 1 else set()
            assert set(differs.nonzero()[:, 0].tolist()) == free


def test_prompts_of_different_lengths_pair_up_from_the_end() -> None:
    long = words([*range(20, 24), *OTHER.ids])
    step = {"at": "layers.1.resid.post", "do": "replace", "from": {"run": "cf", "map": "end"}}
    out = [{"capture": "layers.1.resid.post"}]
    got = run(
        LLAMA,
        {"runs": {"cf": {"prompt": "x"}}, "steps": [step], "out": out},
        {"main": MAIN, "cf": long},
    ).captures[0]
    expected = run(LLAMA, {"out": out}, {"main": long}).captures[0]
    assert torch.equal(got.value, expected.value[4:])


class Louder:
    """A bypass that adds half of what the output matrix gives."""

    at: frozenset[str] = frozenset()

    def __call__(self, layer: int, linear: str, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return 1.5 * y if linear == "o" else y

    def rows(self, name: str, layer: int, value: torch.Tensor) -> torch.Tensor:
        return value


def test_runs_may_have_an_adapter_of_their_own() -> None:
    program = {
        "runs": {"donor": {"same": "main", "adapter": "loud"}},
        "steps": [{"at": "layers.2.resid.post", "do": "replace", "from": "donor"}],
        "out": [{"measure": "kl", "to": "donor"}, {"measure": "kl", "to": "plain"}],
    }
    result = run(LLAMA, program, {"main": MAIN}, adapters={"loud": Louder()})
    assert torch.equal(result.logits["main"], result.logits["donor"])
    assert result.measures[0].values.item() == 0.0
    assert result.measures[1].values.item() > 1e-3
    with pytest.raises(InvalidRequest, match="no adapter") as caught:
        run(LLAMA, program, {"main": MAIN})
    assert caught.value.field == "runs.donor.adapter"


def test_generated_tokens_are_touched_as_far_as_they_are_known() -> None:
    prompt = words(MAIN.ids, n_prompt=5, n_new=20)
    step = {"at": "layers.0.resid.post", "pos": {"generated": [1, None]}, "do": "add", "v": 1}
    logits = run(LLAMA, {"steps": [step]}, {"main": prompt}).logits["main"]
    plain = plain_logits(LLAMA)
    close(logits[:6], plain[:6])
    assert ((logits[6:] - plain[6:]).abs().amax(-1) > 1e-3).all()


# Outputs.


def test_measures_are_what_they_say() -> None:
    out = [
        {"measure": "logit", "token": 5},
        {"measure": "logprob", "token": " w5", "pos": {"range": [2, 5]}},
        {"measure": "prob", "token": 5},
        {"measure": "rank", "token": 5},
        {"measure": "logit_diff", "a": 5, "b": 6},
        {"measure": "kl", "to": "cf"},
    ]
    result = run(LLAMA, {"out": out})
    logits = plain_logits(LLAMA)
    logp, cf = torch.log_softmax(logits, -1), torch.log_softmax(plain_logits(LLAMA, OTHER), -1)
    expected = [
        logits[-1:, 5],
        logp[2:5, 5],
        logp[-1:, 5].exp(),
        (logits[-1:] > logits[-1:, 5:6]).sum(-1),
        logits[-1:, 5] - logits[-1:, 6],
        (logp[-1:].exp() * (logp[-1:] - cf[-1:])).sum(-1),
    ]
    for measured, values in zip(result.measures, expected, strict=True):
        close(measured.values, values)


def test_captures_are_reduced_as_they_say() -> None:
    site = "layers.1.attn.head.*.out"
    w = torch.randn(3, 16, generator=GENERATOR, dtype=torch.float64)
    blobs = Blobs({"w": w, "d": w[0]})
    out = [
        {"capture": site},
        {"capture": site, "reduce": "mean"},
        {"capture": site, "reduce": "norm"},
        {"capture": site, "reduce": "dot", "v": "blob:d"},
        {"capture": site, "reduce": "cos", "v": "blob:d"},
        {"capture": site, "reduce": "probe", "w": "blob:w", "b": [1, 2, 3]},
        {"capture": site, "reduce": "lens", "tokens": [" w3", 5]},
        {"capture": site, "reduce": "lens", "sets": [[3, 5], [7]]},
        {"capture": site, "reduce": "lens", "top": 2},
    ]
    result = run(LLAMA, {"out": out}, blobs=blobs)
    x, *rest = (c.value for c in result.captures)
    logp = torch.log_softmax(LLAMA.logits(LLAMA.final_norm(x.reshape(-1, 16))), -1).view(9, 4, 40)
    pair = torch.logsumexp(logp[..., [3, 5]], -1)
    expected = [
        x.mean(0),
        x.norm(dim=-1),
        x @ w[0],
        torch.cosine_similarity(x, w[0], dim=-1),
        x @ w.T + torch.tensor([1, 2, 3]),
        logp[..., [3, 5]],
        torch.stack([pair, logp[..., 7]], -1),
        logp.topk(2).values,
    ]
    for got, want in zip(rest, expected, strict=True):
        close(got, want)
    for capture in result.captures:
        assert capture.ref.shape == tuple(capture.value.shape)
        assert capture.ref.n_bytes == capture.value.numel() * (
            8 if capture.tokens is not None else 4
        )


def test_a_sweep_is_its_rows_one_by_one() -> None:
    zero = {"at": "layers.$L.attn.head.$H.z", "pos": "@last", "do": "zero"}
    out = [{"measure": "logprob", "token": 5}]
    rows = run_rows(LLAMA, {"steps": [zero], "out": out, "sweep": [["L", "0..2"], ["H", [0, 3]]]})
    assert [row.row.binding for row in rows] == [
        {"L": layer, "H": head} for layer in range(3) for head in (0, 3)
    ]
    for row in rows:
        at = f"layers.{row.row.binding['L']}.attn.head.{row.row.binding['H']}.z"
        alone = run(LLAMA, {"steps": [{**zero, "at": at}], "out": out})
        assert torch.equal(alone.measures[0].values, row.measures[0].values)


def test_rows_of_a_sweep_are_compared_with_each_other() -> None:
    """The row that changes nothing is the plain run; another variable stays what it is."""
    program = {
        "sweep": [["a", [0.5, 1, 2]], ["L", [0, 2]]],
        "steps": [{"at": "layers.$L.mlp.out", "do": "scale", "a": "$a"}],
        "out": [
            {"measure": "kl", "to": {"row": {"a": 1}}, "pos": "@all", "name": "row"},
            {"measure": "kl", "to": "plain", "pos": "@all", "name": "plain"},
            {"measure": "kl", "to": {"row": {"a": 2}}, "name": "two"},
            {"measure": "kl", "to": {"row": {"a": 1}, "run": "cf"}, "name": "cf"},
            {"measure": "kl", "to": "cf", "name": "as is"},
        ],
    }
    rows = run_rows(LLAMA, program)
    found = [{m.ref.name: m.values for m in row.measures} for row in rows]
    for row in found:
        close(row["row"], row["plain"])
        close(row["cf"], row["as is"])  # a run that does not vary
    assert [row.row.measures[0].other_row for row in rows] == [2, 3, 2, 3, 2, 3]
    for low, high in ((0, 4), (1, 5)):
        log, other = (rows[i].logits["main"][-1].log_softmax(-1) for i in (low, high))
        close(found[low]["two"], (log.exp() * (log - other)).sum(-1, keepdim=True))
        assert not found[high]["two"].any()


@pytest.mark.parametrize(
    ("out", "sweep", "field"),
    [
        ({"to": {"row": {"a": 3}}}, {"a": [1, 2]}, "out[0].to.row.a"),
        ({"to": {"row": {"b": 1}}}, {"a": [1, 2]}, "out[0].to.row.b"),
        ({"to": {"row": {"a": 1}}}, {}, "out[0].to.row.a"),
        ({"to": {"row": {"a": 1}, "run": "no"}}, {"a": [1, 2]}, "out[0].to"),
        ({"to": {"row": {}}}, {"a": [1, 2]}, "out[0].to.row"),
        ({"to": {"run": "cf"}}, {"a": [1, 2]}, "out[0].to.row"),
        ({"to": {"row": {"a": [1]}}}, {"a": [1, 2]}, "out[0].to.row.a"),
    ],
)
def test_rows_that_are_not_there_are_refused(
    out: dict[str, Any], sweep: dict[str, Any], field: str
) -> None:
    program = {"sweep": sweep, "out": [{"measure": "kl", **out}]}
    with pytest.raises(InvalidRequest) as refused:
        run_rows(LLAMA, program)
    assert refused.value.field == field


def test_the_plain_run_sees_the_tokens_of_its_row() -> None:
    tokens = {"at": "input.tokens", "do": "set_tokens", "pos": {"index": 2}}
    edit = {"at": "layers.1.mlp.out", "do": "zero"}
    out = [{"measure": "kl", "to": "plain"}, {"measure": "logit", "token": 3, "run": "plain"}]
    swept = run_rows(
        LLAMA,
        {"steps": [tokens | {"ids": ["$T"]}, edit], "sweep": {"T": [3, 11]}, "out": out},
    )
    for token, row in zip([3, 11], swept, strict=True):
        alone = run(LLAMA, {"steps": [tokens | {"ids": [token]}, edit], "out": out})
        for mine, wanted in zip(row.measures, alone.measures, strict=True):
            close(mine.values, wanted.values)


def test_a_row_is_what_its_program_alone_would_be() -> None:
    """Also where runs are named by variables, or only some rows need them."""
    runs = {"cf": {"prompt": "other"}, "half": {"same": "main"}, "third": {"same": "main"}}
    steps = [
        {"run": "half", "at": "layers.$L.mlp.out", "do": "zero"},
        {"run": "third", "at": "layers.2.attn.out", "do": "replace", "from": "half"},
        {"run": "$r", "at": "layers.0.mlp.out", "do": "scale", "a": 2},
    ]
    out = [{"measure": "logprob", "token": 3, "run": "$r"}, {"measure": "logprob", "token": 3}]
    prompts = {"main": MAIN, "cf": OTHER}
    sweep = {"r": ["main", "half", "third"], "L": [0, 2]}
    program = {"runs": runs, "steps": steps, "out": out}
    swept = run_rows(LLAMA, program | {"sweep": sweep}, prompts)
    assert len(swept) == 6
    for row in swept:
        text = json.dumps(program)
        for name, bound in row.row.binding.items():
            text = text.replace(f"${name}", str(bound))
        alone = run(LLAMA, json.loads(text), prompts)
        for mine, wanted in zip(row.measures, alone.measures, strict=True):
            close(mine.values, wanted.values)
