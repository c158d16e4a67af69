# Copyright (C) yolo_ext authors. AGPL-3.0 licence.
"""One run of `compress`: what it was asked for, its folder, and how its models are loaded, measured and trained."""

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn
from ultralytics.utils import DEFAULT_CFG_DICT, LOGGER

from yolo_ext import runs, stock
from yolo_ext.checkpoint import atomic_write, save_model
from yolo_ext.core.config import EXT_DEFAULTS, as_plain, parse
from yolo_ext.core.errors import UsageError
from yolo_ext.core.lock import LOCK, RUN
from yolo_ext.core.log import resumes
from yolo_ext.core.options import DistillConfig, PruneConfig, QuantConfig, SparsityConfig
from yolo_ext.core.registry import Need
from yolo_ext.data.check import check_data
from yolo_ext.deployment.contract import judged, read_limits
from yolo_ext.pruning.criteria import criteria
from yolo_ext.stock.accuracy import METRIC, METRICS, accuracy, lost, score
from yolo_ext.stock.evidence import Evidence
from yolo_ext.stock.load import load_model, raw_checkpoint
from yolo_ext.training import check_settled, check_training
from yolo_ext.training.distill import remember
from yolo_ext.training.resume import clear
from yolo_ext.training.trainer import trainer_for

# Defaults of the trainings, below what the user gives. The model is trained already: low rate, short warm-up.
COMMON: dict[str, Any] = {"batch": 16, "optimizer": "AdamW", "cos_lr": True}
FINETUNE: dict[str, Any] = {**COMMON, "epochs": 30, "lr0": 0.001, "warmup_epochs": 1.0}
QAT: dict[str, Any] = {**COMMON, "warmup_epochs": 0.5, "mosaic": 0.0, "close_mosaic": 0}
ELSEWHERE = ("half", "int8", "nms", "format", "optimize", "workspace")  # of Ultralytics, for exports
OLDEST = 13  # opset with Q/DQ per channel
Loaded = tuple[nn.Module, dict[str, Any]]


@dataclass
class Run:
    """One compression run."""

    base: Path  # base model file
    data: str  # path of the data.yaml, empty when no stage needs data
    task: str  # of Ultralytics
    native: dict[str, Any]  # training arguments of Ultralytics given by the user
    sparsity: SparsityConfig | None
    prune: PruneConfig | None
    distill: DistillConfig | None
    quant: QuantConfig | None
    models: dict[Path, Loaded]  # base model and newest one by file, with their training arguments
    folder: Path = Path()
    info: dict[str, Any] = field(default_factory=dict)  # of the checked dataset
    imgsz: int = 0  # side of the square input in pixels
    max_drop: float | None = None  # accuracy that the result may lose against the base
    limits: dict[str, float] = field(default_factory=dict)  # of the contract, by figure; none: the default contract
    confidence: float | None = None  # with which budgets and limits hold; None: by the measured change itself
    fresh: bool = False  # whether the folder held nothing before
    done: dict[str, runs.Record] = field(default_factory=dict)  # by finished stage
    busy: float = 0.0  # share of the processors that others used when the run began
    left_out: list[str] = field(default_factory=list)  # what failed that the result is complete without

    @property
    def configs(self) -> dict[str, Any]:
        """Options by technique."""
        return {k: getattr(self, k) for k in EXT_DEFAULTS}

    @property
    def epochs(self) -> int:
        """Fine-tune epochs."""
        return int(self.native.get("epochs", FINETUNE["epochs"]))

    @property
    def device(self) -> torch.device:
        """Where models are evaluated, calibrated and checked."""
        return stock.device_of(self.native.get("device"))

    @property
    def graph(self) -> dict[str, Any]:
        """What the user says of the graph of ONNX files."""
        return {k: self.native[k] for k in ("opset", "simplify", "dynamic") if self.native.get(k) is not None}

    @property
    def prunes_later(self) -> bool:
        """Whether pruning is part of the fine-tuning instead of a stage of its own."""
        return bool(self.prune and (self.prune.at or self.prune.every or self.prune.steps))

    @property
    def metrics(self) -> str:
        """The metrics of the task, in words."""
        return " or ".join(METRIC[k] for k in METRICS[self.task])

    @property
    def cuts(self) -> bool:
        """Whether the run takes channels away."""
        return self.prune is not None and self.prune.kind == "structured"

    @property
    def teaching(self) -> DistillConfig | None:
        """Distillation options of a training, with the base model as teacher where the user named none."""
        itself = self.distill is not None and self.distill.teacher == "self"
        return replace(self.distill, teacher=str(self.base.resolve())) if itself else self.distill  # type: ignore[type-var]

    def weights(self) -> Path:
        """Return the file of the newest float weights."""
        found = [d.weights for d in self.done.values() if d.weights]
        return self.folder / found[-1] if found else self.base

    def load(self, file: Path | None = None) -> Loaded:
        """Return the float model of a file, by default the newest, and its training arguments; copy what you change."""
        file = file or self.weights()
        if file not in self.models:
            model, ckpt = load_model(file)
            self.models = {self.base: self.models[self.base], file: (model, dict(ckpt.get("train_args") or {}))}
        return self.models[file]

    def save(self, model: nn.Module, args: dict[str, Any], *place: str) -> Path:
        """Write a float model of given training arguments into the run folder."""
        model.args = args
        file = save_model(model, self.folder.joinpath(*place))
        self.models.pop(file, None)
        return file

    def accuracy(self, model: nn.Module | Path, keep: str = "") -> dict[str, Any]:
        """Measure a model over the val split; `keep` is where in the run folder the evidence of that goes."""
        write = (lambda found: atomic_write(self.folder / keep, found.data())) if keep else None
        return {**accuracy(model, self.data, self.imgsz, keep=write, device=self.device), "evidence": keep}

    def lost(self, before: dict[str, Any], after: dict[str, Any]) -> float:
        """Return the largest loss among the metrics of the task, with `confidence` the most that it may really be."""
        if self.confidence is None:
            return cast(float, lost(before, after))
        base, new = (Evidence.read(self.folder / measured["evidence"]) for measured in (before, after))
        found = judged(base, new, confidence=self.confidence)["changes"]
        return -min(c["low"] for c in found if c["name"] in METRICS[self.task])

    def relative(self, file: Path) -> str:
        """Return a file of the run as its records name it."""
        return str(file.relative_to(self.folder))

    def rows(self, stage: str) -> runs.Rows:
        """Return the measurements of a stage, none where it was not done."""
        return (self.done[stage].rows or []) if stage in self.done else []

    def quantized(self) -> tuple[str, runs.Record]:
        """Return the stage whose INT8 file is delivered, and its record."""
        name = "qat" if "qat" in self.done and self.done["qat"].better else "ptq"
        return name, self.done[name]


