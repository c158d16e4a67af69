# Copyright (C) yolo_ext authors. AGPL-3.0 licence.
"""Models and data sets read from files as Ultralytics reads them, and models exported as it exports them."""

from copy import deepcopy
from importlib import import_module
from itertools import product
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import cv2
import numpy as np
import torch
from torch import nn
from ultralytics import RTDETR, YOLO
from ultralytics.data import ClassificationDataset, build_yolo_dataset
from ultralytics.data import utils as data_utils
from ultralytics.data.augment import CenterCrop, LetterBox
from ultralytics.data.converter import merge_multi_segment

from ultralytics.data.utils import (  # isort: skip
    IMG_FORMATS, check_cls_dataset, check_det_dataset, find_dataset_yaml, img2label_paths,
)  # fmt: skip
from ultralytics.engine import exporter
from ultralytics.engine.exporter import export_formats
from ultralytics.engine.results import Results
from ultralytics.nn import tasks
from ultralytics.nn.autobackend import check_class_names
from ultralytics.nn.modules import block, conv, head
from ultralytics.nn.tasks import BaseModel, load_checkpoint, torch_safe_load, yaml_model_load
from ultralytics.utils import ASSETS, DEFAULT_CFG_DICT, SETTINGS, checks, patches
from ultralytics.utils.downloads import GITHUB_ASSETS_NAMES

from yolo_ext.core.config import comma_list
from yolo_ext.core.errors import UsageError, refused
from yolo_ext.stock.context import get_cfg, quiet, replaced
from yolo_ext.stock.model import input_channels, task_of
from yolo_ext.stock.safety import check_image as check_image
from yolo_ext.stock.safety import open_image as open_image
from yolo_ext.stock.safety import safely

LABEL_ARGS = ("overlap_mask", "mask_ratio", "single_cls")  # how a model's own training read the labels


def label_problem(file: Path, nc: int, kpt_shape: tuple[int, int] = (0, 0), pose: bool = False) -> str:
    """Return why Ultralytics would leave out the image of a label file, "" where it takes it; rows may be poses."""
    image = str(ASSETS / "bus.jpg")  # any that is whole: its own one is checked elsewhere
    *_, corrupt, told = data_utils.verify_image_label((image, str(file), "", pose, nc, *kpt_shape, False))
    return " ".join(told.partition("image/label: ")[2].split())[:200] if corrupt else ""


def det_dataset(file: Path, content: dict[str, Any]) -> dict[str, Any]:
    """Return what Ultralytics makes of the content of a data.yaml; no images and no font for plots are fetched."""
    held = SimpleNamespace(load=lambda *_, **__: {**content, "yaml_file": str(file)})
    with replaced(data_utils, YAML=held, check_font=lambda _: None):
        return check_det_dataset(str(file), autodownload=False)


def load_model(path: str | Path) -> tuple[nn.Module, dict[str, Any]]:
    """Return a YOLO or RT-DETR of a ``.pt`` or YAML, in float32 and eval mode, and the dict of its checkpoint or {}."""
    p = Path(path)
    if p.suffix in {".yaml", ".yml"}:
        with refused(f"Cannot build a model from '{p}' ({{why}}). Give a YOLO model YAML or a .pt."), safely():
            transformer = yaml_model_load(p)["head"][-1][2] == "RTDETRDecoder"
            built: Any = RTDETR(str(p)).model if transformer else YOLO(str(p), verbose=False).model
            return built.float().eval(), {}
    if p.suffix != ".pt":
        legal = "a trained YOLO '.pt' or a model '.yaml'; for an exported file, the .pt that it was written from"
        raise UsageError(f"Cannot load model '{path}'. Legal: {legal}.")
    if not p.is_file() and p.name not in GITHUB_ASSETS_NAMES:  # official weights are fetched, as `yolo` does
        raise UsageError(f"Model file '{path}' does not exist. Give the path of a trained YOLO, such as best.pt.")
    wrong = f"'{path}' is not a YOLO checkpoint that this installation can load ({{why}})"
    mend = "Give a .pt of Ultralytics or yolo-ext; `yolo-ext export` also takes one of Ultralytics' QAT (quantize=8)"
    with refused(f"{wrong}. {mend}."), safely():
        model, ckpt = load_checkpoint(str(p))
    if not isinstance(model, BaseModel):
        raise UsageError(f"'{path}' holds a {type(model).__name__}, not a YOLO model. Give a .pt of Ultralytics.")
    return model.float().eval().requires_grad_(True), ckpt


def register_layers(modules: Any) -> None:
    """Import the user's modules, by dotted path, so that model YAMLs and checkpoints can name the layers in them."""
    for name in comma_list(modules) if modules else ():
        hint = "Give dotted paths that Python can import from this folder, such as modules=mypkg.layers"
        with refused(f"Cannot import 'modules={name}' ({{why}}). {hint}."):  # whatever the user's code does meanwhile
            found = vars(import_module(name))
        layers = {k: v for k, v in found.items() if isinstance(v, type) and issubclass(v, nn.Module)}
        package = name.partition(".")[0]
        layers = {k: v for k, v in layers.items() if v.__module__.partition(".")[0] == package}  # the rest is imported
        if not layers:
            raise UsageError(f"'modules={name}' defines no torch.nn.Module. Name the module that does.")
        if taken := [k for k, v in layers.items() if getattr(tasks, k, v) is not v]:
            own = f"defines {', '.join(taken)}, which is a layer of Ultralytics"
            raise UsageError(f"'modules={name}' {own}. Give it another name.")
        torch.serialization.add_safe_globals([*layers.values()])
        for home, (k, v) in product((tasks, block, conv, head), layers.items()):
            setattr(home, k, getattr(home, k, v))  # in tasks for YAMLs; a fork pickles its layers from the others


