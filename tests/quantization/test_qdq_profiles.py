# Copyright (C) yolo_ext authors. AGPL-3.0 licence.
from __future__ import annotations

import collections
import warnings
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from onnx import numpy_helper
from torch import nn
from ultralytics import YOLO
from ultralytics.nn.modules import Bottleneck, Conv

from yolo_ext.core.errors import CheckFailed, UsageError
from yolo_ext.deployment.runtime import conv_report, run, session
from yolo_ext.quantization.calibrate import calibrate
from yolo_ext.quantization.fake_quant import insert_fake_quant, insert_plan
from yolo_ext.quantization.plan import make_plan
from yolo_ext.quantization.qdq import deployed, write_qdq
from yolo_ext.quantization.spec import PROFILES, Spec, State

INTEGER_OPS = ("QLinearConv", "QLinearSigmoid", "QLinearMul", "QLinearAdd", "QLinearConcat")


def optimized(path: Path) -> collections.Counter:
    """Return how often each operator is in the graph that ONNX Runtime runs."""
    options = ort.SessionOptions()
    options.log_severity_level, target = 3, path.with_suffix(".optimized.onnx")
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    options.optimized_model_filepath = str(target)
    ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return collections.Counter(n.op_type for n in onnx.load(target).graph.node)


def outputs(path: Path, images: torch.Tensor, simulate: bool = False) -> np.ndarray:
    opened = session(path, 1, simulate=simulate)
    return np.concatenate([run(opened, x[None].numpy())[0] for x in images])


@pytest.fixture(scope="module")
def written(exported, images, tmp_path_factory):
    """Return a function that gives a calibrated fake-quant model, its state, file and report, each made once."""
    made: dict = {}

    def write(yaml: str, name: str):
        if (yaml, name) not in made:
            pt, fp32 = exported(yaml)
            net = YOLO(pt).model.float().eval()
            net.model[-1].export, net.model[-1].format, net.model[-1].end2end = True, "onnx", False
            net.fuse(verbose=False)
            insert_fake_quant(net, PROFILES[name])
            state = calibrate(net, [images])
            out = tmp_path_factory.mktemp("qdq") / "int8.onnx"
            made[yaml, name] = net, state, out, write_qdq(fp32, out, state, PROFILES[name])
        return made[yaml, name]

    return write


ATTENTION = [("yolo26n.yaml", name) for name in ("ort-x86-full", "tensorrt")]


@pytest.mark.slow
@pytest.mark.parametrize(("yaml", "name"), [("yolov8n.yaml", name) for name in PROFILES] + ATTENTION)
def test_every_profile_computes_what_was_simulated(written, images, yaml, name):
    net, state, out, report = written(yaml, name)
    present = deployed(state, set(report["quantized"])).items()
    assert set(report["quantized"]) == {path for path, sites in present if "weight" in sites}
    with torch.no_grad():
        fake = net(images).numpy()
    simulated, real = outputs(out, images, simulate=True), outputs(out, images)
    for other in (fake, real):
        box, score = (np.abs(a - b) for a, b in zip(np.split(other, [4], 1), np.split(simulated, [4], 1)))
        assert box.mean() < 0.05 and score.max() < 0.03


@pytest.mark.slow
@pytest.mark.parametrize("name", PROFILES)
def test_storage_and_biases_are_those_of_the_profile(written, name):
    _, _, out, report = written("yolov8n.yaml", name)
    graph, profile = onnx.load(out).graph, PROFILES[name]
    tensors = {i.name: numpy_helper.to_array(i) for i in graph.initializer}
    zeros = [tensors[n.input[2]] for n in graph.node if n.op_type == "QuantizeLinear"]
    assert {z.dtype for z in zeros} == {np.dtype(np.int8 if profile.signed else np.uint8)}
    assert not profile.symmetric or not any(zeros)
    biases = [k for k in tensors if k.endswith("bias_quantized")]
    assert len(biases) == (len(report["quantized"]) if profile.int32_bias else 0)
    largest = {np.abs(v).max() for k, v in tensors.items() if k.endswith("weight_quantized")}
    assert largest == {2 ** (profile.weight_bits - 1) - 1}


@pytest.mark.slow
@pytest.mark.parametrize("yaml", ["yolov8n.yaml", "yolo26n.yaml"])
def test_full_profile_leaves_nothing_between_its_convolutions_in_float(written, yaml):
    _, state, out, report = written(yaml, "ort-x86-full")
    ops, convs = optimized(out), conv_report(out)
    activations = sum("activation" in sites for sites in state.values())
    assert convs["int8_convs"] == len(report["quantized"]) == ops["QLinearConv"]
    assert ops["QLinearSigmoid"] == ops["QLinearMul"] == activations > 40
    assert ops["QLinearAdd"] == sum("add" in sites for sites in state.values()) > 5
    assert ops["QLinearConcat"] > 12
    if yaml == "yolov8n.yaml":  # no attention: floats come into the integer part at one place, behind the stem
        assert ops["QuantizeLinear"] == 1


