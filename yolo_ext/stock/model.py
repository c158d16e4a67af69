# Copyright (C) yolo_ext authors. AGPL-3.0 licence.
"""Ultralytics' models: their blocks and heads, what remains of them once deployed, their sizes."""

import inspect
import re
from collections.abc import Iterable, Iterator, Mapping
from copy import deepcopy
from typing import Any

import torch
from torch import nn
from ultralytics.nn import tasks
from ultralytics.nn.modules import block, conv, head
from ultralytics.utils.checks import check_imgsz
from ultralytics.utils.torch_utils import fuse_conv_and_bn

from yolo_ext.core.errors import UsageError, refused
from yolo_ext.core.registry import suggest


def _classes(module: Any, *names: str) -> tuple[type[nn.Module], ...]:
    """Return those of the named classes that this Ultralytics has."""
    return tuple(getattr(module, n) for n in names if hasattr(module, n))


ATTENTION = _classes(block, "Attention")
OPAQUE = _classes(head, "RTDETRDecoder")
ACTIVATIONS = (nn.SiLU, nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.Hardswish, nn.GELU, nn.Sigmoid, nn.Mish, nn.ELU)
# Blocks that keep the width of one part of their first conv as an attribute.
WIDTH_ATTRIBUTES = _classes(block, "C2f", "C2PSA", "PSA", "RepNCSPELAN4", "C2", "C2fAttn")
FREE_CUTS = _classes(block, "CBLinear")  # keep the width of each part of their output, in `c2s`
FUSIONS = _classes(block, "CBFuse")  # add parts of several cut outputs
SUMS = _classes(block, "Bottleneck", "CIB", "SPPF")  # return their input plus what they made of it, if `add` says so
DFL = _classes(block, "DFL")
BRANCHED = (*_classes(conv, "Conv2", "RepConv"), *_classes(block, "RepVGGDW"))  # several branches until they are fused
METRIC = {"map": "mAP50-95", "map_mask": "mask mAP50-95", "map_pose": "keypoint mAP50-95", "top1": "top-1",
          "top5": "top-5"}  # fmt: skip
METRICS = {"detect": ("map",), "obb": ("map",), "segment": ("map", "map_mask"), "pose": ("map", "map_pose"),
           "classify": ("top1", "top5")}  # fmt: skip
SECTIONS = ("backbone", "neck", "head")  # of a model YAML
THOP = "pip uninstall -y thop && pip install --force-reinstall --no-deps ultralytics-thop"
# Reparameterised blocks: the branch whose kernel is as large as that of the fused conv.
WIDEST_BRANCH = {"RepConv": "conv1.conv", "RepVGGDW": "conv.conv"}


def natural_key(path: str) -> list[Any]:
    """Return a sort key that puts ``model.2`` before ``model.10``."""
    return [(0, int(s), "") if s.isdigit() else (1, 0, s) for s in re.split(r"\.", path)]


def module_path(node: str) -> str:
    """Return the dotted path of a node name such as ``/model.22/cv2.0/cv2.0.1/conv/Conv``, whose levels repeat."""
    parts: list[str] = []
    for part in node.strip("/").split("/"):
        if parts and part.startswith(f"{parts[-1]}."):
            parts.pop()
        parts.append(part)
    return ".".join(parts)


def task_of(model: nn.Module) -> str:
    """Return the Ultralytics task of a model by its class; a model fresh from YAML does not carry it yet."""
    table = {"OBBModel": "obb", "SegmentationModel": "segment", "PoseModel": "pose", "ClassificationModel": "classify"}
    table |= {"SemanticSegmentationModel": "semantic", "DepthModel": "depth"}
    found = (task for name, task in table.items() if isinstance(model, getattr(tasks, name, ())))
    return next(found, "detect")


def metric(task: str) -> str:
    """Return the name of the figure that models of a task are ranked by."""
    words = [METRIC[k] for k in METRICS.get(task, ("map",))]
    return words[0] if len(words) == 1 else f"mean of {' and '.join(words)}"


def detection_head(model: nn.Module) -> nn.Module:
    """Return the last module of a YOLO, its head."""
    return model.model[-1]


def head_prefix(model: nn.Module) -> str:
    """Return the start of the path of every layer in the head, such as ``model.22.``."""
    return f"model.{len(model.model) - 1}."


def select(model: nn.Module, selector: str, option: str = "selector") -> list[str]:
    """Return the paths of the modules that a selector (see the error below) means, without what is inside of them."""
    modules = {path: m for path, m in model.named_modules() if path}
    path = f"model.{selector}" if selector.isdecimal() else selector.removesuffix(".")
    if path in modules:
        return [path]
    found = _section(model, selector, option) if selector in SECTIONS else []
    found = found or [p for p, m in modules.items() if type(m).__name__ == selector]
    expression = selector.removeprefix("re:")
    fits = re.fullmatch if expression == selector else re.search
    with refused(f"'{option}={selector}' is no layer and is not a regular expression: {{e}}.", re.error):
        found = found or [p for p in modules if fits(expression, p)]
    if not found:
        names = [*SECTIONS, *sorted({type(m).__name__ for m in modules.values()}), *modules]
        raise UsageError(
            f"'{option}={selector}' matches no layer.{suggest(selector, names)} Legal: a layer index such as 9, a name "
            "such as model.9.cv2, a type such as C2f, backbone, neck, head, a regular expression for whole names, or "
            r"one that is found anywhere in them, such as re:cv2\.\d."
        )
    return found


