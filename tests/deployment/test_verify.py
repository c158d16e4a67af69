# Copyright (C) yolo_ext authors. AGPL-3.0 licence.
from __future__ import annotations

import xml.etree.ElementTree as ET
from copy import deepcopy
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnxruntime.quantization import CalibrationDataReader, QuantType, quantize_static
from ultralytics.nn.tasks import DetectionModel
from ultralytics.utils import YAML

from yolo_ext.core.errors import UsageError
from yolo_ext.deployment.export import export_onnx
from yolo_ext.deployment.runtime import load_image
from yolo_ext.deployment.verify import CHECKS, verify, verify_detections, verify_int8, verify_tensors
from yolo_ext.quantization.calibrate import calibrate
from yolo_ext.quantization.fake_quant import get_state, insert_fake_quant, load_state
from yolo_ext.quantization.qdq import write_qdq
from yolo_ext.quantization.spec import PROFILES
from yolo_ext.stock.accuracy import accuracy

SIZE = 96
SHARED = Path(__file__).parents[2].parent / "shared"
BCCD, BCCD_WEIGHTS = SHARED / "data" / "bccd", SHARED / "weights" / "bccd_yolov8n_192.pt"


@pytest.fixture(scope="session")
def quantized(exported, images, tmp_path_factory) -> Path:
    """Return a U8S8 per-channel 7-bit Q/DQ file of YOLOv8n with the head's last convs in float."""
    fp32, out = exported("yolov8n")[1], tmp_path_factory.mktemp("int8") / "int8.onnx"
    feeds = iter([{"images": load_image(path, SIZE)} for path in images])

    class Reader(CalibrationDataReader):
        def get_next(self):
            return next(feeds, None)

    nodes = onnx.load(fp32).graph.node
    keep = [n.name for n in nodes if n.op_type != "Conv" or ".2/Conv" in n.name or "dfl" in n.name]
    kinds = {"activation_type": QuantType.QUInt8, "weight_type": QuantType.QInt8}
    quantize_static(fp32, out, Reader(), nodes_to_exclude=keep, per_channel=True, reduce_range=True, **kinds)
    return out


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "end2end"),
    [
        pytest.param("yolov5n", False, id="v5"),
        pytest.param("yolov8n", False, id="v8"),
        pytest.param("yolo11n", False, id="v11"),
        pytest.param("yolo26n", False, id="v26-one-to-many"),
        pytest.param("yolo26n", True, id="v26-nms-free"),
        pytest.param("yolov8n-seg", False, id="segment"),
    ],
)
def test_a_sound_export_passes(name, end2end, exported, images):
    model, path = exported(name, end2end)
    found = verify(model, path, images, SIZE)
    assert found["passed"], found["checks"]
    assert found["tensors"]["inputs"] == len(images) + 3
    assert found["detections"]["detections"] > 10  # the comparison is not empty
    assert found["weights"]["compared"] > 30 and "first_difference" not in found
    more = {"extra_max"} if name.endswith("-seg") else set()
    assert {c["key"] for c in found["checks"]} == {"weight_max", "score_max", "box_max", "matched", *more}


FAMILIES = ("yolov5n", "yolov6n", "yolov8n", "yolov9t", "yolov10n", "yolo11n", "yolo12n", "yolo26n")
TASKS = [
    f"{family}{task}" for family in ("yolov8n", "yolo11n", "yolo26n") for task in ("-seg", "-pose", "-obb", "-cls")
]


@pytest.mark.matrix
@pytest.mark.parametrize("name", [*FAMILIES, *TASKS])
def test_every_family_and_task_passes(name, exported, images):
    model, path = exported(name)
    found = verify(model, path, images, SIZE)
    assert found["passed"], found["checks"]
    assert name.endswith("-cls") or found["detections"]["detections"] > 10


