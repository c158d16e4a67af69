# Copyright (C) yolo_ext authors. AGPL-3.0 licence.
"""Our passes over memory give what the operators of torch give, values and gradients."""

from __future__ import annotations

import pytest
import torch

from yolo_ext.quantization.layers import fake_quantize, fake_quantize_weight

GRIDS = [(0, 255, 0.03, 40.0), (-127, 127, 0.02, 0.0), (0, 15, 0.2, 3.0), (0, 65535, 1e-4, 30000.0), (0, 3, 1.5, 0.0)]


def tensor(*shape: int, spread: float = 1.5) -> torch.Tensor:
    return (torch.randn(*shape, generator=torch.Generator().manual_seed(0)) * spread).requires_grad_()


@pytest.mark.parametrize(("qmin", "qmax", "scale", "zero"), GRIDS)
def test_activations_are_those_of_torch(qmin, qmax, scale, zero):
    x, s, z = tensor(2, 3, 9, 9), torch.tensor(scale), torch.tensor(zero)
    ours = fake_quantize(x, s, z, qmin, qmax)
    theirs = torch.fake_quantize_per_tensor_affine(x, s, z.int(), qmin, qmax)
    assert torch.equal(ours, theirs)
    grads = [torch.autograd.grad(y, x, torch.ones_like(y))[0] for y in (ours, theirs)]
    assert torch.equal(*grads)


@pytest.mark.parametrize("qmax", [1, 7, 127])
@pytest.mark.parametrize("share", [0.6, 1.0, 1.4])
def test_weights_are_those_of_torch(qmax, share):
    w = tensor(8, 4, 3, 3)
    upstream = torch.randn_like(w)
    scale = w.detach().abs().amax((1, 2, 3), keepdim=True) * share / qmax
    ours = fake_quantize_weight(w, scale, qmax)
    zero = torch.zeros(8, dtype=torch.int)
    theirs = torch.fake_quantize_per_channel_affine(w, scale.flatten(), zero, 0, -qmax, qmax)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    grads = [torch.autograd.grad(y, w, upstream)[0] for y in (ours, theirs)]
    torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_types_go_through_float32_and_come_back(dtype):
    x = tensor(2, 9).detach().to(dtype).requires_grad_()
    s, z = torch.tensor(0.03), torch.tensor(40.0)
    y = fake_quantize(x, s, z, 0, 255)
    expected = torch.fake_quantize_per_tensor_affine(x.float(), s, z.int(), 0, 255).to(dtype)
    assert y.dtype == dtype and torch.equal(y, expected)
    (grad,) = torch.autograd.grad(y.sum(), x)
    assert grad.dtype == dtype


def test_strided_input_and_gradient():
    x = tensor(2, 4, 6, 6)
    view = x.permute(0, 2, 3, 1)[:, ::2]
    s, z = torch.tensor(0.03), torch.tensor(40.0)
    y = fake_quantize(view, s, z, 0, 255)
    plain = torch.fake_quantize_per_tensor_affine(view, s, z.int(), 0, 255)
    assert torch.equal(y, plain)
    y.transpose(1, 2).square().sum().backward()
    assert x.grad.isfinite().all() and x.grad.abs().sum() > 0


def test_the_result_may_be_changed_in_place():
    """As `nn.SiLU(inplace=True)` does to it."""
    x = tensor(2, 9)
    torch.nn.functional.silu(
        fake_quantize(x, torch.tensor(0.03), torch.tensor(40.0), 0, 255), inplace=True
    ).sum().backward()
    assert x.grad.abs().sum() > 0
