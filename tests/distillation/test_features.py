# Copyright (C) yolo_ext authors. AGPL-3.0 licence.
from __future__ import annotations

import inspect

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from yolo_ext.core.errors import UsageError
from yolo_ext.core.registry import Need
from yolo_ext.distillation.losses import (  # fmt: skip
    Align,
    at,
    cwd,
    feature_losses,
    mgd,
    mimic,
    modules,
    pkd,
    standardize,
)

SCALE_FREE = {"at", "pkd"}  # cwd is so behind an adapter that normalises
NAMES = [row.name for row in feature_losses]
# Without a mask and with a generator that changes nothing, the only case in which MGD is 0 for equal maps.
OPTIONS = {"mgd": {"module": nn.Identity(), "masked": 0.0, "alpha": 1.0, "norm": "mean"}}
ANY_WIDTH = [row.name for row in feature_losses if Need.EQUAL_WIDTH not in row.needs]


def run(name: str, s: torch.Tensor, t: torch.Tensor, **options) -> torch.Tensor:
    return feature_losses[name].fn(s, t, **{**OPTIONS.get(name, {}), **options})


def maps(
    seed: int = 0, shape: tuple[int, ...] = (2, 4, 5, 6), spread: float = 2.0
) -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    return spread * torch.randn(shape, generator=g), spread * torch.randn(shape, generator=g)


def softmax(x: np.ndarray) -> np.ndarray:
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


# Values ------------------------------------------------------------------------------------------------------------
def test_mimic_is_the_mean_squared_difference():
    s, t = torch.zeros(1, 1, 1, 2), torch.tensor([[[[1.0, 3.0]]]])
    assert mimic(s, t) == 5.0


@pytest.mark.parametrize("temperature", [1.0, 2.0, 0.5])
def test_cwd_is_the_formula_of_the_paper(temperature):
    s, t = maps()
    p, q = (softmax(x.flatten(2).double().numpy() / temperature) for x in (t, s))
    expected = temperature**2 * (p * np.log(p / q)).sum() / (2 * 4)
    assert cwd(s, t, temperature).item() == pytest.approx(expected, rel=1e-5)


def test_cwd_of_two_pixels_by_hand():
    s, t = torch.tensor([[[[0.0, 0.0]]]]), torch.tensor([[[[np.log(3.0), 0.0]]]]).float()
    assert cwd(s, t).item() == pytest.approx(0.75 * np.log(0.75 / 0.5) + 0.25 * np.log(0.25 / 0.5), rel=1e-5)


@pytest.mark.parametrize(("norm", "expected"), [("sum", 2.0), ("mean", 1.0)])
def test_at_of_opposite_attention_by_hand(norm, expected):
    """Two positions, each side looks at another one: unit vectors (1, 0) and (0, 1)."""
    s, t = torch.tensor([[[[3.0, 0.0]]]]), torch.tensor([[[[0.0, 1.0]], [[0.0, -7.0]]]])
    assert at(s, t, norm=norm).item() == pytest.approx(expected)


def test_at_squares_before_it_averages_over_channels():
    s, t = maps()
    q = [(x.double().numpy() ** 2).mean(1).reshape(2, -1) for x in (s, t)]
    q = [x / np.linalg.norm(x, axis=1, keepdims=True) for x in q]
    assert at(s, t).item() == pytest.approx(((q[0] - q[1]) ** 2).sum(1).mean(), rel=1e-5)


def test_pkd_is_one_less_the_correlation_of_each_channel():
    s, t = maps()
    rows = [x.transpose(0, 1).flatten(1).double().numpy() for x in (s, t)]
    r = [np.corrcoef(a, b)[0, 1] for a, b in zip(*rows)]
    assert pkd(s, t).item() == pytest.approx(1 - np.mean(r), rel=1e-4)
    assert pkd(t, -t).item() == pytest.approx(2.0, rel=1e-4)


def test_mgd_sums_over_a_map_and_averages_over_images():
    s, t = maps()
    expected = ((s - t).double() ** 2).sum() / 2
    plain = {"module": nn.Identity(), "masked": 0.0}
    assert mgd(s, t, **plain).item() == pytest.approx(2e-5 * expected.item(), rel=1e-4)
    assert mgd(s, t, **plain, alpha=1.0, norm="mean").item() == pytest.approx(expected.item() / (4 * 30), rel=1e-4)