@pytest.mark.matrix
@pytest.mark.parametrize("name", ["yolov10n", "yolo26n", "yolo26n-seg", "yolo26n-pose", "yolo26n-obb"])
def test_every_nms_free_head_passes(name, exported, images):
    model, path = exported(name, end2end=True)
    found = verify(model, path, images, SIZE)
    assert found["passed"], found["checks"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "imgsz", "options", "shapes"),
    [
        pytest.param("yolov8n", 96, {"dynamic": True}, [[1, 96, 96], [3, 96, 96], [2, 128, 96]], id="open"),
        pytest.param("yolov8n", 96, {"batch": 3}, [[3, 96, 96]], id="three"),
        pytest.param("yolov8n", (64, 96), {}, [[1, 64, 96]], id="rectangle"),
        pytest.param("yolov8n", 96, {"nms": {"conf": 0.1, "max_det": 50}}, [[1, 96, 96]], id="nms"),
        pytest.param(
            "yolov8n", 96, {"nms": {}, "dynamic": True, "batch": 3}, [[1, 96, 96], [3, 96, 96], [2, 128, 96]],
            id="open-nms",
        ),
        pytest.param("yolov8n", 96, {"half": True}, [[1, 96, 96]], id="half"),
        pytest.param("yolov8n", 96, {"simplify": False, "opset": 13}, [[1, 96, 96]], id="unsimplified"),
        pytest.param("yolov8n-obb", 96, {"nms": {}}, [[1, 96, 96]], id="nms-obb", marks=pytest.mark.matrix),
        pytest.param("yolov8n-seg", 96, {"nms": {}}, [[1, 96, 96]], id="nms-segment", marks=pytest.mark.matrix),
        pytest.param("yolov8n-seg", 96, {"half": True}, [[1, 96, 96]], id="half-segment", marks=pytest.mark.matrix),
        pytest.param("yolov8n-cls", 96, {"dynamic": True}, [[1, 96, 96], [3, 96, 96], [2, 97, 96]], id="open-classes"),
    ],
)  # fmt: skip
def test_shapes_and_options_of_the_export(name, imgsz, options, shapes, exported, images):
    model, path = exported(name, imgsz=imgsz, **options)
    found = verify(model, path, images, imgsz)
    assert found["passed"], found["checks"]
    assert [[b, h, w] for b, _, h, w in found["tensors"]["shapes"]] == shapes
    assert found["precision"] == ("fp16" if "half" in options else "fp32")


def test_classification(exported, images):
    model, path = exported("yolov8n-cls")
    found = verify(model, path, images, SIZE)
    assert found["passed"] and "detections" not in found
    assert {c["key"] for c in found["checks"]} == {"weight_max", "score_max"}  # there are no boxes


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "end2end", "weight"),
    [
        pytest.param("yolov8n", False, "model.0.conv.weight", id="stem"),
        pytest.param("yolov8n", False, "model.22.cv2.0.2.weight", id="box-output"),
        pytest.param("yolov8n", False, "model.22.cv3.0.2.weight", id="class-output"),
        pytest.param("yolo26n", True, "model.0.conv.weight", id="nms-free-stem"),
        pytest.param("yolov8n-seg", False, "model.22.cv4.0.2.weight", id="mask-output"),
    ],
)
def test_one_weight_off_by_a_percent_is_caught(name, end2end, weight, exported, images, spoil, tmp_path):
    model, path = exported(name, end2end)
    found = verify(model, spoil(path, tmp_path / "bad.onnx", weight, 1.01), images, SIZE)
    assert not found["passed"]
    assert found["first_difference"]["module"] == weight.removesuffix(".weight")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "weight"),
    [
        pytest.param("yolov8n", "model.0.conv.weight", id="stem"),
        pytest.param("yolov8n", "model.12.cv1.conv.weight", id="neck"),
        pytest.param("yolov8n", "model.22.cv2.0.2.bias", id="box-bias"),
        pytest.param("yolov8n-cls", "model.9.linear.weight", id="classifier"),
    ],
)
def test_one_value_off_by_a_percent_is_caught(name, weight, exported, images, spoil, tmp_path):
    model, path = exported(name)
    found = verify(model, spoil(path, tmp_path / "bad.onnx", weight, 1.01, value=1), images, SIZE)
    assert not next(c for c in found["checks"] if c["key"] == "weight_max")["passed"]
    different = found["weights"]["different"]
    assert list(different) == [weight] and different[weight]["values"] == 1
    assert different[weight]["error"] == pytest.approx(0.01, rel=0.2)
    assert found["first_difference"]["module"] == weight.rpartition(".")[0]


@pytest.mark.slow
def test_nan_fails(exported, images, spoil, tmp_path):
    model, path = exported("yolov8n")
    bad = spoil(path, tmp_path / "bad.onnx", "model.0.conv.weight", float("nan"))
    checks = {c["key"]: c["passed"] for c in verify(model, bad, images, SIZE)["checks"]}
    assert not checks["score_max"] and not checks["matched"]


