# Copyright (C) yolo_ext authors. AGPL-3.0 licence.
from __future__ import annotations

import collections
import dataclasses
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from onnx import numpy_helper
from ultralytics import YOLO

from yolo_ext.errors import CheckFailed, UsageError
from yolo_ext.quantization import fake_quant as fq
from yolo_ext.quantization.calibration import calibrate
from yolo_ext.quantization.profiles import PROFILES, Profile
from yolo_ext.quantization.qdq import deployed_ranges, quant_params, write_qdq

MODELS = ["yolov8n.yaml", "yolo11n.yaml", "yolo26n.yaml", "yolov5n.yaml"]


def session(path: Path, simulate: bool = False, dump: Path | None = None) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    if simulate:
        options.add_session_config_entry("session.disable_quant_qdq", "1")
    if dump:
        options.optimized_model_filepath = str(dump)
    return ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def run(s: ort.InferenceSession, images: torch.Tensor, outputs: list[str] | None = None) -> list[np.ndarray]:
    each = [s.run(outputs, {"images": i[None].numpy()}) for i in images]
    return [np.concatenate(o) for o in zip(*each)]


def op_counts(path: Path) -> collections.Counter:
    return collections.Counter(n.op_type for n in onnx.load(path).graph.node)


def quantize(pt: Path, profile: Profile, images: torch.Tensor) -> tuple[torch.nn.Module, fq.Ranges]:
    """Return the fused, calibrated fake-quant model in its export form, and its ranges."""
    net = YOLO(pt).model.float().eval()
    net.model[-1].export, net.model[-1].format, net.model[-1].end2end = True, "onnx", False
    net.fuse(verbose=False)
    fq.insert_fake_quant(net, profile)
    return net, calibrate(net, [images])


@pytest.mark.parametrize("name", PROFILES)
@pytest.mark.parametrize("yaml", MODELS)
def test_runtime_runs_what_was_simulated(exported, images, tmp_path, yaml, name):
    profile = PROFILES[name]
    pt, fp32 = exported(yaml)
    net, ranges = quantize(pt, profile, images)
    out = tmp_path / "int8.onnx"
    report = write_qdq(fp32, out, ranges, profile)
    int8 = session(out, dump=tmp_path / "optimized.onnx")

    # Every convolution with ranges runs in INT8, no other does.
    assert set(report["quantized"]) == set(ranges)
    assert op_counts(tmp_path / "optimized.onnx")["QLinearConv"] == len(ranges)
    convs = sum(n.op_type == "Conv" for n in onnx.load(fp32).graph.node)
    assert len(report["quantized"]) + len(report["float"]) == convs

    # torch fake quant = simulated ONNX = INT8 ONNX, up to codes that rounding flips and later layers spread.
    with torch.no_grad():
        torch_fq = net(images).numpy()
    (simulated,), (real,), (full,) = (run(s, images) for s in (session(out, simulate=True), int8, session(fp32)))
    for other in (torch_fq, real):
        box, score = (np.abs(a - b) for a, b in zip(np.split(other, [4], 1), np.split(simulated, [4], 1)))
        assert box.mean() < 0.05 and score.max() < 0.03
    assert 0 < np.abs(simulated - full)[:, 4:].max() < 0.2


def test_first_layers_have_the_same_codes(exported, images, tmp_path):
    profile = dataclasses.replace(PROFILES["ort-x86-vnni"], float_stem=False)
    pt, fp32 = exported("yolov8n.yaml")
    net, ranges = quantize(pt, profile, images)
    write_qdq(fp32, tmp_path / "int8.onnx", ranges, profile)
    model = onnx.load(tmp_path / "int8.onnx")
    wanted = [f"{p}.output_quantized" for p in ("model.0.conv", "model.1.conv", "model.2.cv1.conv")]
    model.graph.output.extend(onnx.helper.make_tensor_value_info(n, onnx.TensorProto.UINT8, None) for n in wanted)
    onnx.save(model, tmp_path / "probe.onnx")
    got = run(session(tmp_path / "probe.onnx", simulate=True), images, wanted)
    codes = {}
    for path, site, q, _ in fq.quantizers(net):
        if site == "output":
            scale, zero = quant_params([float(q.lo), float(q.hi)], q.qmax)
            q.register_forward_hook(
                lambda m, i, o, k=path, s=scale, z=zero: codes.update({k: (o / float(s)).round().numpy() + int(z)})
            )
    with torch.no_grad():
        net(images)
    for name, onnx_codes in zip(wanted, got):
        difference = np.abs(codes[name.removesuffix(".output_quantized")] - onnx_codes)
        assert difference.max() <= 2 and (difference > 0).mean() < 0.02


