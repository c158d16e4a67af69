# Copyright (C) yolo_ext authors. AGPL-3.0 licence.
from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from yolo_ext.distillation.features import Align, cwd, feature_losses

LOSSES = [pytest.param(row.fn, id=row.name) for row in feature_losses]


def maps(
    seed: int = 0, shape: tuple[int, ...] = (2, 4, 5, 6), spread: float = 2.0
) -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    return spread * torch.randn(shape, generator=g), spread * torch.randn(shape, generator=g)


def softmax(x: np.ndarray) -> np.ndarray:
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


@pytest.mark.parametrize("temperature", [1.0, 2.0, 0.5])
def test_cwd_is_the_formula_of_the_paper(temperature):
    s, t = maps()
    p, q = (softmax(x.flatten(2).double().numpy() / temperature) for x in (t, s))
    expected = temperature**2 * (p * np.log(p / q)).sum() / (2 * 4)
    assert cwd(s, t, temperature).item() == pytest.approx(expected, rel=1e-5)


def test_cwd_of_two_pixels_by_hand():
    s, t = torch.tensor([[[[0.0, 0.0]]]]), torch.tensor([[[[np.log(3.0), 0.0]]]]).float()
    assert cwd(s, t).item() == pytest.approx(0.75 * np.log(0.75 / 0.5) + 0.25 * np.log(0.25 / 0.5), rel=1e-5)


@pytest.mark.parametrize("loss", LOSSES)
def test_a_student_that_equals_its_teacher_has_no_loss_and_no_gradient(loss):
    t, _ = maps()
    s = t.clone().requires_grad_(True)
    value = loss(s, t)
    value.backward()
    assert 0 <= value.item() <= 1e-6
    assert s.grad.abs().max() <= 1e-6


@pytest.mark.parametrize("loss", LOSSES)
def test_any_other_student_has_a_loss_and_a_gradient(loss):
    s, t = maps()
    s.requires_grad_(True)
    value = loss(s, t)
    value.backward()
    assert value.shape == () and value.item() > 0.01
    assert s.grad.isfinite().all() and s.grad.abs().max() > 1e-4


@pytest.mark.parametrize("loss", LOSSES)
@given(
    seed=st.integers(0, 10_000), spread=st.floats(0, 50), b=st.integers(1, 3), c=st.integers(1, 4), h=st.integers(1, 4)
)
@settings(max_examples=40, deadline=None)
def test_is_never_negative_and_the_same_for_a_batch_repeated(loss, seed, spread, b, c, h):
    s, t = maps(seed, (b, c, h, 3), spread)
    value = loss(s, t)
    assert value.isfinite() and value >= 0
    assert torch.allclose(loss(torch.cat([s, s]), torch.cat([t, t])), value, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("loss", LOSSES)
def test_half_precision_and_memory_format_do_not_matter(loss):
    s, t = maps(shape=(2, 8, 16, 16))
    value = loss(s, t)
    assert torch.allclose(loss(s.half(), t.half()), value, rtol=1e-2)
    assert torch.allclose(loss(s.bfloat16(), t.bfloat16()), value, rtol=5e-2)
    nhwc = (x.contiguous(memory_format=torch.channels_last) for x in (s, t))
    assert torch.allclose(loss(*nhwc), value, rtol=1e-6)
    assert loss(5e3 * s.half(), -5e3 * t.half()).isfinite()


def test_kept_channels_are_gathered_and_left_as_they_are():
    align = Align(2, 5, [0, 3])
    s, t = torch.randn(1, 2, 3, 3), torch.randn(1, 5, 3, 3)
    a, b = align(s, t.half())
    assert torch.equal(a, s) and torch.equal(b, t.half()[:, [0, 3]].float())
    assert not list(align.parameters())


@pytest.mark.parametrize(("student", "teacher", "adapter"), [(4, 4, False), (4, 8, True), (8, 4, True)])
def test_other_widths_get_a_1x1_adapter_and_both_sides_are_normalised(student, teacher, adapter):
    align = Align(student, teacher, None)
    assert [tuple(p.shape) for p in align.parameters()] == ([(teacher, student, 1, 1)] if adapter else [])
    s, t = (x * 37 + 5 for x in (torch.randn(3, student, 6, 6), torch.randn(3, teacher, 6, 6)))
    for side in align(s, t.half()):
        assert side.shape == (3, teacher, 6, 6) and side.dtype == torch.float32
        assert side.mean((0, 2, 3)).abs().max() < 1e-3
        assert (side.var((0, 2, 3), correction=0) - 1).abs().max() < 1e-2


def test_the_loss_does_not_depend_on_the_magnitude_of_either_side():
    s, t = maps(shape=(2, 4, 6, 6))
    align = Align(4, 4, None)
    assert torch.allclose(cwd(*align(s, t)), cwd(*align(10 * s, 0.1 * t)), rtol=1e-3)


def test_a_constant_channel_gives_no_nan():
    s, t = torch.zeros(2, 3, 4, 4, requires_grad=True), torch.randn(2, 3, 4, 4)
    value = cwd(*Align(3, 3, None)(s, t))
    value.backward()
    assert value.isfinite() and s.grad.isfinite().all()