def open_run(model: str, data: str, resume: Any, options: dict[str, Any], stages: Iterable[str]) -> Run:
    """Check all that can be checked, then make the folder, or find that of the run to resume with its options."""
    mode = str(options.pop("mode", None) or "compress")
    if resume:
        options = runs.resumed(mode, {**options, "model": model, "data": data, "resume": resume})
        model, data, _ = (options.pop(k) for k in ("model", "data", "resume"))
    place, imgsz = {k: options.pop(k, None) for k in runs.PLACE}, options.pop("imgsz", None)
    asked = {k: options.pop(k, None) for k in ("max_drop", "contract", "confidence")}
    configs = parse({k: options.pop(k, None) for k in EXT_DEFAULTS})
    base, ckpt = load_model(model)
    loaded = {Path(model): (base, dict(ckpt.get("train_args") or {}))}
    run = Run(Path(model), data, stock.task_of(base), options, **configs, models=loaded)
    run.max_drop, contract, run.confidence = asked.values()
    _check_data(run)
    measured = data and run.base.suffix == ".pt"
    names = run.info.get("names", base.names)  # those of a model may be numbers still
    run.limits = asked["contract"] = read_limits(contract, run.task, names, run.confidence, measured, run.max_drop)
    run.imgsz = stock.image_size(base, ckpt, imgsz)
    _check_techniques(run)
    _check_graph(run)
    if not resume:
        place["save_dir"] = runs.located(place, run.task, mode)
        runs.make_way(place["save_dir"], stages, bool(place["exist_ok"]))
    run.folder = runs.folder(place, task=run.task, mode=mode)
    run.fresh = {p.name for p in run.folder.iterdir()} == {LOCK}
    plain = {"model": model, "data": data, "imgsz": run.imgsz, **options, **{k: v for k, v in asked.items() if v}}
    now = runs.inputs({**plain, **as_plain(configs)}, run.info.get("images", {}), names)
    if resume and (run.folder / runs.INPUTS).exists():
        runs.refuse_others(run.folder, runs.saved_options(run.folder / runs.INPUTS), now)
    runs.write_json(run.folder / runs.INPUTS, now)
    runs.record(run.folder / "args.yaml", plain)
    runs.record(run.folder / RUN, {**plain, **as_plain(configs)})
    resumes(mode, run.folder, RUN)
    return run


