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
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import numpy_helper
from ultralytics import YOLO

from yolo_ext.core.errors import CheckFailed, UsageError
from yolo_ext.quantization import fake_quant as fq
from yolo_ext.quantization.calibrate import calibrate
from yolo_ext.quantization.qdq import deployed, write_qdq
from yolo_ext.quantization.qdq_nodes import quant_params
from yolo_ext.quantization.spec import PROFILES, Profile, Spec, State

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


def entry(lo: float, hi: float) -> dict:
    """Return an 8-bit activation site."""
    return {"bits": 8, "lo": lo, "hi": hi}


WEIGHT = {"bits": 8, "symmetric": True, "per_channel": True}


def op_counts(path: Path) -> collections.Counter:
    return collections.Counter(n.op_type for n in onnx.load(path).graph.node)


def quantize(pt: Path, profile: Profile, images: torch.Tensor) -> tuple[torch.nn.Module, State]:
    """Return the fused, calibrated fake-quant model in its export form, and its state."""
    net = YOLO(pt).model.float().eval()
    net.model[-1].export, net.model[-1].format, net.model[-1].end2end = True, "onnx", False
    net.fuse(verbose=False)
    fq.insert_fake_quant(net, profile)
    return net, calibrate(net, [images])


@pytest.mark.slow
@pytest.mark.parametrize(("yaml", "name"), [*((m, "ort-x86") for m in MODELS), ("yolov8n.yaml", "ort-x86-vnni")])
def test_runtime_runs_what_was_simulated(exported, images, tmp_path, yaml, name):
    profile = PROFILES[name]
    pt, fp32 = exported(yaml)
    net, state = quantize(pt, profile, images)
    out = tmp_path / "int8.onnx"
    report = write_qdq(fp32, out, state, profile)
    int8 = session(out, dump=tmp_path / "optimized.onnx")

    # Every convolution of the state runs in INT8, no other does.
    state = deployed(state, set(report["quantized"]))  # without the head branch that is not in the file
    assert set(report["quantized"]) == set(state)
    assert op_counts(tmp_path / "optimized.onnx")["QLinearConv"] == len(state)
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


@pytest.mark.slow
def test_first_layers_have_the_same_codes(exported, images, tmp_path):
    profile = dataclasses.replace(PROFILES["ort-x86-vnni"], float_stem=False)
    pt, fp32 = exported("yolov8n.yaml")
    net, state = quantize(pt, profile, images)
    write_qdq(fp32, tmp_path / "int8.onnx", state, profile)
    model = onnx.load(tmp_path / "int8.onnx")
    wanted = [f"{p}.output_quantized" for p in ("model.0.conv", "model.1.conv", "model.2.cv1.conv")]
    model.graph.output.extend(onnx.helper.make_tensor_value_info(n, onnx.TensorProto.UINT8, None) for n in wanted)
    onnx.save(model, tmp_path / "probe.onnx")
    got = run(session(tmp_path / "probe.onnx", simulate=True), images, wanted)
    codes = {}
    for path, site, q, _ in fq.quantizers(net):
        if site == "output":
            params = quant_params(state[path][site])
            q.register_forward_hook(
                lambda m, i, o, k=path, p=params: codes.update({k: (o / float(p.scale)).round().numpy() + int(p.zero)})
            )
    with torch.no_grad():
        net(images)
    for name, onnx_codes in zip(wanted, got):
        difference = np.abs(codes[name.removesuffix(".output_quantized")] - onnx_codes)
        assert difference.max() <= 2 and (difference > 0).mean() < 0.02


@pytest.mark.slow
@pytest.mark.parametrize("fuse_silu", [True, False])
def test_file_is_small_and_keeps_its_metadata(exported, images, tmp_path, fuse_silu):
    profile = dataclasses.replace(PROFILES["ort-x86"], fuse_silu=fuse_silu)
    pt, fp32 = exported("yolov8n.yaml")
    _, state = quantize(pt, profile, images)
    before = fp32.read_bytes()
    out = tmp_path / "sub" / "int8.onnx"
    write_qdq(fp32, out, state, profile)
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
    assert len(codes) == len(state) and max(np.abs(c).max() for c in codes) == 63
    names = [i.name for i in model.graph.initializer] + [o for n in model.graph.node for o in n.output]
    assert len(names) == len(set(names))


@pytest.mark.parametrize(
    ("profile", "axis"), [("ort-x86", 3), ("ort-x86-full", 3), ("ort-arm", 3), ("openvino", 1), ("tensorrt", 1)]
)
@pytest.mark.parametrize("yaml", ["yolov8n.yaml", "yolo26n.yaml"])
def test_rewrites_without_ranges_change_no_number(exported, images, tmp_path, yaml, profile, axis):
    _, fp32 = exported(yaml)
    report = write_qdq(fp32, tmp_path / "float.onnx", {}, PROFILES[profile])
    assert not report["quantized"] and set(report["float"].values()) == {"no calibrated range"}
    (expected,), (got,) = run(session(fp32), images), run(session(tmp_path / "float.onnx"), images)
    assert np.abs(got - expected).max() < 1e-3  # pixels; the class scores are far below
    for softmax in (n for n in onnx.load(tmp_path / "float.onnx").graph.node if "dfl/Softmax" in n.name):
        assert softmax.attribute[0].i == axis  # the last one costs OpenVINO 2 % of the time of YOLOv8n


