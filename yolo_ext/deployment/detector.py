# Copyright (C) yolo_ext authors. AGPL-3.0 licence.
"""Run an exported YOLO on pictures with NumPy, OpenCV and ONNX Runtime alone: no torch, no Ultralytics."""

import ast
import contextlib
from collections.abc import Sequence
from dataclasses import replace
from numbers import Real
from pathlib import Path
from typing import Any, overload

import cv2
import numpy as np

from yolo_ext.core.errors import UsageError, refused
from yolo_ext.deployment import decode
from yolo_ext.deployment.decode import Detections, Image

TASKS = ("detect", "segment", "pose", "obb", "classify")
GREY = 114  # of the border
GPU = "CUDAExecutionProvider"
READ = ("stretch", "final")  # what `read_metadata` adds: how boxes are scaled, whether rows are detections
PARSED = ("names", "imgsz", "kpt_shape", "args", "end2end", "stride")


class Detector:
    """An exported YOLO: call it with a picture, or a list of pictures.

    It has a ``task``, ``names`` by class index, and ``imgsz``, height and width of the network's input in pixels. It
    may be pickled, and used by several threads at once.
    """

    def __init__(self, path: str | Path, conf: float = 0.25, iou: float = 0.7,
                 classes: Sequence[int | str] | None = None, threads: int | None = None, max_det: int = 300,
                 imgsz: int | Sequence[int] | None = None, gpu: int | None = None) -> None:  # fmt: skip
        """Open the file.

        Args:
            path: ``.onnx`` file written by yolo-ext or Ultralytics, FP32, FP16 or INT8.
            conf: Confidence threshold.
            iou: Overlap above which suppression drops the lower score.
            classes: Class indices or names to keep; None keeps all.
            threads: Threads of ONNX Runtime; None leaves the choice to it.
            max_det: Largest number of boxes for one picture.
            imgsz: Input size in pixels, one side or height and width, of a file with dynamic size; None takes the size
                of the export.
            gpu: Number of the GPU, for ONNX Runtime's CUDA provider; None runs on the CPU, an INT8 file best.
        Raises: `UsageError`: The file or an option is not usable.
        """
        for key, value in (("conf", conf), ("iou", iou)):
            if not (isinstance(value, Real) and 0 <= value <= 1):
                raise UsageError(f"'{key}={value}' is illegal. Legal: 0 to 1.")
        for key, count in (("threads", threads), ("max_det", max_det)):
            if count is not None and (not isinstance(count, int) or count < 1):
                raise UsageError(f"'{key}={count}' is illegal: give a whole number of at least 1.")
        self._session = open_session(path, session_options(threads), gpu)
        if gpu is not None and GPU not in self._session.get_providers():
            raise UsageError(f"'gpu={gpu}': no {GPU} starts here. Install onnxruntime-gpu, or leave gpu out.")
        self._path, self._threads, self._gpu = Path(path).absolute(), threads, gpu
        self._meta = read_metadata(self._session, path)
        self.task, self.names = self._meta["task"], self._meta["names"]
        self.conf, self.iou, self.max_det = conf, iou, max_det
        wanted = [] if classes is None else [*classes]
        if unknown := [c for c in wanted if c not in (*self.names, *self.names.values())]:
            legal = ", ".join(f"{i} {n}" for i, n in self.names.items())
            raise UsageError(f"Unknown class '{unknown[0]}'. Legal: {legal}.")
        self.classes = None if classes is None else [i for i, n in self.names.items() if i in wanted or n in wanted]
        entry = self._session.get_inputs()[0]
        batch, self._channels, *size = entry.shape
        self._name, self._half = entry.name, entry.type == "tensor(float16)"
        self._fixed = all(isinstance(side, int) for side in size)
        self._batch = batch if self._fixed and isinstance(batch, int) else 1
        self.imgsz = _input_size(size if self._fixed else None, imgsz, self._meta)

    def __reduce__(self) -> Any:
        """Pickle what it was made of: the process that reads it opens the file again."""
        given = (self.conf, self.iou, self.classes, self._threads, self.max_det, self.imgsz, self._gpu)
        return type(self), (self._path, *given)

    @overload
    def __call__(self, source: Image) -> Detections: ...

    @overload
    def __call__(self, source: list[Any]) -> list[Detections]: ...

    def __call__(self, source: Image | list[Any]) -> Detections | list[Detections]:
        """Detect.

        Args:
            source: Image file, array (height, width, 3) in BGR, uint8, as OpenCV reads it, or a list of these.
        Returns: Detections of the picture, or a list of them.
        Raises: `UsageError`: A picture is missing or broken or no picture, or the file's class names are not those of
            its outputs.
        """
        if not isinstance(source, (list, tuple)):
            return self._detect([source])[0]
        if not source:
            raise UsageError("An empty list holds no picture. Give one at least.")
        parts = (source[i : i + self._batch] for i in range(0, len(source), self._batch))
        return [found for part in parts for found in self._detect(part)]

    def _detect(self, sources: Sequence[Image]) -> list[Detections]:
        """Return what is found in at most a batch of pictures."""
        images = [_read(source, self._channels) for source in sources]
        x = decode.full_batches(np.stack([self._prepare(image) for image in images]), self._batch)
        outputs = [y.astype(np.float32, copy=False) for y in self._session.run(None, {self._name: x})]
        found = [self._decode([y[i] for y in outputs], x.shape[2:], image) for i, image in enumerate(images)]
        return [replace(one, source=source) for one, source in zip(found, sources)]

    def _prepare(self, image: np.ndarray) -> np.ndarray:
        """Return a picture as network input (C, H, W), 0..1."""
        if self.task == "classify":
            image = _crop(image, self.imgsz)
        elif self._meta["stretch"]:
            image = cv2.resize(image, self.imgsz[::-1], interpolation=cv2.INTER_LINEAR)
        else:
            image = letterbox(image, self.imgsz, None if self._fixed else self._meta["stride"])
        image = image.reshape(*image.shape[:2], -1)
        image = image[..., ::-1] if self._channels == 3 else image  # RGB; other channels have no order to turn round
        return np.ascontiguousarray(image.transpose(2, 0, 1), np.float16 if self._half else np.float32) / 255

    def _decode(self, outputs: list[np.ndarray], size: tuple[int, ...], image: np.ndarray) -> Detections:
        """Return the detections in the outputs for one picture, whose input had (height, width) `size`."""
        shape = image.shape[:2]
        if self.task == "classify":
            self._check_names(len(outputs[0]))
            none: np.ndarray = np.zeros((0, 6), np.float32)
            return Detections(none[:, :4], none[:, 4], none[:, 5].astype(np.int64), self.names, shape, probs=outputs[0])
        rows = self._rows(*outputs)
        sx, sy, left, top = decode.fit(size, shape)
        border, scale, limit = np.float32([left, top]), np.float32([sx, sy]), np.float32(shape[::-1])
        extra: dict[str, np.ndarray] = {}
        if self.task == "obb":
            turned = np.concatenate([(rows[:, :2] - border) / scale, rows[:, 2:4] / scale, rows[:, -1:]], 1)
            extra["rboxes"], boxes = turned, decode.around(turned)
        elif self._meta["stretch"]:
            boxes = decode.corners(rows[:, :4]) * np.tile(limit, 2)
        else:
            boxes = ((rows[:, :4] - np.tile(border, 2)) / np.tile(scale, 2)).clip(0, np.tile(limit, 2))
        if self.task == "pose":
            points = rows[:, 6:].reshape(len(rows), *self._meta["kpt_shape"]).copy()
            points[..., :2] = ((points[..., :2] - border) / scale).clip(0, limit)
            extra["keypoints"] = points
        if self.task == "segment":
            masks = decode.masks(outputs[1], rows[:, 6:], boxes, shape)
            seen = masks.any((1, 2))
            rows, boxes, extra["masks"] = rows[seen], boxes[seen], masks[seen]
        return Detections(boxes, rows[:, 4].copy(), rows[:, 5].astype(np.int64), self.names, shape, **extra)

    def _rows(self, output: np.ndarray, *protos: np.ndarray) -> np.ndarray:
        """Return one image's detections (N, 6 + extras) in input pixels: box, score, class, extras."""
        rotated = self.task == "obb"
        if final := self._meta["final"] or output.shape[-1] == 6:
            rows = decode.queries(output) if self._meta["stretch"] else output
            rows = rows[rows[:, 4] > self.conf]
            self._check_names(max(len(self.names), int(rows[:, 5].max(initial=0)) + 1))
        else:
            extras = {"obb": 1, "pose": int(np.prod(self._meta["kpt_shape"] or 0)), "segment": sum(map(len, protos))}
            nc = len(output) - 4 - extras.get(self.task, 0)
            self._check_names(nc)
            rows = decode.dense(output, nc, self.conf, rotated=rotated)
        if self.classes is not None:
            rows = rows[np.isin(rows[:, 5], self.classes)]
        return rows[: self.max_det] if final else decode.suppress(rows, self.iou, self.max_det, rotated=rotated)

    def _check_names(self, classes: int) -> None:
        if classes != len(self.names):
            told = f"'{self._path}' names {len(self.names)} classes in its metadata, its outputs have {classes}"
            raise UsageError(f"{told}. Export the model again.")