@pytest.mark.parametrize("fuse_silu", [True, False])
def test_file_is_small_and_keeps_its_metadata(exported, images, tmp_path, fuse_silu):
    profile = dataclasses.replace(PROFILES["ort-x86"], fuse_silu=fuse_silu)
    pt, fp32 = exported("yolov8n.yaml")
    _, ranges = quantize(pt, profile, images)
    before = fp32.read_bytes()
    out = tmp_path / "sub" / "int8.onnx"
    write_qdq(fp32, out, ranges, profile)
    assert fp32.read_bytes() == before
    assert out.stat().st_size < 0.3 * fp32.stat().st_size
    source, model = onnx.load(fp32), onnx.load(out)
    assert [(p.key, p.value) for p in model.metadata_props] == [(p.key, p.value) for p in source.metadata_props]
    assert {o.domain: o.version for o in source.opset_import}.items() <= {
        o.domain: o.version for o in model.opset_import
    }.items()
    gelu = sum(n.op_type == "QuickGelu" for n in model.graph.node)
    silu = sum(n.op_type == "Sigmoid" for n in source.graph.node) - 1  # one more sits behind the class scores
    assert gelu == (silu if fuse_silu else 0) and silu > 50
    large = [i for i in model.graph.initializer if i.data_type == onnx.TensorProto.FLOAT and np.prod(i.dims) > 2e4]
    assert not large
    codes = [numpy_helper.to_array(i) for i in model.graph.initializer if i.name.endswith("weight_quantized")]
    assert len(codes) == len(ranges) and max(np.abs(c).max() for c in codes) == 63
    names = [i.name for i in model.graph.initializer] + [o for n in model.graph.node for o in n.output]
    assert len(names) == len(set(names))


@pytest.mark.parametrize("yaml", ["yolov8n.yaml", "yolo26n.yaml"])
def test_rewrites_without_ranges_change_no_number(exported, images, tmp_path, yaml):
    _, fp32 = exported(yaml)
    report = write_qdq(fp32, tmp_path / "float.onnx", {}, PROFILES["ort-x86"])
    assert not report["quantized"] and set(report["float"].values()) == {"no calibrated range"}
    (expected,), (got,) = run(session(fp32), images), run(session(tmp_path / "float.onnx"), images)
    assert np.abs(got - expected).max() < 1e-3  # pixels; the class scores are far below
    for softmax in (n for n in onnx.load(tmp_path / "float.onnx").graph.node if "dfl/Softmax" in n.name):
        assert softmax.attribute[0].i == 3


def test_ranges_of_an_unfused_end_to_end_model_find_their_branch(exported, images, tmp_path):
    pt, fp32 = exported("yolo26n.yaml")
    net = YOLO(pt).model.float().eval()
    fq.insert_fake_quant(net, PROFILES["ort-x86"])
    report = write_qdq(fp32, tmp_path / "int8.onnx", calibrate(net, [images]), PROFILES["ort-x86"])
    assert len(report["quantized"]) == 95
    dense, sparse = "model.23.cv2.0.0.conv", "model.23.one2one_cv2.0.0.conv"
    r = {dense: {"input": [0, 1]}, sparse: {"input": [0, 2]}, "model.0.conv": {"input": [0, 3]}}
    assert deployed_ranges(r, {dense, "model.0.conv"}) == {p: r[p] for p in (dense, "model.0.conv")}
    assert deployed_ranges(r, {sparse}) == {p: r[p] for p in (sparse, "model.0.conv")}  # what is lacking is noticed


