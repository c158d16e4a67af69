# Copyright (C) yolo_ext authors. AGPL-3.0 licence.
"""Quantization-aware training in a training run: the model, its ranges and BatchNorm by epoch, validation."""

import math
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from ultralytics.utils import LOGGER, RANK, colorstr

from yolo_ext import stock
from yolo_ext.checkpoint import manifest, note
from yolo_ext.core.errors import UsageError
from yolo_ext.core.options import DistillConfig
from yolo_ext.data.check import check_calibration
from yolo_ext.quantization import fake_quant as fq
from yolo_ext.quantization import qat
from yolo_ext.quantization.layers import ADDED
from yolo_ext.quantization.observers import observers, weight_observers
from yolo_ext.quantization.spec import resolve_profile
from yolo_ext.stock.accuracy import accuracy, score
from yolo_ext.stock.context import undisturbed
from yolo_ext.stock.load import load_model
from yolo_ext.stock.trainer import agreed
from yolo_ext.training.technique import Technique, input_size, live

FEATURES = "mimic"  # what the float self teaches where there are no labels (NVIDIA's QAT of YOLOv7)
PREFIX = "quantize: "


class Quant(Technique):
    """The student computes with the codes that its INT8 file is going to compute with."""

    key = "quant"

    def __init__(self, configs: dict[str, Any], args: Any) -> None:
        super().__init__(configs, args)
        self.needs_labels = self.cfg.supervision != "features"

    @classmethod
    def settle(cls, configs: dict[str, Any], args: Any) -> None:
        """Refuse what contradicts QAT; choose teacher and learning rate where they follow from it."""
        cfg = configs["quant"]
        if cfg.mode == "ptq":
            raise UsageError("'quant.mode=ptq' does not train. Use `yolo-ext quantize`, or quant.mode=qat to train.")
        for name, why in (("quantize", "Both insert fake quantizers"), ("distill_model", "It hides the student")):
            if value := getattr(args, name, None):
                both = f"'{name}={value}' of Ultralytics and 'quant.*' of yolo_ext are both set. {why}"
                instead = ", and give distill.teacher instead" if name == "distill_model" else ""
                raise UsageError(f"{both}: leave {name} out{instead}.")
        if cfg.supervision == "auto":
            by_labels = configs["distill"] or args.task == "classify"  # which has no neck to learn from
            cfg = configs["quant"] = replace(cfg, supervision="labels" if by_labels else "features")
        if cfg.supervision == "features":
            configs["distill"] = without_labels(configs["distill"])
        if str(args.optimizer).lower() == "auto":  # which chooses a rate for training from scratch
            args.optimizer, args.lr0 = "AdamW", cfg.lr0
        args.warmup_bias_lr = min(args.warmup_bias_lr, args.lr0)  # 0.1 throws a trained model far off

    def check(self, model: nn.Module, info: dict[str, Any], imgsz: int) -> None:
        """Refuse images that cannot calibrate, and options that match nothing."""
        cfg = self.cfg
        check_calibration(cfg.source or info, cfg.calib, cfg.seed)
        observers[cfg.observer]
        weight_observers[cfg.weight_observer]
        fq.insert_fake_quant(model, resolve_profile(cfg.profile), cfg.exclude, cfg.config_list)

    def put_in(self, trainer: Any, model: nn.Module, weights: nn.Module | None) -> nn.Module:
        """Return the float student fake-quantized, with the ranges that it has or else calibrated ones."""
        cfg = self.cfg
        if trainer.resume and (record := manifest(model).quant):
            cfg = replace(cfg, profile=record["profile"])  # `auto` may mean another one on this machine

        def prepare() -> nn.Module:
            qat.prepare(model.to(trainer.device), cfg, trainer.data, input_size(trainer, model))
            return model.cpu()

        return agreed(prepare)

    def start(self, trainer: Any) -> None:
        """Say what the model is worth before it is trained, which is the result of PTQ, and note it in the manifest."""
        if trainer.resume:  # which has said it
            return
        model, own, found = deepcopy(trainer.ema.ema), trainer.validator, {}
        with undisturbed(trainer.device):  # on several GPUs all take part, and one knows
            for name, mode in (("ptq", "on"), ("base", "float")):
                fq.set_mode(model, mode)
                found[name] = score(accuracy(model, like=own, loader=own.dataloader)) or 0.0
        if RANK in {-1, 0}:
            for m in (live(trainer), trainer.ema.ema):
                note(m, quant={**manifest(m).quant, **found})
            args, said = trainer.args, f"{found['ptq']:.4f} (float {found['base']:.4f}) at {own.args.imgsz} px"
            how = f"validated as the epochs will be; {args.optimizer} with lr0={args.lr0:g}"
            LOGGER.info(f"{colorstr(PREFIX)}PTQ start: {stock.metric(args.task)} {said}, {how}")

    def before_epoch(self, trainer: Any) -> None:
        """Let ranges follow the data, or fix them."""
        for model in (live(trainer), trainer.ema.ema):
            fq.set_mode(model, "on", momentum=qat.MOMENTUM if trainer.epoch < self.cfg.observe_epochs else 0.0)

    def train_mode(self, trainer: Any) -> None:
        """Fix the statistics of BatchNorm when it is time."""
        if trainer.epoch >= math.ceil(self.cfg.freeze_bn * trainer.epochs):
            for m in live(trainer).modules():
                if isinstance(m, nn.BatchNorm2d):
                    m.eval()

    def before_step(self, trainer: Any) -> None:
        """Keep ranges that follow the data equal on all devices."""
        if trainer.world_size > 1 and trainer.epoch < self.cfg.observe_epochs:
            mean_of_ranks(live(trainer), trainer.world_size)

    def as_stock(self, model: nn.Module) -> nn.Module:
        """Return a copy of stock classes that carries specs and ranges in its manifest."""
        copy = deepcopy(model)
        qat.bake(copy)
        return qat.strip(copy)

    def inexact(self, ema: nn.Module) -> set[str]:
        """Return the weights, which are rounded to codes, and the ranges, which are in the manifest."""
        added = {name for name in ema.state_dict() if name.endswith(ADDED)}
        return added | {f"{path}.weight" for path, *_ in fq.quantized_layers(ema)}

    def reload(self, trainer: Any, ckpt: dict[str, Any]) -> None:
        """Set the ranges from the manifest of a checkpoint."""
        if ckpt.get("ema") and (record := manifest(ckpt["ema"]).quant):
            for model in (live(trainer), trainer.ema.ema):
                fq.load_state(model, record["state"])

    def final(self, path: Path) -> nn.Module:
        """Return the model of a checkpoint as its INT8 file computes."""
        return quantized(path)


def without_labels(given: DistillConfig | None) -> DistillConfig:
    """Return the distillation of a training that labels have no part in; refuse a given one that weighs them."""
    if given is None:
        return DistillConfig(features=FEATURES, logits=None, alpha=0.0, schedule="constant", preflight=False)
    if given.alpha:
        clash = f"'quant.supervision=features' trains without labels, but 'distill.alpha={given.alpha:g}' weighs them"
        raise UsageError(f"{clash}. Set distill.alpha=0, or leave quant.supervision out.")
    return given


def quantized(path: Path) -> nn.Module:
    """Return the model of a checkpoint as its INT8 file computes."""
    model = load_model(path)[0]
    fq.insert_state(model, manifest(model).quant["state"])
    return model


@torch.no_grad()
def mean_of_ranks(model: nn.Module, ranks: int) -> None:
    """Replace every range by its mean over all processes."""
    ends = [v for *_, q, _ in fq.quantizers(model) for v in (q.lo, q.hi)]
    mean = torch.stack(ends)
    dist.all_reduce(mean)
    torch._foreach_copy_(ends, list((mean / ranks).unbind()))