def _check_data(run: Run) -> None:
    """Read the dataset, and refuse one that is missing or has other classes than the model."""
    learns = {f"'epochs={run.epochs}'": run.epochs > 0, "'distill'": run.distill, "'quant'": run.quant}
    if run.prune and run.cuts:
        cfg = run.prune
        learns[f"'prune.method={cfg.method}'"] = cfg.method != "auto" and Need.DATA in criteria[cfg.method].needs
        learns["'prune.max_drop'"] = cfg.max_drop is not None
    reason = next((name for name, needs in learns.items() if needs), "")
    if reason and run.base.suffix != ".pt":
        lacks = f"'model={run.base}' has no trained weights, which {reason} needs"
        raise UsageError(f"{lacks}. Give a .pt; a .yaml can be pruned with epochs=0 only.")
    if reason and not run.data:
        hint = ", or epochs=0 to prune without data" if reason.startswith("'epochs") else ""
        raise UsageError(f"'data' is missing, which {reason} needs. Give data=path/to/data.yaml{hint}.")
    if not run.data:
        return
    base, _ = run.load()
    stock.refuse_untrainable(base)
    run.info = check_data(run.data, task=run.task)
    if run.native.get("single_cls", base.names == stock.ONE_CLASS):  # as it was trained
        run.info, run.native["single_cls"] = stock.one_class(run.info), True
    stock.check_fit(base, run.info, (run.base, run.data))


def _check_techniques(run: Run) -> None:
    """Refuse a target that cannot be reached or a teacher that does not fit before hours of training."""
    base, prune = run.load()[0], run.prune
    native = {**run.native, "model": str(run.base), "task": run.task}
    once = prune and replace(prune, at=[], every=None, start=None, end=None, steps=None)
    before = {**run.configs, "prune": once, "quant": None}
    epochs, info = run.sparsity.epochs if run.sparsity else max(run.epochs, 1), run.info or {"names": base.names}
    check_training(before, {**native, "epochs": epochs}, base, info, run.imgsz)
    if prune and not run.epochs and (run.prunes_later or prune.start or prune.end):
        raise UsageError("'epochs=0' trains nothing, so there are no epochs to prune in. Leave prune.at or every out.")
    check_settled({"prune": prune}, {**native, "epochs": max(run.epochs, 1)})
    if run.quant:  # QAT follows by itself
        alone = replace(run.quant, mode="qat", supervision="labels")
        check_training({"quant": alone}, native, base, run.info, run.imgsz)


def _check_graph(run: Run) -> None:
    """Refuse what the ONNX files of a run cannot have."""
    if not run.quant:
        return
    given = {k: run.native.get(k) for k in ELSEWHERE}
    if wrong := [k for k, v in given.items() if v not in (None, DEFAULT_CFG_DICT.get(k)) and (v or k == "nms")]:
        made = "this command writes FP32 and INT8 ONNX for NMS outside of the file, and measures those"
        raise UsageError(f"'{wrong[0]}={given[wrong[0]]}': {made}. Give it to `yolo-ext export` with the result.")
    if run.graph.get("opset", OLDEST) < OLDEST:
        raise UsageError(f"'opset={run.graph['opset']}': per-channel Q/DQ needs {OLDEST} or later. Leave opset out.")


def measure(run: Run, weights: Path, stage: str = "") -> dict[str, Any]:
    """Return params, GFLOPs, size and, where there are data, accuracy of float weights; a stage keeps the evidence."""
    model, _ = run.load(weights)
    found = runs.model_figures(model, weights, run.imgsz)
    if run.data:
        found.update(run.accuracy(model, f"{stage}/evidence.npz" if stage else ""))
        remember(model, run.data, run.imgsz, score(found))
    return found


def train(run: Run, stage: str, options: dict[str, Any], native: dict[str, Any], weights: Path | None = None) -> Path:
    """Train the newest weights, or those given, in the stage's folder, going on where a killed run stopped."""
    from ultralytics import YOLO

    folder = run.folder / stage
    last, best = (folder / "weights" / f"{name}.pt" for name in ("last", "best"))
    try:
        epoch = int(raw_checkpoint(last)["epoch"]) if last.exists() else None
    except UsageError:  # it holds what could run
        raise
    except Exception as e:  # a fault of the disk: it is replaced whole
        LOGGER.warning(f"{last} is damaged ({type(e).__name__}), so this training starts anew")
        epoch = None
    if epoch == -1:  # trained to the end by a run that was killed behind it
        clear(last.parent)
        return best if best.exists() else last
    free = ("device", "workers", "verbose", "plots")
    args: dict[str, Any] = {"resume": True, **{k: native[k] for k in free if k in native}}
    if epoch is not None:
        weights = last
    else:
        args = {"data": run.data, "imgsz": run.imgsz, **native, **options}
        if isinstance(args.get("batch"), int) and args["batch"] > 0:
            # With Ultralytics' nominal batch of 64, a small dataset gives a handful of optimizer steps per epoch.
            args.setdefault("nbs", args["batch"])
    yolo = YOLO(str(weights or run.weights()))
    yolo.train(trainer=trainer_for(run.task), save_dir=str(folder), exist_ok=True, **args)
    return best if best.exists() else last


def finetuning(run: Run) -> dict[str, Any]:
    """Return the training arguments of a fine-tuning: our defaults below those of the user."""
    return {**FINETUNE, "close_mosaic": min(10, run.epochs // 3), **run.native}
