# Copyright (C) yolo_ext authors. AGPL-3.0 licence.
from __future__ import annotations

import dataclasses

import pytest
from torch import nn

from yolo_ext.core.errors import UsageError
from yolo_ext.quantization import spec
from yolo_ext.quantization.plan import float_modules, quantizable_blocks, sums
from yolo_ext.quantization.spec import PROFILES, has_vnni, resolve_profile


@pytest.mark.parametrize(
    ("flags", "expected"),
    [("avx2 avx512f", False), ("avx2 avx512_vnni", True), ("avx2 avx_vnni", True), ("xavx_vnnix", False)],
    ids=["avx512", "avx512_vnni", "avx_vnni", "other"],
)
def test_has_vnni(tmp_path, flags, expected):
    (tmp_path / "cpuinfo").write_text(f"flags\t: fpu sse {flags} aes\n")
    assert has_vnni(tmp_path / "cpuinfo") is expected


def test_has_vnni_is_conservative_without_cpuinfo(tmp_path):
    assert has_vnni(tmp_path / "absent") is False


@pytest.mark.parametrize(("vnni", "name", "bits"), [(False, "ort-x86", 7), (True, "ort-x86-vnni", 8)])
def test_auto_picks_by_cpu(monkeypatch, vnni, name, bits):
    monkeypatch.setattr(spec, "has_vnni", lambda: vnni)
    profile = resolve_profile("auto")
    assert (profile.name, profile.weight_bits, profile.activation_bits) == (name, bits, 8)


def test_names_match_keys():
    assert {p.name: p for p in PROFILES.values()} == PROFILES
    assert all(resolve_profile(name) is p and p.summary for name, p in PROFILES.items())


@pytest.mark.parametrize("name", ["ort-x86", "ort-x86-full"])
def test_vnni_only_widens_the_weights(name):
    seven, eight = PROFILES[name], PROFILES[f"{name}-vnni"]
    same = {f.name for f in dataclasses.fields(seven)} - {"name", "summary", "weight_bits"}
    assert all(getattr(seven, f) == getattr(eight, f) for f in same)
    assert (seven.weight_bits, eight.weight_bits) == (7, 8)


def test_unknown_profile_names_the_nearest():
    with pytest.raises(UsageError, match=r"Did you mean 'ort-x86-vnni'\? Legal: auto, ort-x86, "):
        resolve_profile("ort-x86-vnn")


@pytest.mark.parametrize(
    ("yaml", "quantized", "head", "dfl"),
    [("yolov8n.yaml", 57, 6, 1), ("yolo11n.yaml", 81, 6, 1), ("yolo26n.yaml", 96, 6, 0), ("yolov5n.yaml", 69, 6, 1)],
    ids=["v8", "11", "26", "v5"],
)
def test_float_modules_of_fused_models(build, yaml, quantized, head, dfl):
    net = build(yaml).fuse(verbose=False)
    reasons = float_modules(net)
    convs = {p for p, m in net.named_modules() if isinstance(m, nn.Conv2d)}
    assert len(convs - set(reasons)) == len(quantizable_blocks(net)) == quantized
    assert sum("head output" in r for r in reasons.values()) == head
    assert sum("DFL" in r for r in reasons.values()) == dfl
    assert len(reasons) == head + dfl


@pytest.mark.parametrize(
    ("yaml", "branches"), [("yolov9t.yaml", (".conv1.", ".conv2.")), ("yolov10s.yaml", (".conv",))]
)
def test_merged_branches_are_float_until_fused(build, yaml, branches):
    net = build(yaml)
    merged = [p for p, r in float_modules(net).items() if "merged on fuse" in r]
    assert merged and all(any(b in p for b in branches) for p in merged)
    assert not any("merged" in r for r in float_modules(net.fuse(verbose=False)).values())


def test_sums_are_the_bottlenecks_with_a_shortcut(build):
    assert sums(build("yolov8n.yaml")) == [f"model.{i}" for i in ("2.m.0", "4.m.0", "4.m.1", "6.m.0", "6.m.1", "8.m.0")]
