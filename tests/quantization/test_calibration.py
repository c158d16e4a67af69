# Copyright (C) yolo_ext authors. AGPL-3.0 licence.
from __future__ import annotations

import dataclasses
import gc
import math
import sys
import types

import pytest
import torch
from torch import nn
from ultralytics.nn.modules import Conv
from ultralytics.utils import LOGGER

from yolo_ext.core.errors import UsageError
from yolo_ext.quantization.calibrate import calibrate
from yolo_ext.quantization.fake_quant import (
    get_state,
    insert_fake_quant,
    insert_plan,
    load_state,
    quantized_layers,
    quantizers,
    set_mode,
)
from yolo_ext.quantization.layers import weight_rows
from yolo_ext.quantization.observers import Histogram, observers
from yolo_ext.quantization.spec import PROFILES, Spec, plan_of

PROFILE = dataclasses.replace(PROFILES["ort-x86-vnni"], float_stem=False)


@pytest.fixture
def warnings(monkeypatch) -> list[str]:
    found: list[str] = []
    monkeypatch.setattr(LOGGER, "warning", lambda text, *_: found.append(text))
    return found


def small(**change: Spec) -> nn.Module:
    """Return two blocks with quantizers; `change` replaces specs of the second one."""
    torch.manual_seed(0)
    net = nn.Sequential(Conv(3, 8, 3), Conv(8, 4, 1))
    spec = Spec()
    sites = {"input": spec, "weight": Spec(4, symmetric=True, per_channel=True), "output": spec}
    insert_plan(net, {"0.conv": sites, "1.conv": {**sites, **change}})
    return net.eval()


def batch(n: int = 2) -> torch.Tensor:
    return torch.rand(n, 3, 16, 16, generator=torch.Generator().manual_seed(0))


@pytest.mark.slow
@pytest.mark.parametrize("observer", observers.names())
def test_calibrate_sets_ranges_and_restores_modes(build, images, observer):
    net = build("yolov8n.yaml").train()
    net.model[3].eval()
    insert_fake_quant(net, PROFILE)
    state = calibrate(net, [images[:2], images[2:]], observer)
    assert state == get_state(net) and len(state) == 57
    assert state["model.0.conv"]["input"] == {**Spec().as_dict(), "lo": 0.0, "hi": 1.0}
    ranges = [entry for sites in state.values() for site, entry in sites.items() if site != "weight"]
    assert len(ranges) == 2 * 57 and all(r["lo"] <= 0 <= r["hi"] and r["hi"] > r["lo"] for r in ranges)
    assert all(sites["output"]["lo"] >= -6 for sites in state.values())
    assert net.training and net.model[2].training and not net.model[3].training
    assert not any(m._forward_pre_hooks for m in net.modules())


@pytest.mark.slow
@pytest.mark.parametrize("profile", ["ort-x86-full", "tensorrt"])
def test_every_site_of_every_profile_gets_a_range(build, images, profile):
    net = build("yolo11n.yaml")
    insert_fake_quant(net, PROFILES[profile])
    state = calibrate(net, [images])
    sites = [(site, entry) for s in state.values() for site, entry in s.items() if site != "weight"]
    assert all(math.isfinite(e["lo"]) and e["lo"] <= 0 < e["hi"] for _, e in sites)
    assert len(sites) == len(list(quantizers(net)))


@pytest.mark.slow
def test_better_calibration_means_less_error(build, images):
    def error(observer: str) -> float:
        net = build("yolov8n.yaml")
        insert_fake_quant(net, PROFILE)
        calibrate(net, [images], observer)
        with torch.no_grad():
            quantized = net.model[:4](images)
            set_mode(net, "float")
            return float((quantized - net.model[:4](images)).square().mean())

    assert error("mse") <= error("minmax") * 1.02


def test_memory_does_not_grow_with_the_images():
    net = small()
    seen = []

    def batches():
        for _ in range(5):
            yield batch()
            seen.append(sum(h.counts.nbytes for h in gc.get_objects() if isinstance(h, Histogram)))

    calibrate(net, batches())
    assert len(set(seen)) == 1


def test_a_tensor_may_have_an_observer_of_its_own(monkeypatch):
    module = types.ModuleType("users_observer")
    module.wide = lambda h, spec, transform=None: (2 * h.lo, 2 * h.hi)
    monkeypatch.setitem(sys.modules, "users_observer", module)
    plain, mixed = small(), small(input=Spec(observer="users_observer:wide"))
    a, b = (calibrate(net, [batch()], "minmax") for net in (plain, mixed))
    assert b["1.conv"]["input"]["hi"] == pytest.approx(2 * a["1.conv"]["input"]["hi"])
    assert b["1.conv"]["output"] == a["1.conv"]["output"] and a["0.conv"] == b["0.conv"]


