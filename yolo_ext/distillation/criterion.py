# Copyright (C) yolo_ext authors. AGPL-3.0 licence.
"""The distillation criterion: the task's own loss plus what the teacher says, each part logged under its own name."""

import inspect
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from ultralytics.utils import LOGGER, RANK, colorstr

from yolo_ext import stock
from yolo_ext.core.config import DistillConfig
from yolo_ext.core.registry import Need
from yolo_ext.core.schedules import loss_factor
from yolo_ext.distillation.losses import Align, HeadOutput, modules, resized
from yolo_ext.distillation.teacher import Guide, Site, Taps, make_guides, sites
from yolo_ext.distillation.terms import Balance, Term, check, terms, title, with_logits
from yolo_ext.stock.trainer import Proxy

Branches = dict[str, dict[str, Any]]  # raw outputs by branch of the head
Maps = dict[Any, torch.Tensor]  # (B, C, H, W) by level of the head or path of a layer
Pair = tuple[float, HeadOutput, HeadOutput]  # gain, output of the student, of the teacher


class Distiller:
    """Teachers, weights and adapters of one run, which are resumed with the student but never part of a saved model."""

    def __init__(self, student: nn.Module, cfg: DistillConfig, device: torch.device, *, shrinks: bool = False) -> None:
        """Load the teachers and build adapters from the live widths of a student that may be going to shrink."""
        self.guides = make_guides(cfg, student, device)
        self.student, self.cfg = student, with_logits(cfg, student, self.guides)
        self.terms = terms(self.cfg)
        for guide in self.guides:
            check(self.terms, guide, student, shrinks=shrinks)
        self.sites = [(g, t, site) for g, guide in enumerate(self.guides) for t, term in enumerate(self.terms)
                      if term.kind == "features" for site in sites(term.layers, student, guide)]  # fmt: skip
        self.aligns: dict[tuple[int, Site], Align] = {}
        self.extras: dict[tuple[int, int, Site], nn.Module] = {}
        self._build_adapters(shrinks)
        self.levels = [s.student if isinstance(s.student, int) else None for _, s in self.aligns]
        self.balance = Balance()
        # Trained and resumed along with the student, by position.
        self.adapters = nn.ModuleList([*self.aligns.values(), *self.extras.values(), self.balance]).to(device)
        if _processes() > 1:  # each of them has drawn other numbers
            for tensor in self.adapters.state_dict().values():
                dist.broadcast(tensor, 0)
        self.taps = [Taps(student, sorted({s.student for *_, s in self.sites if isinstance(s.student, str)}))]
        for g, guide in enumerate(self.guides):
            paths = {s.teacher for i, _, s in self.sites if i == g and isinstance(s.teacher, str)}
            self.taps.append(Taps(guide.model, sorted(paths)))
        self.keys = ["kd_cls_loss", "kd_box_loss"] * bool(cfg.logits) + ["kd_feat_loss"] * bool(cfg.features)
        self.factors = [1.0] * len(self.terms)
        self.step = self.skipped = 0  # batches: of the run, and of this epoch without a finite loss
        self.seen: dict[str, float] | None = {} if RANK in {-1, 0} else None  # what the first batch shows, until logged

    def _build_adapters(self, shrinks: bool) -> None:
        """Build first what brings maps to one width, then what single losses need."""
        for g, t, site in self.sites:
            if self.terms[t].needs(Need.EQUAL_WIDTH) and (g, site) not in self.aligns:
                levels = self.guides[g].kept
                kept = levels[site.student] if levels and isinstance(site.student, int) else None
                self.aligns[g, site] = Align(*site.widths, kept, always=shrinks)
        for g, t, site in self.sites:
            if self.terms[t].needs(Need.MODULE):
                channels = self.aligns[g, site].kept
                width = site.widths[1] if channels is None else len(channels)
                self.extras[g, t, site] = modules[self.terms[t].row.name](width)

    def begin(self, trainer: Any) -> None:
        """Take the running average of a trainer's student as teacher, where it is to be that."""
        for guide in self.guides:
            if guide.name == "ema":
                guide.get = lambda: trainer.ema.ema

    def summary(self) -> str:
        """Return in one line what is distilled from whom, and how both sides correspond."""
        cfg, lines = self.cfg, []
        for g, guide in enumerate(self.guides):
            n, known = len(guide.classes[0]), len(self.student.names)
            classes = "" if n in (known, 0) else f", {n} of {known} classes shared"
            strides = [int(s) for s in stock.detection_head(self.student).stride] if guide.levels else []
            shared = [strides[i] for i, _ in guide.levels]
            partly = "" if len(shared) == len(strides) else f", strides {shared} only"
            names: dict[Any, str] = {i: f"P{s.bit_length() - 1}" for i, s in enumerate(strides)}  # of the pyramid
            found = dict.fromkeys(s for i, _, s in self.sites if i == g)
            maps = ", ".join(f"{names.get(s.student, s.student)} {s.widths[0]}->{s.widths[1]}" for s in found)
            how = "kept channels compared directly" if guide.kept is not None else "1x1 adapters where widths differ"
            how = how if any(i == g for i, _ in self.aligns) else "compared as they are"
            lines.append(f"teacher {guide.name}{classes}{partly}" + (f"; channels {maps}, {how}" if maps else ""))
        seen = f", which sees {cfg.imgsz} px" if cfg.imgsz else ""
        every = f", every {cfg.every} batches" if cfg.every > 1 else ""
        balance = f", kept at {cfg.share:g} of the task loss" if cfg.balance == "auto" else ""
        return "; ".join([title(self.terms), *lines]) + f"{seen}; {cfg.schedule} schedule{every}{balance}"

    def set_epoch(self, epoch: int, epochs: int, close_mosaic: int = 0) -> None:
        """Set the schedule factors for this epoch, counted from 0, and report what the last one skipped."""
        self.factors = [loss_factor(epoch=epoch, epochs=epochs, **t.timing) for t in self.terms]
        if self.cfg.mosaic == "stop" and close_mosaic and epoch >= epochs - close_mosaic:
            self.factors = [0.0] * len(self.terms)
        if self.skipped:
            LOGGER.warning(f"{colorstr('distill: ')}{self.skipped} batches of the last epoch had no finite loss")
        self.skipped = 0

    def losses(self, predictions: Any, batch: dict[str, Any], gains: dict[str, float],
               task: torch.Tensor | None = None) -> dict[str, torch.Tensor]:  # fmt: skip
        """Return the weighted losses per image of raw outputs; `gains` go by branch, `task` is the scalar task loss."""
        taken = self.taps[0].take()
        self.step += 1
        zero = batch["img"].new_zeros((), dtype=torch.float32)
        nothing = dict.fromkeys(self.keys, zero)
        if (self.step - 1) % self.cfg.every or not any(self.factors):
            return nothing
        found, plain = dict(nothing), zero
        with torch.autocast(batch["img"].device.type, enabled=False):
            for name, key, factor, part in self._parts(_branches(predictions), batch, gains, taken):
                found[key] = found[key] + factor * part
                plain = plain + part.detach()
                if self.seen is not None:
                    name = f"{name} {key.split('_')[1]}"
                    self.seen[name] = self.seen.get(name, 0.0) + float(part.detach())
        if self.seen and task is not None:
            parts = ", ".join(f"{k} {v:.3g}" for k, v in self.seen.items() if v)
            LOGGER.info(f"{colorstr('distill: ')}first batch: task loss {float(task):.3g}, at full weight {parts}")
            self.seen = None
        scale: Any = self.cfg.beta * self.cfg.every
        if self.cfg.balance == "auto" and task is not None:
            scale = scale * self.balance(task, plain, self.cfg.share)
        found = {k: scale * v for k, v in found.items()}
        if torch.stack([v.detach() for v in found.values()]).isfinite().all():
            return found
        if not self.skipped:
            LOGGER.warning(f"{colorstr('distill: ')}loss is not finite: batch trained without, the epoch's are counted")
        self.skipped += 1
        return nothing

    def _parts(self, student: Branches, batch: dict[str, Any], gains: dict[str, float],
               taken: Maps) -> Iterator[tuple[str, str, float, torch.Tensor]]:  # fmt: skip
        """Yield (method, key, schedule factor, weighted loss) from the student's branches and tapped maps."""
        for g, guide in enumerate(self.guides):
            teacher = _branches(guide.ask(batch["img"]))
            pairs = self._pairs(guide, student, teacher, gains)
            maps = [{**dict(enumerate(next(iter(side.values())).get("feats", ()))), **tapped}
                    for side, tapped in ((student, taken), (teacher, self.taps[g + 1].take()))]  # fmt: skip
            for t, (term, factor) in enumerate(zip(self.terms, self.factors)):
                if not factor:
                    continue
                if term.kind == "features":
                    parts = {"kd_feat_loss": self._features(g, t, maps)}
                else:
                    parts = self._logits(term, pairs, classify=not guide.levels)
                for key, part in parts.items():
                    yield term.row.name, key, factor, term.weight / len(self.guides) * part

    def _pairs(self, guide: Guide, student: Branches, teacher: Branches, gains: dict[str, float]) -> list[Pair]:
        """Return the outputs of each branch of the student that is taught."""
        pairs = []
        for name, gain in gains.items():
            # A head without this branch teaches with its dense one, except a one-to-one branch: dense targets
            # would teach it to fire several times per object.
            source = teacher.get(name) or (None if name == "one2one" else next(iter(teacher.values())))
            if source is not None:
                ours, theirs = guide.output(student[name], self.student, 0), guide.output(source, guide.model, 1)
                pairs.append((gain, ours, theirs))
        return pairs

    def _logits(self, term: Term, pairs: list[Pair], *, classify: bool) -> dict[str, torch.Tensor]:
        """Return both parts of a logit loss, added up over branches."""
        options = dict(term.options)
        if classify and "norm" in inspect.signature(term.row.fn).parameters:
            options.setdefault("norm", "mean")  # a classifier has no objects to weight
        cls = box = pairs[0][1].scores.new_zeros((), dtype=torch.float32)
        for gain, ours, theirs in pairs:
            parts = term.row.fn(ours, theirs, **options)
            cls, box = cls + gain * parts[0], box + gain * parts[1]
        return {"kd_cls_loss": cls, "kd_box_loss": box}

    def _features(self, g: int, t: int, maps: list[Maps]) -> torch.Tensor:
        """Return a feature loss, added up over the maps that it compares."""
        term, parts = self.terms[t], []
        options = dict(term.options)
        for site in [s for i, j, s in self.sites if (i, j) == (g, t)]:
            ours, theirs = maps[0][site.student], maps[1][site.teacher]
            theirs = resized(theirs, ours.shape[2:])  # of a teacher that sees images of another size
            if term.needs(Need.EQUAL_WIDTH):
                ours, theirs = self.aligns[g, site](ours, theirs)
            if term.needs(Need.MODULE):
                options["module"] = self.extras[g, t, site]
            parts.append(term.row.fn(ours, theirs, **options))
        return torch.stack(parts).sum()

    def sync(self) -> None:
        """Average the gradients of the adapters over all processes, and the balance; to be called before a step."""
        if (count := _processes()) == 1:
            return
        for p in self.adapters.parameters():  # each sends all of them, also where its own loss was off or not finite
            p.grad = torch.zeros_like(p) if p.grad is None else p.grad
        tensors = [*(p.grad for p in self.adapters.parameters()), self.balance.means]
        mean = torch.cat([t.flatten() for t in tensors]) / count  # gloo knows no average
        dist.all_reduce(mean)
        for tensor, part in zip(tensors, mean.split([t.numel() for t in tensors])):
            tensor.copy_(part.view_as(tensor))