def within(model: nn.Module, roots: Iterable[str]) -> set[str]:
    """Return the paths of modules and of everything inside of them."""
    starts = tuple(f"{root}." for root in roots)
    return {path for path, _ in model.named_modules() if path and f"{path}.".startswith(starts)}


def matches(model: nn.Module, selector: str, option: str = "selector") -> set[str]:
    """Return the paths of all modules that a selector means, with everything inside of them: see `select`."""
    return within(model, select(model, selector, option))


def _section(model: nn.Module, name: str, option: str) -> list[str]:
    """Return the layers of the backbone, the neck or the head, as the model's YAML parts them."""
    yaml = getattr(model, "yaml", None)  # the tripwire of a pruned model renames a block and moves none
    if not yaml or "backbone" not in yaml:
        raise UsageError(f"'{option}={name}' means nothing here: the model has no YAML. Give layer names.")
    neck, head = len(yaml["backbone"]), len(model.model) - 1
    return [f"model.{i}" for i in {"backbone": range(neck), "neck": range(neck, head), "head": [head]}[name]]


def max_stride(model: nn.Module) -> int:
    """Return the largest stride in pixels."""
    stride = getattr(model, "stride", None)
    return max(int(stride.max()) if stride is not None else 32, 32)


def image_size(net: nn.Module, ckpt: Mapping[str, Any], given: Any = None, *, rounded: bool = False) -> int:
    """Return the side in pixels of the square input: as given, else that of the checkpoint's training, else 640."""
    stride = max_stride(net)  # other sizes than its multiples are refused, or `rounded` up as Ultralytics does
    whole = isinstance(given, int) and not isinstance(given, bool) and given > 0
    if given is None or (rounded and whole):
        size = given or (ckpt.get("train_args") or {}).get("imgsz") or 640
        return check_imgsz(size, stride=stride, floor=stride, max_dim=1)
    if not whole or given % stride:
        near = max(round(given / stride), 1) * stride if isinstance(given, (int, float)) else 640
        raise UsageError(f"'imgsz={given}' is illegal. Legal: a multiple of {stride}, such as {near}.")
    return given