def letterbox(image: np.ndarray, size: tuple[int, int], stride: int | None = None) -> np.ndarray:
    """Scale a picture (H, W, C), uint8, into a grey frame (height, width), which a stride cuts to its multiples."""
    gain = min(side / own for side, own in zip(size, image.shape))
    h, w = (max(round(side * gain), 1) for side in image.shape[:2])
    spare = [side - own for side, own in zip(size, (h, w))]
    dh, dw = (side % stride for side in spare) if stride else spare
    if image.shape[:2] != (h, w):
        image = cv2.resize(image, (w, h), interpolation=cv2.INTER_LINEAR)
    image = np.atleast_3d(image)
    frame = np.full((h + dh, w + dw, image.shape[2]), GREY, np.uint8)
    top, left = (round(side / 2 - 0.1) for side in (dh, dw))
    frame[top : top + h, left : left + w] = image
    return frame


def _crop(image: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Scale the shorter side to a square input and cut its centre; a rectangular input is filled as it is."""
    h, w = image.shape[:2]
    if size[0] != size[1]:
        h, w = size
    else:
        h, w = (size[0], int(size[0] * w / h)) if h <= w else (int(size[0] * h / w), size[0])
    image = _resize_smooth(_resize_smooth(image, w, 1), h, 0)
    top, left = round((h - size[0]) / 2), round((w - size[1]) / 2)
    return image[top : top + size[0], left : left + size[1]]


def _resize_smooth(image: np.ndarray, size: int, axis: int) -> np.ndarray:
    """Resize one axis with Pillow's antialiasing triangle filter, in the same 22-bit arithmetic."""
    image = image.swapaxes(0, axis)
    scale = len(image) / size
    support = max(scale, 1.0)
    centre = (np.arange(size) + 0.5) * scale
    first = (centre - support + 0.5).astype(int).clip(0)
    last = (centre + support + 0.5).astype(int).clip(None, len(image))
    taps = first[:, None] + np.arange((last - first).max())
    weights = (1 - np.abs((taps - centre[:, None] + 0.5) / support)).clip(0) * (taps < last[:, None])
    fixed = (weights / weights.sum(1, keepdims=True) * (1 << 22) + 0.5).astype(np.int32)
    total = np.full((size, *image.shape[1:]), 1 << 21, np.int32)
    for tap, weight in zip(taps.T.clip(None, len(image) - 1), fixed.T):
        total += weight.reshape(-1, *[1] * (image.ndim - 1)) * image[tap].astype(np.int32)
    return (total >> 22).clip(0, 255).astype(np.uint8).swapaxes(0, axis)


def _load(source: str | Path, channels: int) -> np.ndarray | None:
    """Return a picture in a file, None where it cannot be read; other channels than grey or BGR as they lie there."""
    with contextlib.suppress(OSError, cv2.error):
        data = np.fromfile(source, np.uint8)
        if flag := {1: cv2.IMREAD_GRAYSCALE, 3: cv2.IMREAD_COLOR}.get(channels):
            return cv2.imdecode(data, flag)
        pages = cv2.imdecodemulti(data, cv2.IMREAD_UNCHANGED)[1]  # each a channel, or one with all of them
        image = pages[0] if len(pages) == 1 or pages[0].ndim == 3 else np.stack(pages, 2)
        return (image >> 8).astype(np.uint8) if image.dtype == np.uint16 else image
    return None


def _read(source: Image, channels: int) -> np.ndarray:
    """Return a picture (H, W, C), uint8, in BGR, grey or what else the model takes."""
    image = _load(source, channels) if isinstance(source, (str, Path)) else source
    if image is None and source is not None:
        raise UsageError(f"Image '{source}' does not exist or cannot be read. Give readable image files.")
    if not isinstance(image, np.ndarray):
        raise UsageError(f"A {type(image).__name__} is no picture. Give a file, or an array as OpenCV reads one.")
    image = np.atleast_3d(image)
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != channels or not image.size:
        legal = f"(height, width, {channels}), uint8{', BGR' if channels == 3 else ''}"
        raise UsageError(f"An image of shape {image.shape} and type {image.dtype} does not fit. Legal: {legal}.")
    return image


def open_session(model: str | Path | bytes, options: Any, gpu: int | None = None) -> Any:
    """Return an ONNX Runtime session of a file or a serialised model, on the CPU where it has no provider of GPUs."""
    import onnxruntime as ort

    given = model if isinstance(model, bytes) else str(model)
    if isinstance(given, str) and not Path(given).is_file():
        raise UsageError(f"ONNX model '{given}' does not exist. Export one first.")
    name = f"'{given}'" if isinstance(given, str) else "the model"
    with refused(f"ONNX Runtime cannot load {name} ({{e}})."):
        there = gpu is not None and GPU in ort.get_available_providers()
        providers = [(GPU, {"device_id": gpu, "use_tf32": 0})] if there else []
        return ort.InferenceSession(given, options, providers=[*providers, "CPUExecutionProvider"])


def session_options(threads: int | None) -> Any:
    """Return the options of a session that warns of nothing; None leaves the number of threads to ONNX Runtime."""
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.log_severity_level, options.intra_op_num_threads = 3, threads or 0
    return options


def read_metadata(session: Any, path: str | Path) -> dict[str, Any]:
    """Return Ultralytics' metadata: task, names, stride, imgsz, kpt_shape, and how the output is to be read."""
    found: dict[str, Any] = dict(session.get_modelmeta().custom_metadata_map)
    if not found.get("names") or not found.get("task"):
        raise UsageError(f"ONNX model '{path}' has no Ultralytics metadata. Export it with yolo-ext or Ultralytics.")
    if found["task"] not in TASKS:
        raise UsageError(f"Task '{found['task']}' of '{path}' is not supported. Legal: {', '.join(TASKS)}.")
    with refused(f"The metadata of '{path}' cannot be read ({{e}}). Export the model again."):
        found |= {key: ast.literal_eval(found[key]) if key in found else None for key in PARSED}
        names = found["names"] if isinstance(found["names"], dict) else dict(enumerate(found["names"]))
        found["names"] = {int(k): str(v) for k, v in names.items()}
        if sorted(found["names"]) != [*range(len(names))]:
            raise ValueError(f"classes are numbered {', '.join(map(str, found['names']))}, and not from 0 on")
    if len(session.get_inputs()) != 1 or len(session.get_inputs()[0].shape) != 4:
        raise UsageError(f"'{path}' does not take images (batch, channels, height, width) alone. Export a YOLO.")
    found["stride"], found["args"] = found["stride"] or 32, found["args"] if isinstance(found["args"], dict) else {}
    found["stretch"] = found.get("head") == "RTDETRDecoder"
    # Heads without NMS and exports with embedded NMS give finished rows.
    found["final"] = bool(found["end2end"] or found["args"].get("nms") or found["stretch"])
    return found


def _input_size(fixed: list[int] | None, given: int | Sequence[int] | None, meta: dict[str, Any]) -> tuple[int, int]:
    """Return height and width of the input: of the graph, else what was given, else what was exported."""
    wanted: Any = next((size for size in (given, fixed, meta["imgsz"]) if size is not None), 640)
    sides = (wanted, wanted) if isinstance(wanted, int) else tuple(wanted)
    if fixed and list(sides) != fixed:
        raise UsageError(f"imgsz={given} does not fit: this file takes {fixed[0]}x{fixed[1]} pixels only.")
    step = 1 if meta["task"] == "classify" else meta["stride"]
    if len(sides) != 2 or not all(isinstance(side, int) and side > 0 and side % step == 0 for side in sides):
        raise UsageError(f"imgsz={wanted} is illegal. Legal: one or two sides in pixels, multiples of {step}.")
    return sides[0], sides[1]
