# Copyright (C) yolo_ext authors. AGPL-3.0 licence.
"""`device=`: one check for every command that takes it, and where what is measured runs."""

from __future__ import annotations

from pathlib import Path

import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper

from yolo_ext import cli
from yolo_ext.commands import COMMANDS, keys, needed, takes_native
from yolo_ext.core.errors import UsageError
from yolo_ext.deployment.detector import GPU, open_session, session_options
from yolo_ext.stock import device_of
from yolo_ext.stock.context import alone
from yolo_ext.stock.load import gpu_runs

TAKE_IT = [row.name for row in COMMANDS if "device" in keys(row.fn) or takes_native(row.fn)]
ABSENT = {
    "number": 77, "text": "77", "CUDA": "cuda:77", "two": "0,77", "list": [0, 77], "word": "abacus", "fraction": 3.5,
    "truth": True, "negative": -7,
}  # fmt: skip


def test_what_measures_or_trains_takes_a_device():
    takes = {"compress", "train", "prune", "distill", "quantize", "label", "predict", "export", "verify", "bench"}
    assert {*takes, "compare", "sensitivity"} == {*TAKE_IT}


@pytest.mark.parametrize("name", TAKE_IT)
def test_a_device_that_is_not_there(name, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    given = {k: "gone.pt" for k in needed(COMMANDS[name].fn)} | {"device": 77}
    assert cli.main([name, *(f"{k}={v}" for k, v in given.items())]) == 2
    text = "".join(capsys.readouterr())
    assert "'device=77' is no device of this machine" in text and "Legal: cpu" in text and "Leave device out" in text
    assert "Traceback" not in text and not [*tmp_path.iterdir()]
    with pytest.raises(UsageError, match="device=77"):
        COMMANDS[name].fn(**given)


@pytest.mark.parametrize("name", ABSENT)
def test_devices_that_are_not_there(name):
    with pytest.raises(UsageError, match=r"is no device of this machine.*Legal: cpu"):
        device_of(ABSENT[name])


@pytest.mark.parametrize("given", ["cpu", torch.device("cpu"), "intel:gpu"], ids=str)
def test_devices_that_torch_runs_on_the_cpu(given):
    assert device_of(given) == torch.device("cpu")


def test_without_a_device_it_is_a_gpu_where_there_is_one():
    assert device_of().type == ("cuda" if torch.cuda.is_available() else "cpu")


def graph(folder: Path, op: str) -> Path:
    """Write an ONNX file of one node."""
    made = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1]) for name in "xy"]
    inputs = ["x"] if op == "Relu" else ["q", "s"]
    nodes = [helper.make_node("QuantizeLinear", ["x", "s"], ["q"])] if op != "Relu" else []
    scale = [helper.make_tensor("s", TensorProto.FLOAT, [], [0.1])] if op != "Relu" else []
    whole = helper.make_graph([*nodes, helper.make_node(op, inputs, ["y"])], "g", made[:1], made[1:], scale)
    onnx.save(
        helper.make_model(whole, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), folder / f"{op}.onnx"
    )
    return folder / f"{op}.onnx"


PROVIDERS = {"none": ["CPUExecutionProvider"], "GPU": [GPU, "CPUExecutionProvider"]}


@pytest.mark.parametrize("op", ["Relu", "DequantizeLinear"])
@pytest.mark.parametrize("there", PROVIDERS)
def test_where_an_exported_file_is_evaluated(tmp_path, monkeypatch, op, there):
    """A float file where ONNX Runtime has a GPU for it; INT8 is what the integer kernels of the CPU make of a file."""
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: PROVIDERS[there])
    assert gpu_runs(graph(tmp_path, op)) == (op == "Relu" and there == "GPU")
    assert not gpu_runs(tmp_path / "x_openvino_model")


def test_providers_of_a_session(tmp_path, monkeypatch):
    """ONNX Runtime is asked for the GPU only where it has one, in full float32, and for the CPU behind it."""
    asked = []
    monkeypatch.setattr(onnxruntime, "InferenceSession", lambda *_, providers: asked.append(providers))
    file = graph(tmp_path, "Relu")
    for there in PROVIDERS:
        monkeypatch.setattr(onnxruntime, "get_available_providers", lambda there=there: PROVIDERS[there])
        open_session(file, session_options(1), 3)
        open_session(file, session_options(1))
    gpu = (GPU, {"device_id": 3, "use_tf32": 0})
    cpu = ["CPUExecutionProvider"]
    assert asked == [cpu, cpu, [gpu, *cpu], cpu]


def test_one_rank_measures_alone(monkeypatch):
    """Ultralytics' validators ask these numbers whether to wait for others and to gather what they found."""
    from ultralytics.engine import validator
    from ultralytics.models.yolo.detect import val as detect
    from ultralytics.models.yolo.segment import val

    for module in (validator, detect):
        monkeypatch.setattr(module, "RANK", 0)
        monkeypatch.setattr(module, "LOCAL_RANK", 0, raising=False)  # not each release has it everywhere
    with alone(val.SegmentationValidator):
        assert {getattr(m, k) for m in (validator, detect) for k in ("RANK", "LOCAL_RANK")} == {-1}
    assert validator.RANK == detect.RANK == validator.LOCAL_RANK == 0