@pytest.mark.parametrize("name", ["openvino", "tensorrt"])
def test_an_addition_and_its_convolution_read_one_quantized_tensor(written, name):
    _, state, out, _ = written("yolov8n.yaml", name)
    readers = collections.defaultdict(set)
    for node in onnx.load(out).graph.node:
        for x in node.input:
            readers[x].add(node.name)
    residuals = [path for path, sites in state.items() if "residual" in sites]
    assert len(residuals) == 6
    for path in residuals:
        scope = f"/{path.replace('.m.', '/m.')}"
        assert readers[f"{path}.residual_dequantized"] == {f"{scope}/Add", f"{scope}/cv1/conv/Conv"}


def test_openvino_runs_its_profile(written, images):
    openvino = pytest.importorskip("openvino")
    _, _, out, _ = written("yolov8n.yaml", "openvino")
    compiled = openvino.Core().compile_model(str(out), "CPU")
    got = np.concatenate([compiled(x[None].numpy())[0] for x in images])
    assert np.abs(got - outputs(out, images, simulate=True))[:, 4:].max() < 0.03


class Tiny(nn.Module):
    """Each kind of layer, and what quantized tensors pass on their way."""

    def __init__(self, groups: int = 1) -> None:
        super().__init__()
        self.stem, self.m = Conv(3, 8, 3, 2), Bottleneck(8, 8)
        self.up = nn.ConvTranspose2d(16, 8, 2, 2, groups=groups)
        self.last, self.linear, self.tokens = Conv(8, 8, 1, act=nn.ReLU()), nn.Linear(48, 40), nn.Linear(4, 6)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        x = self.stem(image)
        y = self.last(self.up(torch.cat([nn.functional.max_pool2d(x, 3, 1, 1), self.m(x)], 1)))
        z = self.linear(nn.functional.adaptive_max_pool2d(image, 4).flatten(1))  # nn.Linear as Gemm, then as MatMul
        return torch.cat([y.flatten(1), self.tokens(z.reshape(-1, 10, 4)).flatten(1)], 1)


def tiny(folder: Path, groups: int = 1) -> tuple[Tiny, Path, torch.Tensor]:
    torch.manual_seed(0)
    net, x = Tiny(groups).eval(), torch.rand(8, 3, 16, 16)
    for m in net.modules():
        if isinstance(m, nn.BatchNorm2d):
            m.running_var.uniform_(0.05, 0.2)
            nn.init.normal_(m.bias, 0, 0.3)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(net, (x,), folder / "fp32.onnx", dynamo=False, opset_version=18, input_names=["images"])
    return net, folder / "fp32.onnx", x


def everything(net: nn.Module, name: str, **changes) -> dict:
    """Return the plan of a profile with all layers in it, changed for all sites."""
    named = [{"op_names": ["stem.conv", "up", "linear", "tokens"], "quant_types": ["input", "weight"]}]
    return make_plan(net, PROFILES[name], config_list=[*named, {"op_types": ["default"], **changes}])[0]


CASES = [
    pytest.param(name, changes, groups, id=f"{name}-{text}")
    for name, changes, groups, text in [
        ("ort-x86", {}, 1, "8"),
        ("ort-x86", {"granularity": "per_tensor"}, 1, "per tensor"),
        ("ort-x86", {"quant_bits": 6}, 1, "6"),  # with fewer the rounding of INT32 biases shows in layers this small
        ("ort-x86", {"quant_bits": 6, "quant_scheme": "symmetric"}, 1, "6 symmetric"),
        ("openvino", {"quant_bits": 4}, 1, "4"),
        ("openvino", {"quant_bits": 2, "quant_scheme": "symmetric"}, 1, "2 symmetric"),
        ("ort-x86", {"quant_scheme": "symmetric"}, 1, "symmetric"),
        ("ort-x86", {"quant_bits": {"weight": 3, "input": 8, "output": 8}}, 1, "w3"),
        ("ort-x86", {"quant_bits": {"weight": 12, "input": 16, "output": 10}}, 1, "w12 a16"),
        ("ort-x86", {"quant_bits": 16, "quant_scheme": "symmetric"}, 1, "16 symmetric"),
        ("ort-x86", {"quant_bits": {"weight": 8, "input": 16, "output": 16}}, 1, "a16"),
        ("ort-x86", {}, 2, "groups"),
        ("ort-x86-full", {}, 1, "8"),
        ("ort-x86-full", {"quant_bits": 5}, 1, "5"),
        ("ort-arm", {"quant_bits": 6}, 2, "6 groups"),
        ("openvino", {"quant_bits": 16}, 1, "16"),
        ("tensorrt", {"granularity": "per_tensor"}, 1, "per tensor"),
    ]
]


