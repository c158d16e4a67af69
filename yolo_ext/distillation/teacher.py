# Copyright (C) yolo_ext authors. AGPL-3.0 licence.
"""The teacher: a frozen, fused model outside the student; which levels, classes and maps of both correspond."""

import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.modules.module import register_module_forward_hook

from yolo_ext import stock
from yolo_ext.checkpoint import fingerprint, manifest
from yolo_ext.core.config import DistillConfig
from yolo_ext.core.errors import UsageError
from yolo_ext.core.options import listed
from yolo_ext.core.registry import suggest
from yolo_ext.distillation.losses import HeadOutput, decode, regrid
from yolo_ext.stock.context import evaluating, replaced
from yolo_ext.stock.load import load_model


@dataclass
class Guide:
    """One teacher of a run, and how its outputs correspond to those of the student."""

    name: str  # its file, or ``ema``
    get: Callable[[], nn.Module]  # the model; the student's own average is another object after a resume
    kept: list[list[int]] | None  # channels by level that a pruned student of this teacher still has
    classes: tuple[list[int], list[int]]  # indices of the shared ones, of the student and of the teacher
    levels: list[tuple[int, int]]  # shared ones, of the student and of the teacher; empty for classifiers
    imgsz: int | None = None  # longer side in pixels of the images as the teacher sees them; None: as in the batch

    @property
    def model(self) -> nn.Module:
        """The teacher."""
        return self.get()

    @torch.no_grad()
    def ask(self, images: torch.Tensor) -> Any:
        """Return the raw output of the teacher on (B, C, H, W) images, on the grid of a student that sees them."""
        model, size = self.model, self.size(images)
        head, resized = stock.detection_head(model), size != images.shape[2:]
        seen = F.interpolate(images.float(), size, mode="bilinear", antialias=True) if resized else images
        with replaced(head, training=True):  # its flag alone: raw outputs, and all layers stay in eval mode
            raw: Any = model(seen.to(next(model.parameters()).dtype))
        if not resized or not self.levels:
            return raw
        grids = [(-(-images.shape[2] // s), -(-images.shape[3] // s)) for s in head.stride.int().tolist()]
        found = {k: regrid(v, head.stride, grids) for k, v in stock.branches(raw).items()}
        return found.get("", found)

    def size(self, images: torch.Tensor) -> tuple[int, int]:
        """Return height and width at which the teacher sees (B, C, H, W) images: multiples of its largest stride."""
        h, w = images.shape[2:]
        if self.imgsz is None:
            return h, w
        stride = stock.max_stride(self.model)
        scaled = [max(round(x * self.imgsz / max(h, w) / stride), 1) * stride for x in (h, w)]
        return scaled[0], scaled[1]

    def output(self, raw: dict[str, Any], model: nn.Module, side: int) -> HeadOutput:
        """Decode one branch on shared levels and classes, numbered as in the student (side 0) or in the teacher (1)."""
        classes, head = self.classes[side], stock.detection_head(model)
        if not self.levels:
            scores = raw["scores"][:, classes].unsqueeze(-1)
            return HeadOutput(scores, scores.new_zeros(len(scores), 1, 4), scores.new_zeros(1, 2))
        levels, feats = [pair[side] for pair in self.levels], raw["feats"]
        if levels != list(range(len(feats))):
            sizes = [f.shape[-2] * f.shape[-1] for f in feats]
            parts = {k: raw[k].split(sizes, -1) for k in ("boxes", "scores")}
            raw = {k: torch.cat([v[i] for i in levels], -1) for k, v in parts.items()}
            raw["feats"] = [feats[i] for i in levels]
        same = classes in ([], list(range(raw["scores"].shape[1])))  # none where only features are compared
        index = None if same else torch.tensor(classes, device=raw["scores"].device)
        return decode(raw, head.stride[levels], raw["boxes"].shape[1] // 4, index)


def make_guides(cfg: DistillConfig, student: nn.Module, device: torch.device) -> list[Guide]:
    """Load the teachers of a run and match each with the student, as `make_guide` does."""
    options: Any = {"imgsz": cfg.imgsz, "half": cfg.half, "classes": bool(cfg.logits)}
    return [make_guide(name, student, device, **options) for name in listed(cfg.teacher)]


def make_guide(name: str, student: nn.Module, device: torch.device, *, imgsz: int | None = None,
               half: bool | None = False, classes: bool = True) -> Guide:  # fmt: skip
    """Load a teacher, or take the student for `ema` until `get` is set, and match levels and, if compared, classes."""
    teacher, kept = student, None
    if name != "ema":
        teacher, parent = load_teacher(name, student, device, half)
        kept = kept_channels(student, parent)
    levels: list[tuple[int, int]] = []
    if stock.task_of(student) != "classify":
        ours, theirs = ([int(s) for s in stock.detection_head(m).stride] for m in (student, teacher))
        levels = [(i, theirs.index(s)) for i, s in enumerate(ours) if s in theirs]
        if not levels:
            raise UsageError(f"Teacher '{name}' has strides {theirs}, the student {ours}. Give one with one in common.")
    shared = class_map(teacher, student.names, name) if classes else ([], [])
    return Guide(name, lambda: teacher, kept, shared, levels, imgsz)


def load_teacher(path: str, student: nn.Module, device: torch.device, half: bool | None = False) -> tuple[Any, str]:
    """Load the teacher of a student, frozen and fused; return it with the fingerprint of its weights."""
    teacher, _ = load_model(path)
    parent = fingerprint(teacher)
    stock.refuse_untrainable(teacher)
    for what, theirs, ours in stock.differences(teacher, student):
        if what in ("task", "image channels"):  # classes need only overlap, and keypoints are not compared
            raise UsageError(f"Teacher '{path}' has the {what} {theirs}, the student {ours}. Give one with the same.")
    heads = [stock.detection_head(m) for m in (teacher, student)]
    if stock.task_of(student) != "classify" and not all(hasattr(h, "reg_max") for h in heads):
        raise UsageError(f"Only Detect-type heads and classifiers distil, not {[type(h).__name__ for h in heads]}.")
    teacher = stock.fuse_blocks(teacher).requires_grad_(False).to(device, memory_format=torch.channels_last)
    cuda = device.type == "cuda"  # float16 there; on a CPU bfloat16, by default where the processor computes in it
    if cuda or (stock.native_bf16() if half is None else half):
        teacher = teacher.to(torch.float16 if cuda else torch.bfloat16)
    return teacher.eval(), parent


def kept_channels(student: nn.Module, parent: str) -> list[list[int]] | None:
    """Return by level the channels of its dense self that a student feeds to its head; None unless that is `parent`."""
    record = manifest(student).prune or {"parent": manifest(student).parent, "kept": {}}
    if record["parent"] != parent or stock.task_of(student) == "classify":
        return None
    widths = zip(stock.level_inputs(student), stock.level_widths(student))
    return [record["kept"].get(path, {}).get("in", [*range(width)]) for path, width in widths]


def class_map(teacher: nn.Module, names: Mapping[int, str], path: str) -> tuple[list[int], list[int]]:
    """Return the classes that these names and a teacher share: indices in the names, indices of the teacher."""
    theirs = {str(n).strip().lower(): i for i, n in teacher.names.items()}
    shared = [(i, theirs[key]) for i, n in names.items() if (key := str(n).strip().lower()) in theirs]
    if not shared:
        text = f"classes {list(names.values())[:5]}, but {list(teacher.names.values())[:10]}"
        raise UsageError(f"Teacher '{path}' knows none of the {text}. Give one that was trained on these classes.")
    return [i for i, _ in shared], [j for _, j in shared]


def with_classes(teacher: nn.Module, names: Mapping[int, str], path: str) -> nn.Module:
    """Bring the outputs of a model to the classes of a data set, in place; classes it does not know get no score."""
    head = stock.detection_head(teacher)
    ours, theirs = class_map(teacher, names, path)
    if ours == theirs == list(range(len(teacher.names))) and len(names) == len(ours):
        return teacher
    branches = [b for k in ("cv3", "one2one_cv3") for b in getattr(head, k, None) or ()]
    for last in [b[-1] for b in branches] or [head.linear]:
        weight, bias = last.weight.data, last.bias.data
        last.weight = nn.Parameter(weight.new_zeros(len(names), *weight.shape[1:]))
        last.bias = nn.Parameter(bias.new_full((len(names),), -30.0))
        last.weight.data[ours], last.bias.data[ours] = weight[theirs], bias[theirs]
        setattr(last, "out_channels" if isinstance(last, nn.Conv2d) else "out_features", len(names))
    if branches:
        head.no, head.nc = head.no + len(names) - head.nc, len(names)
    teacher.names = dict(names)
    return teacher


@dataclass(frozen=True)
class Site:
    """A map of the student and the map of the teacher that it is compared with."""

    student: int | str  # level of the head, or path of a layer, whose output is meant
    teacher: int | str
    widths: tuple[int, int]  # channels of both


def sites(layers: Sequence[str], student: nn.Module, guide: Guide) -> list[Site]:
    """Return the maps that are compared: neck, backbone, a layer index, the path of a module, or `student:teacher`."""
    found: list[Site] = []
    for layer in layers or ("neck" if guide.levels else "backbone",):
        if layer == "neck":
            if not guide.levels:
                raise UsageError("A classifier has no neck: leave 'distill.layers' out, or give layers such as [4, 6].")
            widths = [stock.level_widths(m) for m in (student, guide.model)]
            found += [Site(i, j, (widths[0][i], widths[1][j])) for i, j in guide.levels]
        elif layer == "backbone":
            found += _backbone(student, guide.model)
        else:
            ours, _, theirs = layer.partition(":")
            (path, shape), (other, like) = _map(student, ours, "student"), _map(guide.model, theirs or ours, "teacher")
            if shape[2:] != like[2:]:
                text = f"maps differ in size, {shape[2:]} and {like[2:]}. Give two of one stride as a:b."
                raise UsageError(f"'distill.layers={layer}': {text}")
            found.append(Site(path, other, (shape[1], like[1])))
    return found


def _map(model: nn.Module, layer: str, who: str) -> tuple[str, tuple[int, ...]]:
    """Return path and shape of what a layer returns that is given by index or path."""
    path, modules = f"model.{layer}" if layer.isdigit() else layer, [n for n, _ in model.named_modules() if n]
    if path not in modules:
        legal = f"neck, backbone, 0 to {len(model.model) - 1}, or the path of a module such as model.4.cv2"
        text = f"the {who} has no layer '{layer}'.{suggest(path, modules)} Legal: {legal}."
        raise UsageError(f"'distill.layers': {text}")
    if not (shapes := _shapes(model, [path])):
        raise UsageError(f"'distill.layers': layer '{layer}' of the {who} does not return one map (B, C, H, W).")
    return path, shapes[path]


def _backbone(student: nn.Module, teacher: nn.Module) -> list[Site]:
    """Pair what the necks take from the backbones, by size; the deepest map of a size counts."""
    by_size: list[dict[Any, tuple[str, int]]] = []
    for model in (student, teacher):
        count = len((getattr(model, "yaml", None) or {}).get("backbone", ()))
        used = {i for m in model.model[count:] for i in ([m.f] if isinstance(m.f, int) else m.f) if 0 <= i < count}
        shapes = _shapes(model, [f"model.{i}" for i in sorted(used | {count - 1}) if i >= 0])
        by_size.append({s[2:]: (p, s[1]) for p, s in shapes.items()})
    ours, theirs = by_size
    found = [Site(ours[k][0], theirs[k][0], (ours[k][1], theirs[k][1])) for k in ours if k in theirs]
    if not found:
        raise UsageError("'distill.layers=backbone': the backbones have no maps of one size. Name layers instead.")
    return found


@torch.no_grad()
def _shapes(model: nn.Module, paths: list[str]) -> dict[str, tuple[int, ...]]:
    """Return the shapes of those layer outputs for one square image that are a (B, C, H, W) map."""
    like, size = next(model.parameters()), 2 * stock.max_stride(model)
    taps = Taps(model, paths)
    with evaluating(model):
        model(torch.zeros(1, stock.input_channels(model), size, size, device=like.device, dtype=like.dtype))
    return {p: tuple(x.shape) for p, x in taps.take().items() if isinstance(x, torch.Tensor) and x.ndim == 4}


class Taps:
    """Keeps what layers return: by one hook of the process, as those of layers are copied into EMA and checkpoint."""

    def __init__(self, model: nn.Module, paths: list[str]) -> None:
        self.found: dict[str, torch.Tensor] = {}
        if not paths:
            return
        modules, found = dict(model.named_modules()), self.found
        layers = {id(modules[p]): p for p in paths}

        def keep(module: nn.Module, _: Any, output: Any) -> None:
            if (path := layers.get(id(module))) is not None:
                found[path] = output

        self.close = weakref.finalize(self, register_module_forward_hook(keep).remove)

    def take(self) -> dict[str, torch.Tensor]:
        """Return the outputs by path and forget them, which frees their graph."""
        taken = dict(self.found)
        self.found.clear()
        return taken