def raw_checkpoint(path: str | Path) -> dict[str, Any]:
    """Return the dict of a checkpoint as it was saved, with whatever is inside its model."""
    with safely():
        return torch_safe_load(str(path))[0]


def float_model(weights: str | Path | nn.Module) -> Any:
    """Return an FP32 CPU copy of a model, ``.pt`` or model YAML in eval mode, unfused if the source is."""
    with quiet():
        model: Any = deepcopy(weights) if isinstance(weights, nn.Module) else load_model(weights)[0]
    model = model.cpu().float().eval().requires_grad_(False)
    model.criterion = None
    model.task = getattr(model, "task", None) or task_of(model)  # absent on a module built from YAML
    return model


def gpu_runs(exported: Path) -> bool:
    """Tell whether ONNX Runtime has a GPU for a file; INT8 is what the integer kernels of a CPU make of one."""
    import onnxruntime

    there = exported.suffix == ".onnx" and "CUDAExecutionProvider" in onnxruntime.get_available_providers()
    return there and b"DequantizeLinear" not in exported.read_bytes()


def read_image(path: str | Path, channels: int = 3) -> np.ndarray | None:
    """Return an image (H, W, C) as Ultralytics reads it for a model of C channels, three as BGR; None if it cannot."""
    flag = {1: cv2.IMREAD_GRAYSCALE, 3: cv2.IMREAD_COLOR}.get(channels, cv2.IMREAD_UNCHANGED)
    image = patches.imread(str(path), flag)
    if image is not None and image.shape[2] != channels:
        raise UsageError(f"Image '{path}' has {image.shape[2]} channels, the model takes {channels}. Give others.")
    return image


def planes(image: np.ndarray) -> np.ndarray:
    """Return an image (H, W, C) as a model sees it: (C, H, W), with three channels as RGB."""
    return (image[..., ::-1] if image.shape[2] == 3 else image).transpose(2, 0, 1)


def as_results(found: Any) -> Results:
    """Return `Detections` of a picture as Ultralytics' own; of other channels than three, the first ones are shown."""
    image = found.source if isinstance(found.source, np.ndarray) else read_image(found.source)
    image = np.atleast_3d(image)
    image = np.ascontiguousarray(image[..., :3] if image.shape[2] >= 3 else image[..., :1].repeat(3, 2))
    given = {k: torch.from_numpy(v) for k in ("masks", "keypoints", "probs") if (v := getattr(found, k)) is not None}
    boxes = found.boxes if found.rboxes is None else found.rboxes
    rows = torch.from_numpy(np.concatenate([boxes, found.scores[:, None], found.classes[:, None]], 1))
    if found.probs is None:
        given["boxes" if found.rboxes is None else "obb"] = rows
    return Results(image, "", found.names, **given)


def seen_by(model: nn.Module) -> dict[str, Any]:
    """Return how `data.check.letterbox_batches` is to read images for a model; a classifier sees the middle only."""
    return {"crop": task_of(model) == "classify", "channels": input_channels(model)}


def head_args(end2end: bool) -> dict[str, Any]:
    """Return the arguments that select the one-to-one (NMS-free) or the one-to-many head of a dual-head model."""
    if "end2end" in DEFAULT_CFG_DICT:  # not in each release; elsewhere, nms=False means NMS-free
        return {"end2end": end2end}
    return {"nms": False if end2end else None}


def choose_head(model: Any, end2end: bool) -> Any:
    """Have a dual-head model run its NMS-free head or the other one; a model with a single head stays as it is."""
    if bool(getattr(model, "end2end", False)) != end2end:
        model.end2end = end2end
    return model


def as_exported(model: Any) -> Any:
    """Have the head of a model return what an export does, without the tensors that only training reads."""
    model.model[-1].export = True
    return model


def with_nms(model: Any, nms: dict[str, Any]) -> nn.Module:
    """Wrap a model as the exporter does to embed NMS with these options."""
    model.model[-1].xyxy = True
    return exporter.NMSModel(model, get_cfg(overrides={"format": "onnx", "dynamic": False, "batch": 1, **nms}))


def export_file(model: Any, folder: Path, **args: Any) -> Path:
    """Export a float model into a folder, so that nothing appears beside the user's weights, and return the file."""
    model.pt_path = str(folder / "model.pt")  # the exporter derives the output name from it
    unread = {**SETTINGS, "openvino_msg": False}  # or it would note down that it has recommended OpenVINO
    with quiet(), safely(), replaced(exporter, SETTINGS=unread):
        return Path(exporter.Exporter(overrides={"device": "cpu", "mode": "export", **args})(model))


def labelled_dataset(
    info: dict[str, Any], task: str, imgsz: int, batch: int, stride: int = 32, given: dict[str, Any] | None = None
) -> tuple[Any, list[Path]]:
    """Return the train split, square and not augmented, with masks and classes read as `given` says, and its files."""
    chosen = {k: v for k, v in {**(given or {}), **info}.items() if k in LABEL_ARGS}
    hyp = get_cfg(overrides={"task": task, "imgsz": imgsz, **chosen})
    with quiet(), safely():
        if task == "classify":
            data: Any = ClassificationDataset(root=str(info["train"]), args=hyp, augment=False, prefix="train")
            return data, [Path(sample[0]) for sample in data.samples]
        data = build_yolo_dataset(hyp, info["train"], batch, info, mode="val", rect=False, stride=stride)
    return data, [Path(f) for f in data.im_files]