def test_mgd_hides_this_share_of_positions_in_all_channels_at_once():
    seen = []
    ones = torch.ones(4, 3, 40, 40)
    mgd(ones, ones, module=lambda x: seen.append(x) or x, random=torch.Generator().manual_seed(0))
    assert seen[0].mean().item() == pytest.approx(0.35, abs=0.02)
    assert torch.equal(seen[0], seen[0][:, :1].expand_as(seen[0]))


def test_mgd_can_be_learnt():
    torch.manual_seed(0)
    s, net = torch.randn(2, 4, 8, 8), modules["mgd"](4)
    t, values = s.roll(1, -1), []
    for _ in range(100):
        loss = mgd(s, t, module=net, masked=0.0, alpha=1.0, norm="mean")
        gradients = torch.autograd.grad(loss, list(net.parameters()))
        with torch.no_grad():
            for p, g in zip(net.parameters(), gradients):
                p -= 0.3 * g
        values.append(loss.item())
    assert values[-1] < 0.5 * values[0]


# What holds for all ------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("row", [pytest.param(r, id=r.name) for r in feature_losses])
def test_rows_say_what_they_need(row):
    options = inspect.signature(row.fn).parameters
    assert row.paper and row.summary and list(options)[:2] == ["student", "teacher"]
    assert ("module" in options) == (Need.MODULE in row.needs) == (row.name in modules)
    assert ("scale-free" in row.summary) == (row.name in SCALE_FREE)


@pytest.mark.parametrize("name", NAMES)
def test_a_student_that_equals_its_teacher_has_no_loss_and_no_gradient(name):
    t, _ = maps()
    s = t.clone().requires_grad_(True)
    value = run(name, s, t)
    value.backward()
    assert 0 <= value.item() <= 1e-6
    assert s.grad.abs().max() <= 1e-6


@pytest.mark.parametrize("name", NAMES)
def test_any_other_student_has_a_loss_and_a_gradient_and_the_teacher_none(name):
    s, t = maps()
    s.requires_grad_(True), t.requires_grad_(True)
    value = run(name, s, t)
    value.backward()
    assert value.shape == () and value.item() > 0.01
    assert s.grad.isfinite().all() and s.grad.abs().max() > 1e-4 and t.grad is None


