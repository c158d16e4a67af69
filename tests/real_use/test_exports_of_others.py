# Copyright (C) yolo_ext authors. AGPL-3.0 licence.
"""ONNX files that other tools made: their INT8 is counted, and what is no YOLO is refused in one line."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from yolo_ext.core.errors import UsageError
from yolo_ext.deployment import Detector
from yolo_ext.deployment.export import export_onnx
from yolo_ext.deployment.runtime import conv_report, describe

FOREIGN = Path(__file__).parents[2].parent / "shared" / "weights" / "foreign"


class Reader:
    """Calibration data for ONNX Runtime's own quantizer."""

    def __init__(self) -> None:
        self.left = [{"images": np.random.default_rng(i).random((1, 3, 64, 64), np.float32)} for i in range(2)]

    def get_next(self):
        return self.left.pop() if self.left else None


def quantized(kind: str) -> Path:
    """Return an INT8 file that ONNX Runtime's quantizer makes of `tiny.pt`."""
    from onnxruntime.quantization import QuantFormat, QuantType, quantize_dynamic, quantize_static

    source, file = export_onnx("tiny.pt", "tiny.onnx", 64), Path(f"{kind}.onnx")
    if kind == "dynamic":
        quantize_dynamic(source, file, weight_type=QuantType.QUInt8)
    else:
        how = {"activation_type": QuantType.QUInt8, "weight_type": QuantType.QInt8, "per_channel": True}
        quantize_static(source, file, Reader(), QuantFormat[kind], op_types_to_quantize=["Conv"], **how)
    return file


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["dynamic", "QOperator", "QDQ"])
def test_integer_convolutions_of_other_quantizers_count(place, kind):
    file = quantized(kind)
    found = conv_report(file)
    assert found["convs"] == conv_report("tiny.onnx")["convs"] == len(found["int8"]) + len(found["float_convs"])
    assert found["int8_convs"] == len(found["int8"]) > 30
    assert describe(file)["precision"] == "int8"


@pytest.mark.slow
def test_bench_heads_their_row_int8(place, call):
    file = quantized("dynamic")
    status, text = call(f"bench models=tiny.onnx,{file} rounds=3 memory=False save_dir=run")
    assert status == 0 and "36 of 36" in text and "0 of 36" in text, text
    after = json.loads(Path("run/summary.json").read_text())["after"]
    assert after["int8_convs"] == 36 and after["latency_ms"]["ort_int8"] and not after["latency_ms"]["ort"]
    assert after["latency_ratio"]["ort_int8"]["significant"] is False, "three rounds prove nothing"


@pytest.mark.slow
@pytest.mark.parametrize("name", ["yolov8n_int8", "yolo26n_int8"])
def test_public_files_in_int8(name):
    if not (file := FOREIGN / f"{name}.onnx").is_file():
        pytest.skip("the public files are not beside the checkout")
    found = conv_report(file)
    assert found["int8_convs"] == found["convs"] > 60 or found["int8_convs"] > 60


def no_yolo(path: Path, shapes: dict[str, list], **metadata: str) -> Path:
    """Write a file that adds up its inputs of these shapes."""
    inputs = [helper.make_tensor_value_info(n, TensorProto.FLOAT, s) for n, s in shapes.items()]
    out = helper.make_tensor_value_info("out", TensorProto.FLOAT, None)
    graph = helper.make_graph([helper.make_node("Sum", [*shapes], ["out"], "sum")], "g", inputs, [out])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    helper.set_model_props(model, metadata)
    onnx.save(model, path)
    return path


NAMED = {"names": "{0: 'a'}", "task": "detect"}
STRANGE = {
    "no metadata": ({"x": [1, 3, 64, 64]}, {}),
    "two inputs": ({"a": [1, 3, 64, 64], "b": [1, 3, 64, 64]}, NAMED),
    "no images": ({"x": [1, 8]}, NAMED),
    "another task": ({"x": [1, 3, 64, 64]}, {**NAMED, "task": "depth"}),
    "names of words": ({"x": [1, 3, 64, 64]}, {**NAMED, "names": "a, b"}),
}


@pytest.mark.parametrize(("inputs", "metadata"), STRANGE.values(), ids=STRANGE)
def test_what_is_no_yolo_is_refused_in_one_line(place, call, inputs, metadata):
    file = no_yolo(Path("other.onnx"), inputs, **metadata)
    for function in (describe, Detector):
        with pytest.raises(UsageError, match=r"other\.onnx"):
            function(file)
    for words in (
        f"bench models={file}",
        f"verify model=tiny.pt onnx={file} data=shapes/data.yaml",
        f"label model={file} source=shapes/images/val out=out",
        f"predict model={file} compare=tiny.pt source=shapes/images/val",
    ):
        status, text = call(words)
        lines = [line for line in text.splitlines() if line.startswith("yolo-ext:")]
        assert status == 2 and len(lines) == 1 and "other.onnx" in lines[0], (words, text)


@pytest.mark.parametrize("command", ["predict source=shapes/images/val", "val data=shapes/data.yaml"])
@pytest.mark.parametrize("kind", ["no metadata", "no images"])
def test_the_commands_of_ultralytics_refuse_them_as_well(place, call, command, kind):
    inputs, metadata = STRANGE[kind]
    no_yolo(Path("other.onnx"), inputs, **metadata)
    status, text = call(f"{command} model=other.onnx imgsz=64 device=cpu project={place}/p")
    lines = [line for line in text.splitlines() if line.startswith("yolo-ext:")]
    assert status == 2 and len(lines) == 1 and "other.onnx" in lines[0], text


@pytest.mark.slow
@pytest.mark.parametrize("words", ["onnx=tiny.pt", "onnx=tiny.onnx int8=tiny.pt", "onnx=tiny.onnx int8=tiny.onnx"])
def test_verify_takes_onnx_files_only(place, call, words):
    export_onnx("tiny.pt", "tiny.onnx", 64)
    status, text = call(f"verify model=tiny.pt data=shapes/data.yaml {words}")
    assert status == 2 and "yolo-ext: '" in text and "Traceback" not in text
