# Copyright (C) yolo_ext authors. AGPL-3.0 licence.
"""What a model found over a split, image by image: enough for any later verdict without running the model again."""

import hashlib
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, fields
from functools import partial
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import torch
from ultralytics.models.yolo.classify import val

from yolo_ext.core.errors import refused
from yolo_ext.stock.context import replaced

KINDS = {"tp": "box", "tp_m": "mask", "tp_p": "pose"}  # what Ultralytics' validators match, by our name


@dataclass(frozen=True, eq=False)
class Evidence:
    """Detections and targets of the images of a split; of a classifier one detection and one target by image."""

    about: dict[str, Any]  # task, names (by index), and hashes of images, labels, model and settings
    images: list[str]  # names of the N images
    image: np.ndarray  # (D,) index of the image of each detection
    cls: np.ndarray  # (D,) its class
    conf: np.ndarray  # (D,) its confidence
    area: np.ndarray  # (D,) in pixels of the original image, or that of the target that is hit, as COCO bins sizes
    target_image: np.ndarray  # (T,) index of the image of each target
    target_cls: np.ndarray  # (T,)
    target_area: np.ndarray  # (T,)
    hits: dict[str, np.ndarray] = field(default_factory=dict)  # by kind (D, 10): right at IoU or OKS 0.50 to 0.95

    def data(self) -> bytes:
        """Return the content of one compressed file, from which `read` makes the evidence again."""
        arrays = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in ("about", "images", "hits")}
        arrays |= {f"hits.{kind}": hit for kind, hit in self.hits.items()}
        text, made = json.dumps({"about": self.about, "images": self.images}), BytesIO()
        np.savez_compressed(made, text=np.frombuffer(text.encode(), np.uint8), **arrays)
        return made.getvalue()

    @classmethod
    def read(cls, path: str | Path) -> "Evidence":
        """Read the file of an evaluation, in which nothing is run."""
        with refused(f"'{path}' is no evidence of an evaluation ({{why}}). Measure the model again."):
            with np.load(path, allow_pickle=False) as found:
                arrays = {k: found[k] for k in found.files}
            text = json.loads(arrays.pop("text").tobytes())
            hits = {k.removeprefix("hits."): arrays.pop(k) for k in [*arrays] if k.startswith("hits.")}
            names = {int(k): v for k, v in text["about"]["names"].items()}
            return cls({**text["about"], "names": names}, text["images"], **arrays, hits=hits)


def collected(validator: Any, model_hash: str) -> Callable[[], Evidence]:
    """Have a validator of Ultralytics keep what it matches, and return what makes the evidence of that afterwards."""
    if not hasattr(validator, "_process_batch"):
        made = validator.get_dataloader

        def in_order(*args: Any) -> Any:  # Ultralytics would shuffle
            with replaced(val, build_dataloader=partial(val.build_dataloader, shuffle=False)):
                return made(*args)

        validator.get_dataloader = in_order
        return lambda: _of_classifier(validator, _facts(validator, model_hash))
    rows: list[dict[str, Any]] = []
    process, match, best = validator._process_batch, validator.match_predictions, list[torch.Tensor]()

    def matched(pred: torch.Tensor, true: torch.Tensor, iou: torch.Tensor, *rest: Any) -> torch.Tensor:
        best.append((iou * (true[:, None] == pred)).argmax(0))  # the boxes come first, then masks or keypoints
        return match(pred, true, iou, *rest)

    def processed(preds: dict[str, Any], batch: dict[str, Any]) -> dict[str, np.ndarray]:
        best.clear()
        found = process(preds, batch)
        own, theirs = (_areas(boxes, batch) for boxes in (preds["bboxes"], batch["bboxes"]))
        if best:
            own = np.where(found["tp"][:, 0], theirs[best[0].cpu().numpy()], own)
        rows.append({"name": batch["im_file"], "conf": preds["conf"], "cls": preds["cls"], "area": own,
                     "target_cls": batch["cls"], "target_area": theirs, "hits": dict(found)})  # fmt: skip
        return found

    validator._process_batch, validator.match_predictions = processed, matched
    return lambda: _of_detector(rows, _facts(validator, model_hash))


