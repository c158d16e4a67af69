# Copyright (C) yolo_ext authors. AGPL-3.0 licence.
"""What labelled images tell about each weight: salience for the criteria that need data, and the losses of the task.

All of it is measured on a float copy that computes its training outputs with the statistics of BatchNorm held still:
train-only branches count, no image changes the activations of another, and nothing is random.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn
from ultralytics.utils import DEFAULT_CFG, TQDM, IterableSimpleNamespace

from yolo_ext import stock
from yolo_ext.core.errors import UsageError
from yolo_ext.pruning.labels import LAYERS

Evidence = dict[str, torch.Tensor]  # parameter name -> salience of each element, or layer path -> of each output
Batch = dict[str, Any]
PER_BOX = ("cls", "bboxes", "keypoints", "batch_idx")


@dataclass(frozen=True)
class Probes:
    """Ways to look at a model from outside; each is None where there are no data to look with.

    `batches` are labelled train batches as `model.loss` takes them (images in 0..1, on the device of the model), anew
    and in the same order at each call, `images` those (B, C, H, W) for BatchNorm. `accuracy` gives the metrics of the
    task on the val split as `stock.accuracy` does, `speed` the measured latency of a model over that of another.
    """

    batches: Callable[[], Iterable[dict[str, Any]]] | None = None
    images: Callable[[], Iterable[torch.Tensor]] | None = None
    accuracy: Callable[[nn.Module], Mapping[str, float]] | None = None
    speed: Callable[[nn.Module, nn.Module], float] | None = None


NO_PROBES = Probes()


def collect(model: nn.Module, method: str, batches: Iterable[Batch]) -> Evidence:
    """Return how much the task's loss depends on each weight, and for ``obd`` on each output of each layer."""
    copy = _observed(model).requires_grad_(True)
    batches = TQDM(_single(batches, copy) if method == "hessian" else batches, desc=f"Criterion {method}")
    with torch.enable_grad():
        return {name: t.cpu() for name, t in COLLECTORS[method](copy, batches).items()}


@torch.no_grad()
def task_losses(model: nn.Module, batches: Iterable[Batch]) -> dict[str, float]:
    """Return each loss of the task by the name that its criterion gives it, averaged over the images of `batches`."""
    copy = _observed(model)
    total, images = defaultdict[str, float](float), 0
    for batch in batches:
        if size := len(batch["img"]):
            for name, value in copy.loss(batch)[1].items():
                total[name] += float(value) * size
            images += size
    _counted(images)
    return {name: value / images for name, value in total.items()}


def _observed(model: nn.Module) -> nn.Module:
    """Return a float copy that gives training outputs, deterministically, and knows the loss gains."""
    copy = deepcopy(model).float()
    own = getattr(copy, "args", None) or {}
    own = own if isinstance(own, dict) else vars(own)
    copy.args = IterableSimpleNamespace(**{**vars(DEFAULT_CFG), **own})
    if hasattr(copy, "criterion"):  # it may be a module, whose place only another module could take
        del copy.criterion
    head = stock.detection_head(copy)
    if not hasattr(copy, "nc"):  # the trainer sets it, and the loss of RT-DETR reads it
        copy.nc = getattr(head, "nc", None)
    copy.train(not isinstance(head, stock.OPAQUE))  # the training mode of a transformer head adds random queries
    for m in copy.modules():
        if isinstance(m, (nn.modules.batchnorm._BatchNorm, nn.modules.dropout._DropoutNd)):
            m.eval()
    return copy


def _single(batches: Iterable[Batch], model: nn.Module) -> Iterator[Batch]:
    """Yield the images of labelled batches one by one."""
    per_box = PER_BOX if model.args.overlap_mask else (*PER_BOX, "masks")
    for batch in batches:
        size, boxes = len(batch["img"]), batch.get("batch_idx")
        for i in range(size):
            one = {}
            for key, value in batch.items():
                if key in per_box and boxes is not None:
                    one[key] = value[boxes.view(-1) == i]
                else:
                    each = isinstance(value, (list, tuple, torch.Tensor)) and len(value) == size
                    one[key] = value[i : i + 1] if each else value
            if boxes is not None:
                one["batch_idx"] = torch.zeros_like(one["batch_idx"])
            yield one


def _backward(model: nn.Module, batch: Batch) -> int:
    """Put the gradients of the summed loss of all images into the model and return the number of images."""
    size = len(batch["img"])
    model.zero_grad(set_to_none=True)
    if size:
        loss = model.loss(batch)[0]
        (loss.sum() if loss.ndim else loss * size).backward()  # a scalar is the mean over the images
    return size


def _counted(images: int) -> int:
    """Return the number of images, of which there must be one."""
    if not images:
        raise UsageError("There is no labelled train image to measure with. Check the train split of data=...")
    return images


def _by_gradients(model: nn.Module, batches: Iterable[Batch], power: int) -> Evidence:
    """Return |w * g| for each weight, g its mean gradient (power 1), or w^2 * F, F its mean squared one (power 2)."""
    total: Evidence = {}
    images = 0
    for batch in batches:
        images += _backward(model, batch)
        for name, p in model.named_parameters():
            if p.grad is not None:
                total[name] = total.get(name, 0) + p.grad.pow(power)
    weights = dict(model.named_parameters())
    _counted(images)
    return {name: (weights[name].detach().pow(power) * g / images).abs() for name, g in total.items()}


def _obd(model: nn.Module, batches: Iterable[Batch]) -> Evidence:
    """Return S_ii * w_i^T A w_i for each output i of each layer (Wang et al., EigenDamage, 2019, arXiv:1905.05934)."""
    # S is the mean second moment of the output gradients, A that of the inputs; w_i^T A w_i that of the output itself.
    energy, gradient = Evidence(), Evidence()

    def moment(x: torch.Tensor) -> torch.Tensor:  # (positions, channels) squares
        channels = x.detach().transpose(1, -1) if x.ndim == 4 else x.detach()
        return channels.reshape(-1, channels.shape[-1]).square()

    def save(path: str, g: torch.Tensor) -> None:
        gradient[path] = gradient.get(path, 0) + len(g) * moment(g).mean(0)

    def after(path: str, module: nn.Module, args: Any, out: torch.Tensor) -> None:
        energy[path] = energy.get(path, 0) + moment(out).sum(0)
        out.register_hook(partial(save, path))

    for path, m in model.named_modules():
        if isinstance(m, LAYERS):
            m.register_forward_hook(partial(after, path))
    images = _counted(sum(_backward(model, batch) for batch in batches))
    return {path: energy[path] * g / images**2 for path, g in gradient.items()}


COLLECTORS: dict[str, Callable[[nn.Module, Iterable[Batch]], Evidence]] = {
    "taylor": partial(_by_gradients, power=1), "hessian": partial(_by_gradients, power=2), "obd": _obd,
}  # fmt: skip