@pytest.mark.slow
def test_another_model_is_caught_by_its_detections(build, exported, images, tmp_path):
    other = export_onnx(build("yolov8n", seed=1), tmp_path / "m.onnx", SIZE)
    assert verify_detections(exported("yolov8n")[0], other, images, SIZE)["matched"] < 0.5


def test_no_detections_on_either_side_is_agreement(exported, images):
    model, path = exported("yolov8n")
    found = verify_detections(model, path, images, SIZE, conf=0.999)
    assert found["matched"] == 1.0 and found["detections"] == 0


@pytest.mark.slow
def test_the_source_model_is_untouched(exported, images):
    model, path = exported("yolo26n", True)
    before, end2end = {k: v.clone() for k, v in model.state_dict().items()}, model.end2end
    verify_tensors(model, path, images[:1], SIZE)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert not model.model[-1].export and model.end2end is end2end


@pytest.mark.slow
def test_int8_runs_as_its_graph_says(exported, quantized, images):
    fp32 = exported("yolov8n")[1]
    found = verify_int8(fp32, quantized, images, SIZE)
    assert found["convs"] == 64 and found["int8_convs"] == 57
    assert found["anchors"] >= 100
    assert found["simulation"]["box_mean"] < CHECKS["int8_box_mean"][1]
    assert found["float"]["box_mean"] > found["simulation"]["box_mean"] > 0


@pytest.mark.slow
def test_int8_limits_decide(exported, quantized, images, monkeypatch):
    monkeypatch.setitem(CHECKS, "int8_box_mean", ("", 1e-9, 1e-9))
    model, fp32 = exported("yolov8n")
    found = verify(model, fp32, images, SIZE, int8_onnx=quantized)
    checks = {c["key"]: c for c in found["checks"]}
    assert not found["passed"] and not checks["int8_box_mean"]["passed"] and checks["box_max"]["passed"]


# Three ways to run one quantized model -------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def three(exported, images, tmp_path_factory) -> tuple[DetectionModel, Path]:
    """Return a fake-quantized YOLOv8n and the INT8 file that was written from it."""
    net, fp32 = exported("yolov8n")
    net = deepcopy(net)
    insert_fake_quant(net, PROFILES["ort-x86"])
    state = calibrate(net, [torch.from_numpy(np.concatenate([load_image(p, SIZE) for p in images]))], "minmax")
    out = tmp_path_factory.mktemp("three") / "int8.onnx"
    write_qdq(fp32, out, state, PROFILES["ort-x86"])
    return net, out


@pytest.mark.slow
def test_torch_simulation_and_int8_agree(exported, three, images):
    net, int8 = three
    before = get_state(net)
    model, fp32 = exported("yolov8n")
    found = verify(model, fp32, images, SIZE, int8_onnx=int8, fake_quant=net)
    checks = {c["key"]: c for c in found["checks"]}
    assert found["passed"], found["checks"]
    assert {"torch_box_mean", "torch_score_max", "int8_box_mean", "int8_score_max"} <= set(checks)
    gap = found["int8"]["torch"]
    assert 0 < gap["box_mean"] < found["int8"]["float"]["box_mean"]
    assert gap["score_p99"] <= gap["score_max"]
    floor = found["int8"]["rounding"]
    assert checks["torch_box_mean"]["limit"] == max(CHECKS["torch_box_mean"][1], 2 * floor["box_mean"])
    assert CHECKS["torch_box_mean"][1] == 0.3  # bounds of one call must not stay
    assert get_state(net) == before


@pytest.mark.slow
@pytest.mark.parametrize("site", ["input", "output"])
def test_a_file_with_another_range_than_torch_is_caught(exported, three, images, site):
    net, int8 = deepcopy(three[0]), three[1]
    state = get_state(net)
    for sites in state.values():
        sites[site]["hi"] *= 0.3
    load_state(net, state)
    model, fp32 = exported("yolov8n")
    found = verify(model, fp32, images, SIZE, int8_onnx=int8, fake_quant=net)
    assert {c["key"] for c in found["checks"] if not c["passed"]} & {"torch_box_mean", "torch_score_max"}