def _areas(boxes: torch.Tensor, batch: dict[str, Any]) -> np.ndarray:
    """Return the areas of boxes (x1, y1, x2, y2, or x, y, w, h, angle) in pixels of the original image."""
    side = boxes[:, 2:4] if boxes.shape[1] == 5 else boxes[:, 2:4] - boxes[:, :2]
    gain = np.prod(np.asarray(batch["ratio_pad"][0], dtype=float)) if batch.get("ratio_pad") else 1.0
    return (side.prod(1).cpu().numpy() / gain).astype(np.float32)


def _of_detector(rows: Sequence[dict[str, Any]], about: dict[str, Any]) -> Evidence:
    """Return the evidence of what was kept of each image."""
    rows = sorted(rows, key=lambda r: r["name"])

    def joined(key: str, kind: Any) -> np.ndarray:
        found = [np.asarray(r[key].cpu() if isinstance(r[key], torch.Tensor) else r[key]) for r in rows]
        return np.concatenate([*found, np.zeros(0)]).astype(kind)

    def index(key: str) -> np.ndarray:
        return np.repeat(np.arange(len(rows), dtype=np.int32), [len(r[key]) for r in rows])

    hits = {name: np.concatenate([r["hits"][key] for r in rows]).astype(bool)
            for key, name in KINDS.items() if rows and key in rows[0]["hits"]}  # fmt: skip
    return Evidence(
        about, [Path(r["name"]).name for r in rows], index("conf"), joined("cls", np.int32),
        joined("conf", np.float32), joined("area", np.float32), index("target_cls"), joined("target_cls", np.int32),
        joined("target_area", np.float32), hits,
    )  # fmt: skip


def _of_classifier(validator: Any, about: dict[str, Any]) -> Evidence:
    """Return the evidence of a classifier: whether the class is the first, or among the first five, of each image."""
    pred, true = (torch.cat(found).numpy() for found in (validator.pred, validator.targets))
    files = ["/".join(Path(s[0]).parts[-2:]) for s in validator.dataloader.dataset.samples]  # class and name
    right = pred == true[:, None]
    n: np.ndarray = np.arange(len(true), dtype=np.int32)
    zero: np.ndarray = np.zeros(len(true), np.float32)
    hits = {"top": np.stack([right[:, 0], right.any(1)], axis=1)}
    return Evidence(about, files, n, pred[:, 0].astype(np.int32), zero + 1, zero, n, true.astype(np.int32), zero, hits)


def _facts(validator: Any, model_hash: str) -> dict[str, Any]:
    """Return what two evaluations have to have in common, and by which settings they were made."""
    data = validator.dataloader.dataset
    if hasattr(data, "samples"):
        files, labels = [s[0] for s in data.samples], [np.int64(s[1]).tobytes() for s in data.samples]
    else:
        files = [label["im_file"] for label in data.labels]
        parts = [(v["cls"], v["bboxes"], *v["segments"], v["keypoints"]) for v in data.labels]
        labels = [b"".join(np.float32(p).tobytes() for p in own if p is not None) for own in parts]
    order = np.argsort(files)
    images = (part for i in order for part in (Path(files[i]).name.encode(), Path(files[i]).read_bytes()))
    settings = {k: getattr(validator.args, k) for k in ("imgsz", "conf", "iou", "max_det", "single_cls", "rect")}
    names = validator.data["names"]  # those of a model may be numbers
    return {"task": validator.args.task, "names": {int(k): str(v) for k, v in names.items()},
            "images_hash": hashed(images), "labels_hash": hashed([labels[i] for i in order]),
            "model_hash": model_hash, "settings": settings}  # fmt: skip


def hash_of(model: torch.nn.Module | Path) -> str:
    """Return the hash of the weights of a model, or of the file or folder of an exported one."""
    if isinstance(model, Path):
        return hashed(f.read_bytes() for f in sorted(model.rglob("*") if model.is_dir() else [model]) if f.is_file())
    return hashed(v.cpu().float().numpy().tobytes() for v in model.state_dict().values())


def hashed(parts: Iterable[bytes]) -> str:
    """Return a hash of bytes, and of where each part ends."""
    return hashlib.sha256(b"".join(hashlib.sha256(part).digest() for part in parts)).hexdigest()[:16]
