# Copyright (C) yolo_ext authors. AGPL-3.0 licence.
from __future__ import annotations

import io
from copy import deepcopy
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from yolo_ext.core.config import PruneConfig, SparsityConfig
from yolo_ext.core.errors import UsageError
from yolo_ext.core.registry import Need
from yolo_ext.core.schedules import pulls
from yolo_ext.pruning.prune import prune_with_plan
from yolo_ext.sparsity.penalties import penalties
from yolo_ext.sparsity.sparsifier import FEWEST, Sparsifier

PRUNE = PruneConfig()
METHODS = penalties.names()
SCALES = [r.name for r in penalties if Need.SCALES in r.needs]


def make(model, method="slim", epochs=4, prune_epochs=(), prune=PRUNE, **options):
    return Sparsifier(model, SparsityConfig(method=method, **options), prune, epochs, prune_epochs)


def train(sparsifier, model, epochs, batches=4, accumulate=1):
    """Run the pulls of a training without a loss, with steps that straddle epochs, as Ultralytics makes them."""
    waiting, steps, since = 0, 0, 0
    for epoch in range(epochs):
        sparsifier.set_epoch(epoch)
        for _ in range(batches):
            waiting += 1
            since += 1
            if since >= accumulate:
                sparsifier.shrink(model, waiting / batches)
                waiting, since, steps = 0, 0, steps + 1
        sparsifier.shrink(model, waiting / batches)
        waiting = 0
    return steps


def norms(sparsifier, model):
    return sparsifier._channels(model).norms.split([g.size for g in sparsifier.groups])


@settings(deadline=None, max_examples=25)
@given(
    epochs=st.integers(1, 12), batches=st.integers(1, 30), accumulate=st.integers(1, 40), start=st.integers(0, 3),
    schedule=st.sampled_from(["constant", "linear", "cosine"]),
)  # fmt: skip
def test_pulls_of_a_run_come_to_the_coefficient(epochs, batches, accumulate, start, schedule):
    cfg = SparsityConfig(start=min(start, epochs - 1), schedule=schedule, coefficient=0.37)
    total: list[float] = []
    bare = SimpleNamespace(shrink=lambda model, fraction: total.append(bare.pull * fraction))
    bare.set_epoch = lambda epoch: setattr(bare, "pull", pulls(cfg=cfg, coefficient=0.37, epochs=epochs)[epoch])
    train(bare, None, epochs, batches, accumulate)
    assert sum(total) == pytest.approx(0.37)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(("batches", "accumulate"), [(1, 1), (8, 1), (8, 3), (5, 40)])
def test_result_does_not_depend_on_the_number_of_steps(fresh, method, batches, accumulate):
    model, reference = fresh(), fresh()
    for m, b, a in ((model, batches, accumulate), (reference, 4, 1)):
        train(make(m, method, coefficient=0.3, warmup=0), m, 4, b, a)
    for (name, p), q in zip(model.named_parameters(), reference.parameters()):
        # ranks move within a step of the methods that look at them
        torch.testing.assert_close(p, q, rtol=2e-2 if method == "group_sl" else 1e-4, atol=1e-5, msg=name)


