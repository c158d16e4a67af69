# Copyright (C) yolo_ext authors. AGPL-3.0 licence.
"""The distillation criterion: the task's own loss plus what the teacher says, each part logged under its own name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from ultralytics.utils.tal import make_anchors

from yolo_ext import compat
from yolo_ext.config import DistillConfig
from yolo_ext.distillation.features import Align, feature_losses
from yolo_ext.distillation.logits import HeadOutput, logit_losses
from yolo_ext.distillation.schedules import schedules
from yolo_ext.distillation.teacher import class_map, kept_channels, load_teacher
from yolo_ext.proxy import CriterionProxy


class Distiller:
    """Teacher, adapters and weights of one run. Lives outside the student and is never part of a saved model."""

    def __init__(self, student: nn.Module, cfg: DistillConfig, device: torch.device, *, shrinks: bool = False) -> None:
        """Load the teacher and build one adapter per level from live widths.

        Args:
            student: Student, already pruned and on its device.
            cfg: Distillation options with `teacher` resolved to a path.
            device: Device of the student.
            shrinks: Whether the student is going to lose channels while it is trained.
        """
        self.cfg = cfg
        self.feature_fn: Callable | None = feature_losses[cfg.features].fn if cfg.features else None
        self.logit_fn: Callable | None = logit_losses[cfg.logits].fn if cfg.logits else None
        self.teacher, parent = load_teacher(cfg.teacher, student, device)
        self.classes = torch.tensor(class_map(self.teacher, student, cfg.teacher), device=device)
        kept = kept_channels(student, parent)
        widths = [compat.level_widths(m) for m in (student, self.teacher)]
        self.adapters = nn.ModuleList(
            Align(s, t, kept[i] if kept else None, always=shrinks) for i, (s, t) in enumerate(zip(*widths))
        ).to(device)
        self.direct = kept is not None
        self.scale = 1.0
        self.reg_max = (compat.detection_head(student).reg_max, compat.detection_head(self.teacher).reg_max)
        self.stride = compat.detection_head(student).stride

    def set_epoch(self, epoch: int, epochs: int) -> None:
        """Set the schedule factor for this epoch, counted from 0."""
        progress = min(epoch / max(epochs - 1, 1), 1.0)
        self.scale = schedules[self.cfg.schedule].fn(progress=progress, final=self.cfg.final)

    def losses(
        self, predictions: dict[str, Any], images: torch.Tensor, gains: dict[str, float]
    ) -> dict[str, torch.Tensor]:
        """Compute the weighted losses of a batch.

        Args:
            predictions: Raw train-mode output of the student.
            images: (B, C, H, W) images that the student saw.
            gains: Weight of each branch of the head, by its key; a head with one branch has the key ``""``.

        Returns:
            Scalars per image by name, with the same names in every batch.
        """
        with torch.no_grad():
            taught = self.teacher(images.to(next(self.teacher.parameters()).dtype))
        student, teacher = compat.branches(predictions), compat.branches(taught)
        zero = images.new_zeros((), dtype=torch.float32)
        found: dict[str, torch.Tensor] = {}
        with torch.autocast(images.device.type, enabled=False):
            if self.logit_fn:
                found.update(kd_cls_loss=zero, kd_box_loss=zero)
                for name, gain in gains.items():
                    # A head without this branch teaches with its dense one, except a one-to-one branch: dense targets
                    # would teach it to fire several times per object.
                    source = teacher.get(name) or (None if name == "one2one" else next(iter(teacher.values())))
                    if source is None:
                        continue
                    cls, box = self.logit_fn(self._head(student[name], 0), self._head(source, 1))
                    found["kd_cls_loss"] = found["kd_cls_loss"] + gain * self.cfg.logit_weight * self.scale * cls
                    found["kd_box_loss"] = found["kd_box_loss"] + gain * self.cfg.logit_weight * self.scale * box
            if self.feature_fn:
                maps = zip(self.adapters, next(iter(student.values()))["feats"], next(iter(teacher.values()))["feats"])
                parts = [self.feature_fn(*align(s, t), self.cfg.temperature) for align, s, t in maps]
                found["kd_feat_loss"] = self.cfg.feature_weight * self.scale * torch.stack(parts).sum()
        return found

    def _head(self, raw: dict[str, torch.Tensor], side: int) -> HeadOutput:
        """Decode one branch; `side` is 0 for the student and 1 for the teacher."""
        anchors, _ = make_anchors(raw["feats"], self.stride, 0.5)
        boxes, bins = raw["boxes"].float(), self.reg_max[side]
        b, _, a = boxes.shape
        boxes = boxes.view(b, 4, bins, a)
        if bins > 1:
            boxes = boxes.softmax(2).mul(torch.arange(bins, device=boxes.device).view(1, 1, -1, 1)).sum(2, keepdim=True)
        scores = raw["scores"] if side == 0 else raw["scores"][:, self.classes]
        return HeadOutput(scores, boxes.squeeze(2).transpose(1, 2), anchors.float())


class DistillationLoss(CriterionProxy):
    """The task's criterion plus the losses of a distiller."""

    def __init__(self, base: Any, distiller: Distiller) -> None:
        """Wrap the task's criterion `base`."""
        super().__init__(base, distiller=distiller)

    def __call__(self, predictions: Any, batch: dict[str, Any]) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Return the loss vector, times batch size as all Ultralytics losses are, and the detached items."""
        loss, items = self.base(predictions, batch)
        raw = predictions[1] if isinstance(predictions, tuple) else predictions
        gains = {"one2many": self.base.o2m, "one2one": self.base.o2o} if "one2many" in raw else {"": 1.0}
        found = self.distiller.losses(raw, batch["img"], gains)
        vector = torch.cat([loss.reshape(-1), torch.stack(list(found.values())) * batch["img"].shape[0]])
        return vector, {**items, **{k: v.detach() for k, v in found.items()}}