def test_without_output_quantizers_nothing_follows_the_convolution(exported, images, tmp_path):
    profile = dataclasses.replace(PROFILES["ort-x86"], output_quantizers=False)
    pt, fp32 = exported("yolov8n.yaml")
    _, ranges = quantize(pt, profile, images)
    write_qdq(fp32, tmp_path / "int8.onnx", ranges, profile)
    graph = onnx.load(tmp_path / "int8.onnx").graph
    assert not [n for n in graph.node if ".output" in n.name and n.op_type == "QuantizeLinear"]


def conv_file(path: Path, weight: np.ndarray, bias: np.ndarray | None, opset: int = 18, groups: int = 1) -> Path:
    """Write a file with one convolution on 8 channels."""
    names = ["model.0.conv.weight"] + ([] if bias is None else ["model.0.conv.bias"])
    tensors = [numpy_helper.from_array(a, n) for a, n in zip([weight, bias], names)]
    node = onnx.helper.make_node("Conv", ["images", *names], ["y"], "/model.0/conv/Conv", group=groups)
    info = onnx.helper.make_tensor_value_info
    graph = onnx.helper.make_graph(
        [node], "g", [info("images", 1, [1, 8, 6, 6])], [info("y", 1, [1, len(weight), 6, 6])], tensors
    )
    onnx.save(onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", opset)], ir_version=8), path)
    return path


@pytest.mark.parametrize("with_bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("groups", [1, 2, 8])
def test_single_convolutions(tmp_path, groups, with_bias):
    rng = np.random.default_rng(0)
    weight = rng.normal(size=(16, 8 // groups, 1, 1)).astype(np.float32)
    bias = rng.normal(size=16).astype(np.float32) if with_bias else None
    fp32 = conv_file(tmp_path / "a.onnx", weight, bias, groups=groups)
    x = torch.rand(2, 8, 6, 6)
    (expected,) = run(session(fp32), x)
    ranges = {"model.0.conv": {"input": [0.0, 1.0], "output": [float(expected.min()), float(expected.max())]}}
    report = write_qdq(fp32, tmp_path / "b.onnx", ranges, PROFILES["ort-x86-vnni"])
    assert report == {"quantized": ["model.0.conv"], "float": {}}
    (got,) = run(session(tmp_path / "b.onnx", dump=tmp_path / "c.onnx"), x)
    assert op_counts(tmp_path / "c.onnx")["QLinearConv"] == 1
    assert np.abs(got - expected).max() < 0.03 * np.abs(expected).max()


def test_bias_of_a_dead_channel_does_not_overflow(tmp_path):
    weight = np.ones((2, 8, 1, 1), np.float32)
    weight[1] = 1e-20
    fp32 = conv_file(tmp_path / "a.onnx", weight, np.array([0.5, 3.0], np.float32))
    ranges = {"model.0.conv": {"input": [0.0, 1.0], "output": [0.0, 10.0]}}
    write_qdq(fp32, tmp_path / "b.onnx", ranges, PROFILES["ort-x86"])
    (got,) = run(session(tmp_path / "b.onnx"), torch.ones(1, 8, 6, 6))
    assert got[0, :, 0, 0] == pytest.approx([8.5, 3.0], abs=0.05)


@pytest.mark.parametrize("problem", ["missing", "not onnx", "opset", "half", "unknown conv"])
def test_errors(tmp_path, problem):
    path, dtype = tmp_path / "a.onnx", np.float16 if problem == "half" else np.float32
    if problem == "not onnx":
        path.write_bytes(b"not a model")
    elif problem != "missing":
        conv_file(path, np.ones((2, 8, 1, 1), dtype), None, opset=12 if problem == "opset" else 18)
    ranges = {"model.9.conv" if problem == "unknown conv" else "model.0.conv": {"input": [0.0, 1.0]}}
    message = {"missing": "no ONNX file", "not onnx": "Cannot read", "opset": "opset=18", "half": "float16"}
    error = CheckFailed if problem == "unknown conv" else UsageError
    with pytest.raises(error, match=message.get(problem, "lacks 1 convolutions")):
        write_qdq(path, tmp_path / "b.onnx", ranges, PROFILES["ort-x86"])
    assert not (tmp_path / "b.onnx").exists()