def _processes() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def _branches(raw: Any) -> Branches:
    """Return the raw outputs of a head by branch, also those of a classifier."""
    return {"": {"scores": raw}} if isinstance(raw, torch.Tensor) else stock.branches(raw)


class DistillationLoss(Proxy):
    """The task's criterion plus the losses of a distiller."""

    def __call__(self, predictions: Any, batch: dict[str, Any]) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Return the loss vector, times batch size as all Ultralytics losses are, and the detached items."""
        loss, items = self.base(predictions, batch)
        raw = predictions[1] if isinstance(predictions, tuple) else predictions
        size = 1 if isinstance(raw, torch.Tensor) else batch["img"].shape[0]  # that of a classifier is a mean
        ends = isinstance(raw, dict) and "one2many" in raw
        gains = {"one2many": self.base.o2m, "one2one": self.base.o2o} if ends else {"": 1.0}
        found = self.distiller.losses(raw, batch, gains, loss.detach().sum() / size)
        hard = self.distiller.cfg.alpha * loss.reshape(-1)
        if not self.distiller.cfg.alpha and any(v.requires_grad for v in found.values()):
            hard = hard.detach()  # zero gradients need no backward pass through the head
        vector = torch.cat([hard, torch.stack(list(found.values())) * size])
        return vector, {**items, **{k: v.detach() for k, v in found.items()}}