@pytest.mark.parametrize(
    ("change", "text"),
    [
        pytest.param({"images": []}, "No images", id="no-images"),
        pytest.param({"images": ["absent.png"]}, "absent.png", id="missing-image"),
        pytest.param({"onnx_path": "absent.onnx"}, "absent.onnx", id="missing-onnx"),
        pytest.param({"weights": "absent.pt"}, "absent.pt", id="missing-weights"),
        pytest.param({"data": "absent.yaml"}, "absent.yaml", id="missing-data"),
    ],
)
def test_wrong_input(change, text, exported, images):
    model, path = exported("yolov8n")
    with pytest.raises(UsageError, match=text):
        verify(**{"weights": model, "onnx_path": path, "images": images[:1], "imgsz": SIZE, **change})


@pytest.mark.parametrize(
    ("file", "imgsz", "text"),
    [
        pytest.param("int8", SIZE, "is quantized.*int8=", id="quantized"),
        pytest.param("fp32", 64, "static graph.*imgsz=64", id="other-size"),
    ],
)
def test_files_that_cannot_be_compared(file, imgsz, text, exported, quantized, images):
    model, fp32 = exported("yolov8n")
    with pytest.raises(UsageError, match=text):
        verify(model, {"int8": quantized, "fp32": fp32}[file], images, imgsz)


def test_different_class_counts_are_refused(exported, images):
    other = DetectionModel("yolov8n.yaml", nc=2, verbose=False)
    with pytest.raises(UsageError, match="2 and 3 classes"):
        verify_detections(other, exported("yolov8n")[1], images, SIZE)
    with pytest.raises(UsageError, match="shapes"):
        verify_tensors(other, exported("yolov8n")[1], images, SIZE)


def write_dataset(folder: Path, pictures: list[Path], labels: list[list[str]], names: list[str]) -> Path:
    for sub in ("images", "labels"):
        (folder / sub).mkdir(parents=True)
    for picture, lines in zip(pictures, labels):
        (folder / "images" / picture.name).write_bytes(picture.read_bytes())
        (folder / "labels" / f"{picture.stem}.txt").write_text("\n".join(lines))
    YAML.save(folder / "data.yaml", {"path": str(folder), "train": "images", "val": "images", "names": names})
    return folder / "data.yaml"


@pytest.mark.slow
@pytest.mark.parametrize("end2end", [False, True], ids=["one-to-many", "nms-free"])
def test_map_agrees_and_leaves_nothing(end2end, exported, images, tmp_path, monkeypatch):
    model, path = exported("yolo26n", end2end)
    labels = [[f"{i % 3} 0.5 0.5 0.4 0.4", "1 0.25 0.25 0.3 0.3"] for i in range(len(images))]
    data = write_dataset(tmp_path / "set", images, labels, ["a", "b", "c"])
    (tmp_path / "cwd").mkdir()
    monkeypatch.chdir(tmp_path / "cwd")
    a, b = accuracy(model, data, SIZE, end2end=end2end), accuracy(path, data, SIZE)
    assert a == pytest.approx(b, abs=2e-3)
    assert set(a) == {"map50", "map", "f1", "f1_conf", "images"} and 0 <= a["f1"] <= 1 and 0 <= a["f1_conf"] <= 1
    assert not list(Path().iterdir())


@pytest.mark.bccd
@pytest.mark.skipif(not BCCD_WEIGHTS.is_file(), reason="BCCD data and weights are not beside the checkout")
def test_bccd_base_model(tmp_path):
    names, labels, pictures = ["Platelets", "RBC", "WBC"], [], []
    for stem in (BCCD / "ImageSets/Main/test.txt").read_text().split():
        root = ET.parse(BCCD / "Annotations" / f"{stem}.xml").getroot()
        lines = []
        for item in root.iter("object"):
            x1, y1, x2, y2 = (float(item.findtext(f"bndbox/{k}", "")) for k in ("xmin", "ymin", "xmax", "ymax"))
            x, y, w, h = (x1 + x2) / 1280, (y1 + y2) / 960, (x2 - x1) / 640, (y2 - y1) / 480
            lines.append(f"{names.index(item.findtext('name', ''))} {x} {y} {w} {h}")
        labels.append(lines)
        pictures.append(BCCD / "JPEGImages" / f"{stem}.jpg")
    data = write_dataset(tmp_path / "bccd", pictures, labels, names)
    path = export_onnx(BCCD_WEIGHTS, tmp_path / "m.onnx", 192)
    found = verify(BCCD_WEIGHTS, path, pictures[:16], 192, data=data)
    assert found["passed"], found["checks"]
    assert found["map"]["onnx"]["map"] == pytest.approx(0.557, abs=0.003)
    assert found["detections"]["detections"] > 400