@pytest.mark.parametrize(("name", "changes", "groups"), CASES)
def test_every_layer_and_bit_width_computes_what_was_simulated(tmp_path, name, changes, groups):
    net, fp32, x = tiny(tmp_path, groups)
    plan = everything(net, name, **changes)
    with torch.no_grad():
        full = net(x).numpy()
        insert_plan(net, plan)
        state = calibrate(net, [x], observer="minmax", weight_observer="mse")
        fake = net(x).numpy()
    report = write_qdq(fp32, tmp_path / "q.onnx", state, PROFILES[name])
    layers = ["stem.conv", "m.cv1.conv", "m.cv2.conv", "up", "last.conv", "linear", "tokens"]
    assert (report["quantized"], report["float"]) == (layers, {}) and [*report["convs"].values()] == layers[:5]
    simulated = session(tmp_path / "q.onnx", 1, simulate=True)
    got = simulated.run(None, {"images": x.numpy()})[0]
    real = session(tmp_path / "q.onnx", 1).run(None, {"images": x.numpy()})[0]
    bits = {spec.bits for sites in plan.values() for spec in sites.values()}
    for part in (slice(None, -60), slice(-60, None)):  # convolutions, linear layers
        error = np.abs(fake - full)[:, part].mean()
        assert error > 1e-6
        assert np.abs(got - fake)[:, part].mean() < 0.2 * error + 2e-6  # codes that rounding flips
        # ONNX Runtime makes float biases INT32 itself, in steps of input times weight, which shows at few bits.
        assert np.abs(real - got)[:, part].mean() < (0.2 * error if bits <= {7, 8} else error + 1e-3)
    opset = onnx.load(tmp_path / "q.onnx").opset_import[0].version
    assert opset == (21 if max(bits) > 8 else 18)
    if name == "ort-x86" and max(bits) <= 8:  # those with a quantized output; fewer bits need not be slower
        assert conv_report(tmp_path / "q.onnx")["int8_convs"] == 4


def test_weights_alone_and_inputs_alone(tmp_path):
    net, fp32, x = tiny(tmp_path)
    plan = {"m.cv1.conv": {"weight": Spec(8, True, True)}, "last.conv": {"input": Spec(8)}}
    insert_plan(net, plan)
    state = calibrate(net, [x])
    write_qdq(fp32, tmp_path / "q.onnx", state, PROFILES["ort-x86"])
    counts = collections.Counter(n.op_type for n in onnx.load(tmp_path / "q.onnx").graph.node)
    assert counts["QuantizeLinear"] == 1 and counts["DequantizeLinear"] == 2
    with torch.no_grad():
        fake = net(x).numpy()
    got = session(tmp_path / "q.onnx", 1).run(None, {"images": x.numpy()})[0]
    assert np.abs(got - fake).max() < 1e-2


@pytest.mark.parametrize(
    ("path", "site", "change", "error", "message"),
    [
        (
            "m.cv1.conv",
            "output",
            {"lo": 0.0, "hi": 0.0},
            UsageError,
            r"range of the output of 'm.cv1.conv' is \[0.0, 0",
        ),
        ("m.cv1.conv", "output", {"hi": float("inf")}, UsageError, "finite"),
        ("m.cv1.conv", "output", {"lo": float("nan")}, UsageError, "finite"),
        ("m", "add", {"lo": 1.0, "hi": 2.0}, UsageError, "holds zero"),
        ("m.cv1.conv", "weight", {"ratio": [1.0] * 3}, CheckFailed, "4 channels, its state 3"),
        ("stem.conv", "activation", None, CheckFailed, "'m.cv1.conv' has no input range"),
        ("nothing", "add", {"lo": 0.0, "hi": 1.0, "bits": 8}, CheckFailed, "lacks 1 layers .* 'nothing'"),
    ],
    ids=["empty", "infinite", "nan", "without zero", "ratio", "float producer", "unknown sum"],
)
def test_errors_name_the_layer(tmp_path, path, site, change, error, message):
    net, fp32, x = tiny(tmp_path)
    plan = make_plan(net, PROFILES["ort-x86-full"], config_list=[{"default": "all"}, {"op_names": ["stem.conv"]}])[0]
    insert_plan(net, plan)
    state: State = calibrate(net, [x])
    if change is None:
        del state[path][site]
    else:
        state.setdefault(path, {}).setdefault(site, {}).update(change)
    with pytest.raises(error, match=message):
        write_qdq(fp32, tmp_path / "q.onnx", state, PROFILES["ort-x86-full"])
    assert not (tmp_path / "q.onnx").exists()