@pytest.mark.slow
def test_the_state_of_an_unfused_end_to_end_model_find_their_branch(exported, images, tmp_path):
    pt, fp32 = exported("yolo26n.yaml")
    net = YOLO(pt).model.float().eval()
    fq.insert_fake_quant(net, PROFILES["ort-x86"])
    report = write_qdq(fp32, tmp_path / "int8.onnx", calibrate(net, [images]), PROFILES["ort-x86"])
    assert len(report["quantized"]) == 95
    dense, sparse = "model.23.cv2.0.0.conv", "model.23.one2one_cv2.0.0.conv"
    r = {path: {"input": entry(0, hi)} for hi, path in enumerate((dense, sparse, "model.0.conv"), 1)}
    assert deployed(r, {dense, "model.0.conv"}) == {p: r[p] for p in (dense, "model.0.conv")}
    assert deployed(r, {sparse}) == {p: r[p] for p in (sparse, "model.0.conv")}  # what is lacking is noticed


def test_without_output_quantizers_nothing_follows_the_convolution(exported, images, tmp_path):
    profile = dataclasses.replace(PROFILES["ort-x86"], output=False)
    pt, fp32 = exported("yolov8n.yaml")
    _, state = quantize(pt, profile, images)
    write_qdq(fp32, tmp_path / "int8.onnx", state, profile)
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
    output = entry(float(expected.min()), float(expected.max()))
    state = {"model.0.conv": {"input": entry(0.0, 1.0), "weight": WEIGHT, "output": output}}
    report = write_qdq(fp32, tmp_path / "b.onnx", state, PROFILES["ort-x86-vnni"])
    assert report == {"quantized": ["model.0.conv"], "float": {}, "convs": {"/model.0/conv/Conv": "model.0.conv"}}
    (got,) = run(session(tmp_path / "b.onnx", dump=tmp_path / "c.onnx"), x)
    assert op_counts(tmp_path / "c.onnx")["QLinearConv"] == 1
    assert np.abs(got - expected).max() < 0.03 * np.abs(expected).max()


def test_bias_of_a_dead_channel_does_not_overflow(tmp_path):
    weight = np.ones((2, 8, 1, 1), np.float32)
    weight[1] = 1e-20
    fp32 = conv_file(tmp_path / "a.onnx", weight, np.array([0.5, 3.0], np.float32))
    state = {"model.0.conv": {"input": entry(0.0, 1.0), "weight": WEIGHT, "output": entry(0.0, 10.0)}}
    write_qdq(fp32, tmp_path / "b.onnx", state, PROFILES["ort-x86"])
    (got,) = run(session(tmp_path / "b.onnx"), torch.ones(1, 8, 6, 6))
    assert got[0, :, 0, 0] == pytest.approx([8.5, 3.0], abs=0.05)


@pytest.mark.parametrize("problem", ["missing", "not onnx", "opset", "wide", "half", "unknown conv"])
def test_errors(tmp_path, problem):
    path, dtype = tmp_path / "a.onnx", np.float16 if problem == "half" else np.float32
    if problem == "not onnx":
        path.write_bytes(b"not a model")
    elif problem != "missing":
        conv_file(path, np.ones((2, 8, 1, 1), dtype), None, opset={"opset": 12, "wide": 17}.get(problem, 18))
    weight = {**WEIGHT, "bits": 16 if problem == "wide" else 8}
    path_of = "model.9.conv" if problem == "unknown conv" else "model.0.conv"
    state = {path_of: {"input": entry(0.0, 1.0), "weight": weight}}
    message = {"missing": "no ONNX file", "not onnx": "Cannot read", "opset": "opset=18", "half": "float16"}
    message["wide"] = "opset 17; .* more than 8 bits needs 18"
    error = CheckFailed if problem == "unknown conv" else UsageError
    with pytest.raises(error, match=message.get(problem, "lacks 1 layers")):
        write_qdq(path, tmp_path / "b.onnx", state, PROFILES["ort-x86"])
    assert not (tmp_path / "b.onnx").exists()


@given(
    lo=st.floats(-1e3, 0, width=32),
    hi=st.floats(0.125, 1e3, width=32),
    bits=st.integers(2, 16),
    symmetric=st.booleans(),
    signed=st.booleans(),
)
@settings(max_examples=60, deadline=None)
def test_stored_codes_are_those_of_the_fake_quantizer(lo, hi, bits, symmetric, signed):
    q = fq.RangeQuantizer(Spec(bits, symmetric))
    q.set_range(lo, hi)
    params = quant_params({"bits": bits, "symmetric": symmetric, "lo": float(q.lo), "hi": float(q.hi)}, signed)
    kind, zero = np.iinfo(params.zero.dtype), int(params.zero)
    assert kind.bits == (8 if bits <= 8 else 16) and (kind.min < 0) == signed

    def stored(x: np.ndarray) -> np.ndarray:
        low, high = params.clip or (-np.inf, np.inf)
        return np.clip(np.rint(np.clip(x, low, high) / params.scale) + zero, kind.min, kind.max) - zero

    steps = np.unique(np.linspace(*(np.rint(np.float32([lo, hi]) / params.scale)), 50).round()).astype(np.float32)
    inside = q(torch.from_numpy(steps * params.scale)).numpy() / params.scale
    assert (stored(steps * params.scale) == inside.round()).all()
    far = np.float32([4 * lo - 1, 4 * hi + 1])
    extra = stored(far) - (q(torch.from_numpy(far)).numpy() / params.scale).round()
    assert extra[1] == 0 and extra[0] == (-1 if symmetric and bits in (8, 16) and stored(far)[0] < -q.spec.qmax else 0)