@pytest.mark.parametrize("per_channel", [True, False], ids=["channel", "tensor"])
def test_weight_ranges_come_from_the_rule_and_can_be_kept(per_channel):
    net = small(weight=Spec(4, symmetric=True, per_channel=per_channel))
    state = calibrate(net, [batch()], weight_observer="mse")
    ratio = state["1.conv"]["weight"]["ratio"]
    assert len(ratio) == (4 if per_channel else 1) and all(0.3 <= r <= 1 for r in ratio) and min(ratio) < 1
    assert calibrate(net, [batch()], weight_observer=None)["1.conv"]["weight"]["ratio"] == ratio
    assert "ratio" not in calibrate(net, [batch()])["1.conv"]["weight"]


@pytest.mark.parametrize("per_channel", [True, False], ids=["channel", "tensor"])
def test_mse_weights_have_less_error(per_channel):
    net = small(weight=Spec(3, symmetric=True, per_channel=per_channel))
    layer = dict((path, layer) for path, layer, _ in quantized_layers(net))["1.conv"]

    @torch.no_grad()
    def error(rule: str) -> float:
        calibrate(net, [batch()], weight_observer=rule)
        return float((layer.quantized_weight() - layer.weight).square().sum())

    assert error("mse") < error("max")


def test_rows_of_a_transposed_convolution_are_its_output_channels():
    net = nn.Sequential(nn.ConvTranspose2d(3, 5, 2))
    insert_plan(net, {"0": {"input": Spec(), "weight": Spec(symmetric=True, per_channel=True)}})
    assert torch.equal(weight_rows(net[0])[2], net[0].weight.detach()[:, 2].flatten())


def test_the_state_replays_on_another_copy():
    net, other = small(), small()
    state = calibrate(net, [batch()], weight_observer="mse")
    load_state(other, state)
    assert get_state(other) == state and plan_of(state).keys() == {"0.conv", "1.conv"}
    with torch.no_grad():
        assert torch.equal(net(batch()), other(batch()))


def test_a_dead_tensor_gets_a_range_and_a_warning(warnings):
    net = small()
    nn.init.zeros_(net[0].bn.weight)
    nn.init.zeros_(net[0].bn.bias)
    state = calibrate(net, [batch()])
    for path, site in (("0.conv", "output"), ("1.conv", "input")):
        assert (state[path][site]["lo"], state[path][site]["hi"]) == (0, 1)
    (text,) = warnings
    assert "0.conv (output), 1.conv (input)" in text and "0 to 1" in text


@pytest.mark.parametrize("given", [(math.nan, 1), (-math.inf, math.inf), (3, 2), (0, 0)], ids=str)
def test_an_unusable_range_of_a_rule_is_replaced(monkeypatch, warnings, given):
    module = types.ModuleType("users_bad_rule")
    module.rule = lambda h, spec, transform=None: given
    monkeypatch.setitem(sys.modules, "users_bad_rule", module)
    bad = calibrate(small(input=Spec(observer="users_bad_rule:rule")), [batch()], "minmax")
    good = calibrate(small(), [batch()], "minmax")
    assert bad["1.conv"]["input"]["hi"] == good["1.conv"]["input"]["hi"]
    (text,) = warnings
    assert "1.conv (input)" in text and "finite" in text


def test_single_values_that_are_not_finite_are_left_out(warnings):
    x = batch()
    x[0, 0, 0, 0] = math.nan
    state = calibrate(small(), [x], "minmax")
    assert all(math.isfinite(e["hi"]) for s in state.values() for k, e in s.items() if k != "weight")
    (text,) = warnings
    assert "left out NaN" in text and "0.conv (output)" in text


def test_a_tensor_without_any_finite_value_is_refused_by_name():
    net = small()
    nn.init.constant_(net[0].bn.bias, math.inf)
    with pytest.raises(UsageError, match=r"NaN or infinite values in 0\.conv \(output\).*quant.exclude"):
        calibrate(net, [batch()])


@pytest.mark.parametrize(
    ("net", "batches", "observer", "weights", "message"),
    [
        (nn.Sequential(Conv(3, 4)), [torch.rand(1, 3, 8, 8)], "mse", "max", "no fake quantizers"),
        (None, [], "mse", "max", "no images"),
        (None, [], "mes", "max", "Unknown observer 'mes'.*Did you mean 'mse'"),
        (None, [], "mse", "maxx", "Unknown weight observer 'maxx'.*Did you mean 'max'"),
    ],
    ids=["not inserted", "no batches", "observer", "weight observer"],
)
def test_usage_errors(net, batches, observer, weights, message):
    with pytest.raises(UsageError, match=message):
        calibrate(net or small(), batches, observer, weights)
