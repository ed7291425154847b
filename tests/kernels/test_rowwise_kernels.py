"""Norms, rotary, activations, LoRA and packed linear maps on the CPU against their references."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.kernels.cases import relative_error

from invivo.errors import UnsupportedModel
from invivo.kernels import activation, linear, lora, norm, rotary


@pytest.mark.parametrize("unit_offset", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_norms_equal_their_references(unit_offset, dtype):
    torch.manual_seed(0)
    x, r = torch.randn(5, 3, 48).to(dtype), torch.randn(5, 3, 48).to(dtype)
    weight = torch.randn(48).to(dtype)
    tolerance = {torch.float32: 1e-6, torch.float64: 1e-14, torch.bfloat16: 5e-3}[dtype]
    expected = norm.rms_norm_reference(x, weight, 1e-5, unit_offset=unit_offset)
    got = norm.rms_norm(x, weight, 1e-5, unit_offset=unit_offset)
    assert relative_error(got, expected) < tolerance
    both = norm.add_rms_norm(x, r, weight, 1e-5, unit_offset=unit_offset)
    expected = norm.add_rms_norm_reference(x, r, weight, 1e-5, unit_offset=unit_offset)
    assert relative_error(both[0], expected[0]) < tolerance
    assert torch.equal(both[1], expected[1])


def test_reference_norm_is_x_over_its_root_mean_square():
    x, weight = torch.randn(4, 32, dtype=torch.float64), torch.randn(32, dtype=torch.float64)
    rms = (x.pow(2).sum(-1, keepdim=True) / 32 + 1e-6).sqrt()
    torch.testing.assert_close(norm.rms_norm_reference(x, weight, 1e-6), x / rms * weight)


@pytest.mark.parametrize("rotary_dim", [16, 8])
@pytest.mark.parametrize("joined", [True, False])
def test_rotary_in_place_equals_the_reference(rotary_dim, joined):
    torch.manual_seed(0)
    angles = torch.rand(50, rotary_dim // 2, dtype=torch.float64)
    qkv = torch.randn(7, 8, 16, dtype=torch.float64)
    q, k, v = qkv.split((4, 2, 2), dim=1)
    if not joined:
        q, k = q.clone(), k.clone()
    positions = torch.randint(0, 50, (7,))
    before = v.clone()
    expected = rotary.apply_rotary_reference(q, k, angles.cos(), angles.sin(), positions)
    got = rotary.apply_rotary(q, k, angles.cos(), angles.sin(), positions)
    torch.testing.assert_close(got, expected)
    assert torch.equal(v, before)


def test_rotary_scores_depend_on_distance_alone():
    angles = torch.outer(torch.arange(40.0).double(), torch.rand(8, dtype=torch.float64))
    q = torch.randn(1, 1, 16, dtype=torch.float64)
    k = torch.randn(1, 1, 16, dtype=torch.float64)
    scores = []
    for shift in (0, 5, 30):
        position = torch.tensor([shift])
        a, _ = rotary.apply_rotary_reference(q, k, angles.cos(), angles.sin(), position + 7)
        _, b = rotary.apply_rotary_reference(q, k, angles.cos(), angles.sin(), position)
        scores.append((a * b).sum())
    torch.testing.assert_close(scores[1], scores[0])
    torch.testing.assert_close(scores[2], scores[0])


@pytest.mark.parametrize("kind", ["silu", "gelu", "gelu_tanh", "relu", "relu2"])
def test_gated_activation_equals_its_reference_and_leaves_its_input(kind):
    gate_up = torch.randn(6, 32)
    before = gate_up.clone()
    expected = activation.gated_activation_reference(gate_up, kind)
    torch.testing.assert_close(activation.gated_activation(gate_up, kind), expected)
    assert torch.equal(gate_up, before)


def test_unknown_activation_is_refused():
    with pytest.raises(UnsupportedModel, match="hidden_act"):
        activation.activation(torch.zeros(1), "softplush")


@settings(max_examples=40, deadline=None)
@given(
    index=st.lists(st.integers(0, 3), min_size=1, max_size=40),
    seed=st.integers(0, 100),
)
def test_lora_equals_its_reference_and_leaves_rows_without_adapter(index, seed):
    g = torch.Generator().manual_seed(seed)
    rows = torch.tensor(index, dtype=torch.int32)
    a = torch.randn(3, 8, 24, generator=g, dtype=torch.float64)
    b = torch.randn(3, 16, 8, generator=g, dtype=torch.float64)
    a[0], b[0] = 0, 0
    x = torch.randn(len(index), 24, generator=g, dtype=torch.float64)
    y = torch.randn(len(index), 16, generator=g, dtype=torch.float64)
    expected = lora.lora_add_reference(y, x, a, b, rows)
    each = torch.stack(
        [y[t] if i == 3 else y[t] + b[i] @ (a[i] @ x[t]) for t, i in enumerate(index)]
    )
    torch.testing.assert_close(expected, each)
    got = lora.lora_add(y.clone(), x, a, b, rows)
    torch.testing.assert_close(got, expected)
    untouched = (rows == 0) | (rows == 3)  # 3 is beyond the table
    assert torch.equal(got[untouched], y[untouched])


@pytest.mark.parametrize("rows", [1, 2, 3, 64, 200])
@pytest.mark.parametrize("width", [96, 51])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("packed", [True, False])
def test_linear_equals_the_product_whichever_way_it_goes(rows, width, bias, packed):
    torch.manual_seed(0)
    weight, x = torch.randn(width, 40), torch.randn(rows, 40)
    offset = torch.randn(width) if bias else None
    got = linear.linear(x, weight, offset, linear.pack(weight) if packed else None)
    expected = torch.nn.functional.linear(x.double(), weight.double()) + (
        0 if offset is None else offset.double()
    )
    assert relative_error(got, expected) < 1e-6
    assert got.is_contiguous()


def test_packing_does_not_apply_to_other_types_and_shapes():
    for weight in (torch.randn(4, 4).double(), torch.randn(4), torch.randn(4, 4).bfloat16()):
        assert linear.pack(weight) is None


def test_gradient_passes_a_linear_that_is_packed():
    torch.manual_seed(0)
    weight, bias, x = torch.randn(12, 8), torch.randn(12), torch.randn(5, 8)
    gradients = []
    for packed in (None, linear.pack(weight)):
        leaf = x.clone().requires_grad_()
        linear.linear(leaf, weight, bias, packed).square().sum().backward()
        gradients.append(leaf.grad)
    assert torch.equal(gradients[1], gradients[0])