def probe_size(model: nn.Module) -> int:
    """Return the side in pixels of the smallest image that shows how the channels of a model are coupled."""
    stride = max_stride(model)  # two cells on the coarsest level, and as many cells as a transformer has queries
    size, queries = 2 * stride, getattr(detection_head(model), "num_queries", 0)
    while sum((size * 4 // stride // 2**level) ** 2 for level in range(3)) < queries:
        size += stride
    return size


def input_channels(model: nn.Module) -> int:
    """Return the number of image channels that the model takes."""
    yaml = getattr(model, "yaml", None) or {}
    return int(yaml.get("channels") or yaml.get("ch") or 3)


def returned_tensors(out: Any) -> Iterator[torch.Tensor]:
    """Yield the tensors that a YOLO returns, without the neck maps that the head passes along as ``feats``."""
    if isinstance(out, torch.Tensor):
        yield out
    elif isinstance(out, (dict, list, tuple)):
        for part in [v for k, v in out.items() if k != "feats"] if isinstance(out, dict) else out:
            yield from returned_tensors(part)


def refresh_widths(model: nn.Module, kept: dict[str, dict[str, list[int]]] | None = None) -> None:
    """Set width attributes of blocks right after surgery that `kept` these positions by layer path and dimension."""
    for path, m in model.named_modules():
        if isinstance(m, FREE_CUTS) and (index := (kept or {}).get(f"{path}.conv", {}).get("out")) is not None:
            ends = [sum(m.c2s[: i + 1]) for i in range(len(m.c2s))]
            m.c2s = [sum(end - width <= i < end for i in index) for end, width in zip(ends, m.c2s)]
        if isinstance(m, WIDTH_ATTRIBUTES) and hasattr(m, "c") and hasattr(m, "cv1"):
            m.c = m.cv1.conv.out_channels // 2
        if isinstance(m, ATTENTION):
            m.head_dim = m.proj.conv.in_channels // m.num_heads
        if hasattr(m, "c1") and hasattr(m, "c2") and type(m).__name__ == "RepConv":
            m.c1, m.c2 = m.conv1.conv.in_channels, m.conv1.conv.out_channels
    detection_head(model).shape = None  # cached anchors


def deployed(model: nn.Module) -> nn.Module:
    """Return a fused copy, which is what runs after export: BatchNorm folded, train-only branches gone."""
    return deepcopy(model).eval().fuse(verbose=False)


def deployed_layers(model: nn.Module) -> set[str]:
    """Return the paths of the layers and norms whose work remains after fusing, in the names of the unfused model."""
    # Fusing drops one branch of end-to-end heads, and merges those of a reparameterised block into its widest.
    fused = dict(deployed(model).named_modules())
    names = set()
    for path, m in model.named_modules():
        if path not in fused:
            continue
        if isinstance(m, (nn.Conv2d, nn.ConvTranspose2d, nn.Linear, nn.BatchNorm2d)):
            names.add(path)
        elif type(m).__name__ in WIDEST_BRANCH:
            names.add(f"{path}.{WIDEST_BRANCH[type(m).__name__]}")
    return names


def gflops(model: nn.Module, imgsz: int = 640) -> float:
    """Return the GFLOPs of the deployed model as Ultralytics counts them (2 x MACs)."""
    net, shape = deployed(model).float(), (1, input_channels(model), imgsz, imgsz)
    try:
        import thop  # PyPI's package of this name, which may lie in its place, is not importable everywhere

        net.cpu()  # zeros on the CPU: shapes alone, on the meta device, would take torch 1.5 s of imports
        return float(thop.profile(net, inputs=[torch.zeros(shape)], verbose=False)[0] / 1e9 * 2)
    except Exception as e:  # whatever a user's block raises
        why = f"{type(e).__name__}: {str(e)[:200]}"
    clash = f"If the model runs at this size, PyPI's 'thop' may have overwritten 'ultralytics-thop': {THOP}"
    raise UsageError(f"FLOPs cannot be counted at {imgsz} pixels ({why}). {clash}")


def fuse_blocks(model: nn.Module) -> nn.Module:
    """Fold BatchNorm into the convolutions of plain Conv blocks in place, leaving every branch of the head."""
    for m in model.modules():
        if isinstance(m, conv.Conv) and hasattr(m, "bn") and type(m).forward is conv.Conv.forward:
            m.conv = fuse_conv_and_bn(m.conv, m.bn)
            del m.bn
            m.forward = m.forward_fuse
    return model


def single_conv(m: nn.Module) -> bool:
    """Tell whether a block runs as ``act(conv(x))`` once deployed; one of several branches does only when fused."""
    deployed_so = isinstance(m, (conv.Conv, *BRANCHED)) and isinstance(getattr(m, "conv", None), nn.Conv2d)
    return deployed_so and not any(hasattr(m, branch) for branch in ("conv1", "conv2", "cv2"))


def branched(model: nn.Module) -> list[str]:
    """Return the paths of the blocks whose branches are not merged yet."""
    names = ("conv1", "cv2")
    return [p for p, m in model.named_modules() if isinstance(m, BRANCHED) and any(hasattr(m, b) for b in names)]


def merge_block(m: Any) -> bool:
    """Turn a block of several branches into a plain `Conv` in place, and tell whether it has lost its BatchNorm."""
    kept = isinstance(m, conv.Conv2)  # behind the sum of the branches
    m.fuse() if hasattr(m, "fuse") else m.fuse_convs()
    if kept:
        del m.forward
    m.__class__ = conv.Conv
    return not kept


def branches(raw: dict[str, Any]) -> dict[str, dict[str, torch.Tensor]]:
    """Return the raw outputs by branch; a head with one branch has the key ``""``."""
    return {k: raw[k] for k in ("one2many", "one2one")} if "one2many" in raw else {"": raw}


def level_inputs(model: nn.Module) -> list[str]:
    """Return, for each level, the path of the first layer of the head's box branch, whose input is the neck map."""
    first = [next(n for n, m in b.named_modules() if isinstance(m, nn.Conv2d)) for b in detection_head(model).cv2]
    return [f"{head_prefix(model)}cv2.{level}.{layer}" for level, layer in enumerate(first)]


def level_widths(model: nn.Module) -> list[int]:
    """Return the channels of the neck map of each level."""
    modules = dict(model.named_modules())
    return [modules[p].in_channels for p in level_inputs(model)]


def restart_ema(ema: Any) -> None:
    """Make a ModelEMA look up the tensors that it pairs anew, after surgery has replaced them."""
    if hasattr(ema, "_pairs"):
        ema._pairs = None


def rewrap(trainer: Any) -> None:
    """Wrap the model of a multi-GPU run anew after surgery: DDP holds on to the parameters that it was made with."""
    old = trainer.model
    if not isinstance(old, nn.parallel.DistributedDataParallel):
        return
    names = inspect.signature(nn.parallel.DistributedDataParallel).parameters
    sync: Any = {"forward_sync_buffers" if "forward_sync_buffers" in names else "broadcast_buffers": False}
    trainer.model = nn.parallel.DistributedDataParallel(
        old.module, device_ids=old.device_ids, find_unused_parameters=old.find_unused_parameters, **sync
    )


def freeze(model: nn.Module, layers: Any) -> None:
    """Freeze layers as `freeze=` of Ultralytics is going to: the first n, or a list of indices."""
    chosen = layers if isinstance(layers, list) else range(layers) if isinstance(layers, int) else []
    prefixes = tuple(f"model.{i}." for i in chosen)
    for name, p in model.named_parameters():
        if name.startswith(prefixes):
            p.requires_grad_(False)
