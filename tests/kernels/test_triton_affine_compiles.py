"""The kernel of constant edits compiles for Hopper, without spills; needs no GPU."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from tests.kernels.hopper_compiler import compiled

from invivo.kernels.triton_affine import affine_triton


@pytest.mark.parametrize("shape", [(64, 9, 64), (64, 14336)])
def test_constant_edits_are_one_kernel_that_spills_nothing(shape, monkeypatch, tmp_path):
    if torch.cuda.is_available():
        pytest.skip("compiled and run by test_triton.py")
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    x = torch.empty(shape, dtype=torch.bfloat16, device="meta")
    (kernel,) = compiled(lambda: affine_triton(x, x.bool(), x, x))
    assert kernel.spilled == 0, kernel
    assert kernel.registers <= 64, kernel