def sensitive(model, scale):
    """Give all scales a gradient: small in the first half of the channels of a layer, ten times larger in the rest."""
    for p in model.parameters():
        p.grad = torch.ones_like(p) * scale
        p.grad[: len(p) // 2] /= 10


@pytest.mark.parametrize("method", SCALES)
@pytest.mark.parametrize("scale", [1e-6, 1.0, 65536.0], ids=["tiny", "one", "unscaled-amp"])
def test_the_pull_spares_what_the_loss_is_sensitive_to(fresh, method, scale):
    """A channel moves in inverse proportion to its root mean square gradient; what is common to all does not matter."""
    model = fresh()
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    sensitive(model, scale)
    s = make(model, method, coefficient=0.02, warmup=0)
    train(s, model, 4)
    name = next(g.gammas[0][0] for g in s.groups if len(g.gammas) == 1)
    moved = (before[name] - model.get_parameter(name)).abs()
    half = len(moved) // 2
    torch.testing.assert_close(moved[:half] / moved[half:].mean(), torch.full((half,), 8.0), rtol=0.3, atol=0)
    plain = fresh()
    sensitive(plain, scale)
    train(make(plain, method, coefficient=0.02, warmup=0, adaptive=False), plain, 4)
    moved = (before[name] - plain.get_parameter(name)).abs()
    torch.testing.assert_close(moved, torch.full_like(moved, 0.02), rtol=1e-3, atol=0)


@pytest.mark.parametrize("method", METHODS)
def test_only_what_can_be_pruned_is_touched(fresh, method):
    model = fresh()
    for n, p in model.named_parameters():
        p.requires_grad_(not n.startswith("model.0."))
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    s = make(model, method, coefficient=0.5, prune=PruneConfig(exclude=["model.3"]))
    train(s, model, 4)
    changed = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    assert changed and changed == s.penalised()
    assert not any(n.startswith("model.0.") or n.endswith("bias") for n in changed)
    last = [n for n in before if n.startswith("model.5.cv") and n.endswith(".2.weight")]
    assert all(torch.equal(before[n], p) for n, p in model.named_parameters() if n in last) or method not in SCALES


@pytest.mark.parametrize("method", SCALES)
def test_zeros_are_exact_and_come_to_the_ema(fresh, method):
    model = fresh()
    ema = deepcopy(model)
    s = make(model, method, coefficient=1.0)
    train(s, model, 4)
    zeros = torch.cat([(v == 0) for v in norms(s, model)])
    assert 0.1 < zeros.float().mean() < 0.9
    unpulled = {n: p.detach().clone() for n, p in ema.named_parameters()}
    s.follow(model, ema)
    gammas = {n for g in s.groups for n, _ in g.gammas}
    for name, p in ema.named_parameters():
        live = model.get_parameter(name)
        expected = torch.where(live == 0, 0, unpulled[name]) if name in gammas else unpulled[name]
        assert torch.equal(p, expected)


@pytest.mark.parametrize("method", SCALES)
def test_a_channel_without_scales_is_masked(fresh, method):
    """What leaves the head must not change when channels that are zero lose their shift as well, as when pruned."""
    model = fresh().eval()
    image, shape = torch.rand(1, 3, 64, 64), model.model[-1]
    before = model(image)[0].shape
    train(make(model, method, coefficient=0.8), model, 4)
    after = model(image)[0]
    assert after.shape == before and after.isfinite().all() and shape is model.model[-1]


@pytest.mark.parametrize("method", METHODS)
def test_the_strongest_channels_stay(fresh, method):
    model = fresh()
    s = make(model, method, coefficient=60.0, protect=0.25, threshold=0.01)
    train(s, model, 4, batches=20)
    for g, v in zip(s.groups, norms(s, model)):
        assert int((v > 0.01 * v.max()).sum()) >= min(g.size, max(FEWEST, round(0.25 * g.size))), g.name
    assert set(s.protected) == {g.name for g in s.groups}


@pytest.mark.parametrize(("batches", "momentum"), [(10, 0.2), (40, 0.1), (1000, 0.03)])
def test_statistics_keep_up_while_there_is_a_pull(fresh, batches, momentum):
    model = fresh()
    s = make(model, end=1)
    for epoch, wanted in enumerate([momentum, 0.03]):
        s.set_epoch(epoch)
        s.keep_up(model, batches)
        assert {m.momentum for m in model.modules() if isinstance(m, nn.BatchNorm2d)} == {wanted}


@pytest.mark.parametrize("method", METHODS)
def test_no_pull_outside_the_window(fresh, method):
    model = fresh()
    before = deepcopy(model.state_dict())
    s = make(model, method, epochs=6, prune_epochs=[4], start=2)
    assert [bool(p) for p in s.pulls] == [False, False, True, True, False, False]
    s.set_epoch(1)
    s.shrink(model, 1.0)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


@pytest.mark.parametrize("method", METHODS)
def test_a_resumed_run_goes_on_to_the_same_bits(fresh, method):
    def run(stop):
        model = fresh()
        s = make(model, method, epochs=6, coefficient=2.0, auto=True)
        for epoch in range(6):
            if epoch == stop:
                buffer = io.BytesIO()
                torch.save(s.state_dict(), buffer)
                s = make(model, method, epochs=6, coefficient=2.0, auto=True)
                s.load_state_dict(torch.load(io.BytesIO(buffer.getvalue()), weights_only=True))
            s.set_epoch(epoch)
            for step in range(3):
                torch.manual_seed(3 * epoch + step)
                for p in model.parameters():
                    p.grad = torch.randn_like(p)
                s.shrink(model, 1 / 3)
            s.controller.update(0.1, 0.5)
        return model.state_dict(), s.protected

    (one, held), (other, kept) = run(None), run(3)
    assert all(torch.equal(v, other[k]) for k, v in one.items())
    assert held == kept


@pytest.mark.parametrize("method", METHODS)
def test_goes_on_after_surgery(fresh, method):
    model = fresh()
    s = make(model, method, epochs=4, end=4, prune_epochs=[2], coefficient=0.5)
    s.set_epoch(0)
    sensitive(model, 1.0)
    s.shrink(model, 1.0)
    pruned = prune_with_plan(model.eval(), PruneConfig(method="l1", ratio=0.3))[0].train()
    s.rebuild(pruned)
    before = float(s.penalty(pruned))
    s.set_epoch(2)
    sensitive(pruned, 1.0)
    s.shrink(pruned, 1.0)
    s.set_epoch(3)
    s.shrink(pruned, 0.01)
    assert float(s.penalty(pruned)) < before
    assert [g.size for g in s.groups] != [g.size for g in make(model, method).groups]


@pytest.mark.parametrize("method", METHODS)
def test_penalty_is_a_scalar_that_falls(fresh, method):
    model = fresh()
    s = make(model, method)
    first = s.penalty(model)
    train(s, model, 4)
    assert first.shape == () and 0 < float(s.penalty(model)) < float(first)


def quadratic(model, sparsifier, epochs=4, steps=4):
    """Train scales towards where they were, each one with its own force, which is what a loss does near its minimum."""
    goal = {n: model.get_parameter(n).detach().clone() for g in sparsifier.groups for n, _ in g.gammas}
    torch.manual_seed(0)
    force = {n: torch.rand_like(g) for n, g in goal.items()}
    for epoch in range(epochs):
        sparsifier.set_epoch(epoch)
        for _ in range(steps):
            for n, g in goal.items():
                p = model.get_parameter(n).data
                p += 0.5 * force[n] * (g - p)
            sparsifier.shrink(model, 1 / steps)
    return torch.cat([v <= 0.01 * v.max() for v in norms(sparsifier, model)]).float().mean().item()


@pytest.mark.parametrize("method", METHODS)
def test_share_below_threshold_grows_with_the_coefficient(fresh, method):
    shares = []
    for coefficient in [0.5, 1, 3] if method in SCALES else [4, 12, 36]:
        model = fresh()
        shares.append(quadratic(model, make(model, method, coefficient=coefficient)))
    assert shares == sorted(shares) and shares[-1] > shares[0] + 0.1, shares


def test_a_method_of_the_user(fresh, tmp_path, monkeypatch):
    (tmp_path / "mine.py").write_text(
        "import torch\ndef halve(channels, pull):\n    return torch.full_like(channels.norms, 0.5)\n"
        "def wrong(channels, pull):\n    return torch.ones(3)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    model = fresh()
    before = model.get_parameter("model.0.bn.weight").detach().clone()
    s = make(model, "mine:halve", prune=PruneConfig())
    s.set_epoch(0)
    s.shrink(model, 1.0)
    assert torch.equal(model.get_parameter("model.0.bn.weight"), before / 2)
    s = make(model, "mine:wrong")
    s.set_epoch(0)
    with pytest.raises(UsageError, match="'mine:wrong' returned"):
        s.shrink(model, 1.0)


def test_the_manifest_and_modules_stay_plain(fresh):
    model = fresh()
    kinds = [type(m) for m in model.modules()]
    train(make(model, "group_sl"), model, 2)
    assert kinds == [type(m) for m in model.modules()] and not any(
        isinstance(m, nn.ParameterList) for m in model.modules()
    )