@pytest.mark.parametrize("name", NAMES)
@given(
    seed=st.integers(0, 10_000),
    spread=st.just(0.0) | st.floats(1e-3, 50),  # what is normalised is rounding below that
    b=st.integers(1, 3),
    c=st.integers(1, 4),
    h=st.integers(1, 4),
)
@settings(max_examples=25, deadline=None)
def test_is_never_negative_and_the_same_for_a_batch_repeated(name, seed, spread, b, c, h):
    s, t = maps(seed, (b, c, h, 3), spread)
    value = run(name, s, t)
    again = run(name, torch.cat([s, s]), torch.cat([t, t]))
    assert value.isfinite() and value >= 0
    assert torch.allclose(again, value, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_a_single_value_and_a_dead_map_are_finite(name):
    for s, t in (maps(shape=(1, 4, 1, 1)), (torch.zeros(2, 4, 3, 3), maps(shape=(2, 4, 3, 3))[1])):
        s.requires_grad_(True)
        value = run(name, s, t)
        value.backward()
        assert value.isfinite() and s.grad.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
@pytest.mark.parametrize("name", NAMES)
def test_half_precision_autocast_and_memory_format_do_not_matter(name, dtype):
    s, t = maps(shape=(4, 8, 32, 32))
    value = run(name, s, t)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.allclose(run(name, s, t), value, rtol=1e-6)
        assert torch.allclose(run(name, s.to(dtype), t.to(dtype)), value, rtol=1e-2)
    nhwc = (x.contiguous(memory_format=torch.channels_last) for x in (s, t))
    assert torch.allclose(run(name, *nhwc), value, rtol=1e-5)
    assert run(name, 5e3 * s.half(), -5e3 * t.half()).isfinite()


@pytest.mark.parametrize("name", [*modules])
def test_trained_parts_work_under_autocast_and_follow_the_channels(name):
    s, t = maps(shape=(2, 6, 8, 8))
    net = modules[name](6)
    with torch.autocast("cpu", torch.bfloat16):
        value = run(name, s.bfloat16(), t, module=net)
    value.backward()
    assert value.dtype == torch.float32
    assert any(p.grad is not None and p.grad.abs().max() > 0 for p in net.parameters())


@pytest.mark.parametrize("name", ["at", "mgd"])
def test_unknown_norm_is_refused(name):
    with pytest.raises(UsageError, match="Unknown norm 'max'"):
        run(name, *maps(), norm="max")


# Invariances -------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", NAMES)
@given(seed=st.integers(0, 10_000), a=st.floats(0.5, 20), b=st.floats(0.5, 20))
@settings(max_examples=10, deadline=None)
def test_scale_free_losses_ignore_magnitudes_and_the_others_do_not(name, seed, a, b):
    s, t = maps(seed)
    close = torch.allclose(run(name, a * s, b * t), run(name, s, t), rtol=1e-3, atol=1e-5)
    assert close if name in SCALE_FREE else (not close or (abs(a - 1) < 0.1 and abs(b - 1) < 0.1))


@given(seed=st.integers(0, 10_000), data=st.data())
@settings(max_examples=25, deadline=None)
def test_pkd_ignores_scale_and_shift_of_each_channel(seed, data):
    s, t = maps(seed)
    numbers = [data.draw(st.lists(st.floats(low, 8), min_size=4, max_size=4)) for low in (0.5, -8)]
    scale, shift = (torch.tensor(x).view(1, 4, 1, 1) for x in numbers)
    assert torch.allclose(pkd(s * scale + shift, t), pkd(s, t), rtol=1e-3, atol=1e-5)


@given(seed=st.integers(0, 10_000), data=st.data())
@settings(max_examples=25, deadline=None)
def test_cwd_ignores_the_shift_of_each_channel(seed, data):
    s, t = maps(seed)
    shift = torch.tensor(data.draw(st.lists(st.floats(-9, 9), min_size=8, max_size=8))).view(2, 4, 1, 1)
    assert torch.allclose(cwd(s + shift, t), cwd(s, t), rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("name", ANY_WIDTH)
@given(seed=st.integers(0, 10_000), order=st.permutations(range(4)))
@settings(max_examples=10, deadline=None)
def test_losses_without_adapters_ignore_the_order_of_channels_and_take_any_width(name, seed, order):
    s, t = maps(seed)
    assert torch.allclose(run(name, s[:, order], t), run(name, s, t), rtol=1e-4, atol=1e-6)
    repeated = run(name, torch.cat([s, s, s], 1), t)  # three times as wide, the same attention and similarities
    assert torch.allclose(repeated, run(name, s, t), rtol=1e-4, atol=1e-6)


# What is trained along -----------------------------------------------------------------------------------------------
@pytest.mark.parametrize("c", [1, 7])
def test_the_generator_keeps_the_shape(c):
    assert modules["mgd"](c)(torch.rand(2, c, 5, 3)).shape == (2, c, 5, 3)


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
    s, t = torch.randn(2, 2, 4, 6, 6)
    align = Align(4, 4, None)
    assert torch.allclose(cwd(*align(s, t)), cwd(*align(10 * s, 0.1 * t)), rtol=1e-3)


def test_a_constant_channel_gives_no_nan():
    s, t = torch.zeros(2, 3, 4, 4, requires_grad=True), torch.randn(2, 3, 4, 4)
    value = cwd(*Align(3, 3, None)(s, t))
    value.backward()
    assert value.isfinite() and s.grad.isfinite().all()


def test_a_single_value_per_channel_has_no_spread():
    assert standardize(torch.full((1, 3, 1, 1), 7.0)).abs().max() == 0
    a, b = Align(3, 5, None)(torch.rand(1, 3, 1, 1), torch.rand(1, 5, 1, 1))
    assert a.shape == b.shape == (1, 5, 1, 1)
