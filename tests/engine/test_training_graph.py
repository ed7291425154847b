"""The table of what gradients read: each gradient computed from exactly that, in float64."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F

from invivo.engine.training_graph import RULES

Tensors = dict[str, torch.Tensor]


def attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> Tensors:
    """[T, D] each, causal: z, log-sum-exp, probabilities."""
    score = (q @ k.T).masked_fill(torch.ones(len(q), len(k)).triu(1).bool(), -torch.inf)
    prob = torch.softmax(score, dim=-1)
    return {"out0": prob @ v, "out1": torch.logsumexp(score, dim=-1), "out2": prob}


def attention_gradients(t: Tensors, dz: torch.Tensor) -> Tensors:
    score = (t["in0"] @ t["in1"].T).masked_fill(
        torch.ones(len(dz), len(t["in1"])).triu(1).bool(), -torch.inf
    )
    prob = torch.exp(score - t["out1"][:, None])
    found = {"in2": prob.T @ dz}
    if "out0" in t:
        ds = prob * (dz @ t["in2"].T - (dz * t["out0"]).sum(-1, keepdim=True))
        found |= {"in0": ds @ t["in1"], "in1": ds.T @ t["in0"]}
    return found


def rms(x: torch.Tensor) -> Tensors:
    return {"out0": x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-5)}


def rms_gradient(t: Tensors, dy: torch.Tensor) -> Tensors:
    x = t["in0"]
    scale = torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-5)
    return {"in0": scale * (dy - x * scale**2 * (dy * x).mean(-1, keepdim=True))}


def relu(x: torch.Tensor) -> Tensors:
    return {"out0": F.relu(x), "out1": x > 0}


def relu_gradient(t: Tensors, dy: torch.Tensor) -> Tensors:
    return {"in0": dy * (t["out1"] if "out1" in t else next(iter(t.values())) > 0)}


def clip(x: torch.Tensor) -> Tensors:
    return {"out0": x.clamp(-0.5, 0.5), "out1": x.abs() <= 0.5}


def clip_gradient(t: Tensors, dy: torch.Tensor) -> Tensors:
    return {"in0": dy * (t["out1"] if "out1" in t else t["in0"].abs() <= 0.5)}


def gated(gate: torch.Tensor, up: torch.Tensor) -> Tensors:
    return {"out0": F.silu(gate) * up}


def gated_gradients(t: Tensors, dy: torch.Tensor) -> Tensors:
    s = torch.sigmoid(t["in0"])
    found = {"in1": dy * t["in0"] * s}
    if "in1" in t:
        found["in0"] = dy * t["in1"] * s * (1 + t["in0"] * (1 - s))
    return found


def row_gate(x: torch.Tensor, gate: torch.Tensor) -> Tensors:
    return {"out0": x * torch.sigmoid(gate[:, :1])}


def row_gate_gradients(t: Tensors, dy: torch.Tensor) -> Tensors:
    s = torch.sigmoid(t["in1"][:, :1])
    found = {"in0": dy * s}
    if "in0" in t:
        gate = torch.zeros_like(t["in1"])
        gate[:, :1] = (dy * t["in0"]).sum(-1, keepdim=True) * s * (1 - s)
        found["in1"] = gate
    return found


DOWN = torch.randn(6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(9))


def expert_mix(neuron: torch.Tensor, weights: torch.Tensor) -> Tensors:
    """One expert; its weight of each row in the first column."""
    return {"out0": weights[:, :1] * (neuron @ DOWN)}


def expert_mix_gradients(t: Tensors, dy: torch.Tensor) -> Tensors:
    back = dy @ DOWN.T
    found = {}
    if "in1" in t:
        found["in0"] = t["in1"][:, :1] * back
    if "in0" in t:
        weights = torch.zeros_like(dy)
        weights[:, 0] = (t["in0"] * back).sum(-1)
        found["in1"] = weights
    return found


def route(logits: torch.Tensor) -> Tensors:
    """The two likeliest, normalised; the indices travel as a second output."""
    weights, chosen = torch.softmax(logits, -1).topk(2)
    return {"out0": weights / weights.sum(-1, keepdim=True), "out1": chosen}


def route_gradient(t: Tensors, dw: torch.Tensor) -> Tensors:
    # Normalised over the chosen, the softmax is that of their logits alone.
    weights = torch.softmax(t["in0"].gather(-1, t["out1"]), -1)
    picked = weights * (dw - (weights * dw).sum(-1, keepdim=True))
    return {"in0": torch.zeros_like(t["in0"]).scatter(-1, t["out1"], picked)}


def log_gate(logits: torch.Tensor) -> Tensors:
    return {"out0": F.logsigmoid(logits) / 16}


def log_gate_gradient(t: Tensors, dy: torch.Tensor) -> Tensors:
    return {"in0": dy * torch.sigmoid(-t["in0"]) / 16}


CASES: dict[str, tuple[Callable[..., Tensors], Callable[[Tensors, torch.Tensor], Tensors], int]] = {
    "attention": (attention, attention_gradients, 3),
    "norm": (rms, rms_gradient, 1),
    "relu": (relu, relu_gradient, 1),
    "clip": (clip, clip_gradient, 1),
    "gated": (gated, gated_gradients, 2),
    "log_gate": (log_gate, log_gate_gradient, 1),
    "row_gate": (row_gate, row_gate_gradients, 2),
    "expert_mix": (expert_mix, expert_mix_gradients, 2),
    "route": (route, route_gradient, 1),
}


@pytest.mark.parametrize("kind", CASES)
def test_gradients_follow_from_what_the_rule_names_and_nothing_else(kind: str) -> None:
    forward, backward, n_inputs = CASES[kind]
    generator = torch.Generator().manual_seed(0)
    inputs = [
        torch.randn(5, 6, dtype=torch.float64, generator=generator, requires_grad=True)
        for _ in range(n_inputs)
    ]
    outputs = forward(*inputs)
    dy = torch.randn(outputs["out0"].shape, dtype=torch.float64, generator=generator)
    expected = torch.autograd.grad(outputs["out0"], inputs, dy)
    at_hand = {f"in{i}": x.detach() for i, x in enumerate(inputs)}
    at_hand |= {name: value.detach() for name, value in outputs.items()}
    at_hand["in2" if kind == "expert_mix" else "none"] = torch.zeros(5)  # one expert: chosen is 0
    for i, truth in enumerate(expected):
        alternatives = RULES[kind].inputs[i]
        assert alternatives is not None
        for roles in alternatives:
            found = backward({role: at_hand[role] for role in roles}, dy)[f"in{i}"]
            torch.testing.assert_close(found, truth, rtol=1e-10, atol=1e-12)
