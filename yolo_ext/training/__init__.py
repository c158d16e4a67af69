# Copyright (C) yolo_ext authors. AGPL-3.0 licence.
"""`yolo-ext train`: one training run with any technique in the loop, checked beforehand, and its summary."""

import time
from collections.abc import Mapping, Sequence
from copy import deepcopy
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from torch import nn
from ultralytics.utils import DEFAULT_CFG_DICT, LOGGER

from yolo_ext import runs, stock
from yolo_ext.checkpoint import atomic_write, hand_on, is_pruned
from yolo_ext.core.config import EXT_DEFAULTS, changes, parse, read_flat
from yolo_ext.core.errors import UsageError, refused
from yolo_ext.core.options import lasting
from yolo_ext.data.check import check_data
from yolo_ext.deployment.contract import judged, read_limits
from yolo_ext.reporting.tables import conclude, write_summary
from yolo_ext.stock.accuracy import METRIC, accuracy, score
from yolo_ext.stock.evidence import Evidence
from yolo_ext.stock.load import load_model
from yolo_ext.training.distill import remember
from yolo_ext.training.prune import budget_checks
from yolo_ext.training.technique import Technique
from yolo_ext.training.trainer import TRAINERS, CompressionMixin, attach, techniques_of, trainer_for

BASE = "base_evidence.npz"


def train(model: str | Path, **options: Any) -> dict[str, Any]:
    """Train a YOLO with our trainer of its task, as the command of this name does; returned is ``summary.json``."""
    from ultralytics import YOLO

    configs = parse({k: options[k] for k in EXT_DEFAULTS if k in options})
    resume = options.get("resume")
    if isinstance(resume, (str, Path)):  # Ultralytics would look for another run where this file is missing
        model, options["resume"] = resume, True
    base, ckpt = load_model(model)
    stock.refuse_untrainable(base)
    task = stock.task_of(base)
    measured, told = bool(ckpt) and not resume, (ckpt.get("train_args") or {}) if resume else options
    ended = resume and (ckpt.get("epoch", -1) < 0 or ckpt.get("optimizer") is None)
    folder = Path(model).resolve().parent.parent
    if ended and (folder / "args.yaml").exists():  # the file without an optimizer has no options of ours
        told = runs.saved_options(folder / "args.yaml")
    if ended and (told.get("base_accuracy") is None or (folder / "summary.json").exists()):
        raise UsageError(f"'{model}' is a finished training: nothing to resume. Give a last.pt of a stopped run.")
    imgsz = stock.image_size(base, ckpt, options.get("imgsz"), rounded=True)
    if resume:
        _check_moved(ckpt, options.get("data"), task)
    elif options.get("data"):
        own = read_flat(file, f"'cfg={file}'", "lr0: 0.001") if (file := options.get("cfg")) else {}
        args = {**own, **options, "model": str(model), "task": task}
        options["data"], fits = _check_start(configs, args, base, imgsz)
        measured &= fits
    max_drop, confidence, kept = told.get("max_drop"), told.get("confidence"), list[Evidence]()
    limits = read_limits(told.get("contract"), task, base.names, confidence, measured or resume, max_drop)
    figures = partial(_figures, imgsz=imgsz, device=options.get("device"), keep=kept.append)
    before = figures(base, None if resume else Path(model), options.get("data") if measured else None)
    if limits and kept:
        judged(kept[0], kept[0], limits, n=20)  # refuses those of classes and sizes that the split does not hold
    # Of a run that goes on the base may be gone.
    worth = told.get("base_accuracy") or {} if resume else {k: v for k, v in before.items() if k in METRIC}
    before |= worth
    yolo, start = YOLO(str(model), task=task), time.monotonic()
    yolo.add_callback("on_train_start", partial(_keep, [*kept]))
    native = {k: v for k, v in options.items() if k not in (*EXT_DEFAULTS, "project", "name", "save_dir", "exist_ok")}
    options |= {} if resume else {"base_accuracy": worth}
    trainer = _ended(folder, {**told, **options}) if ended else _trained(yolo, task, options)
    seconds = round(time.monotonic() - start, 1)
    best = trainer.best if trainer.best.exists() else trainer.last
    after = figures(load_model(best)[0], best, trainer.args.data)
    proved, cfg = _proved(trainer, kept, limits, confidence), trainer.compression["prune"]
    checks = budget_checks(cfg, before, after, None, max_drop, confidence, proved.get("changes", ()))
    checks += proved.get("checks", [])
    use = f"yolo-ext {'export int8=True' if configs['quant'] else 'quantize'} model={best} data={trainer.args.data}"
    told = {"settings": {"model": Path(model).name, **native, **changes(configs)}, "training_s": seconds,
            "seconds": {"train": seconds}, "method": ", ".join(t for t, cfg in configs.items() if cfg),
            "checks": checks, "contract": proved, "epochs": trainer.args.epochs, "next": use,
            "deploy": f"weights/{best.name}"}  # fmt: skip
    summary = write_summary(Path(trainer.save_dir), before, after, {"train": after}, **told)
    conclude(trainer.save_dir, summary)
    return summary


def _check_start(configs: Mapping, args: Mapping, base: nn.Module, imgsz: int) -> tuple[str, bool]:
    """Check all that a training starts with; return the data's path, and whether the model as it is fits the data."""
    free = configs["quant"] and configs["quant"].supervision == "features"  # needs no labels
    info = check_data(str(args["data"]), task=args["task"], labels=not free)
    if isinstance(args.get("pretrained"), (str, Path)):
        load_model(args["pretrained"])
    info = stock.one_class(info) if args.get("single_cls") else info
    if fault := stock.check_fit(base, info, (args["model"], args["data"]), rebuilt=not is_pruned(base)):
        LOGGER.warning(f"The model is built anew for these data, and not measured on them as it is: {fault}")
    check_training(configs, args, base, info, imgsz)
    return str(info.get("yaml_file") or args["data"]), not fault


def check_training(configs: Mapping, args: Mapping, model: nn.Module, info: dict[str, Any], imgsz: int) -> None:
    """Refuse parsed options and Ultralytics' arguments, `model` and `task` among them, before there is a run folder."""
    student = stock.rebuilt(deepcopy(model), info) if "nc" in info else deepcopy(model)
    hand_on(model, student)
    stock.freeze(student, args.get("freeze"))
    for technique in check_settled(configs, args):
        technique.check(student, info, imgsz)


def check_settled(configs: Mapping[str, Any], args: Mapping[str, Any]) -> tuple[Technique, ...]:
    """Refuse options that contradict each other, as the first part of `check_training` that needs no model or data."""
    given = {k: v for k, v in args.items() if v is not None}
    return techniques_of({**EXT_DEFAULTS, **configs}, SimpleNamespace(**DEFAULT_CFG_DICT | given))


def _check_moved(ckpt: Mapping[str, Any], given: Any, task: str) -> None:
    """Refuse to go on with a training whose data are not where they were."""
    data = given or (ckpt.get("train_args") or {}).get("data")
    with refused("{e} Where the data of a stopped training have moved, add data=.", UsageError):
        check_data(str(data), task=task, labels=False)


def _trained(yolo: Any, task: str, options: dict[str, Any]) -> Any:
    """Train, and return the trainer."""
    try:
        yolo.train(trainer=trainer_for(task), **options)
    except UsageError:  # such as a size that turns out to be out of reach
        if yolo.trainer:
            runs.discard(Path(str(yolo.trainer.save_dir)))
        raise
    return yolo.trainer


def _ended(folder: Path, args: Mapping[str, Any]) -> Any:
    """Return what stands for the trainer of a run that was stopped between its end and its summary."""
    runs.folder({"save_dir": folder}, task=args["task"], mode="train")
    files = {name: folder / "weights" / f"{name}.pt" for name in ("last", "best")}
    compression = parse(lasting({k: args.get(k) for k in EXT_DEFAULTS}))
    return SimpleNamespace(save_dir=folder, **files, resume=True, args=SimpleNamespace(**args), compression=compression)


def _keep(evidence: Sequence[Evidence], trainer: Any) -> None:
    """Write the evidence of the base, which may be gone when a run goes on, into the folder of the run."""
    for found in evidence:
        atomic_write(Path(trainer.save_dir) / BASE, found.data())


def _proved(trainer: Any, kept: list[Evidence], limits: dict[str, float], confidence: float | None) -> dict[str, Any]:
    """Return what the evidence of the result says against that of the base, with no checks but those of limits."""
    folder, (*base, result) = Path(trainer.save_dir), kept
    atomic_write(folder / "evidence.npz", result.data())
    _keep(base, trainer)  # of several processes none has called it
    if not (base or trainer.resume) or not (folder / BASE).exists():
        return {}
    try:
        found = judged(Evidence.read(folder / BASE), result, limits, confidence=confidence)
    except UsageError as e:  # the split is not the one any more that the run began with
        LOGGER.warning(str(e))
        return {}
    return found if limits else {**found, "checks": []}


def _figures(model: Any, path: Any, data: Any, imgsz: int, device: Any, keep: Any) -> dict[str, Any]:
    """Return size figures, and mAP (top-1 of a classifier) where there are data."""
    found = runs.model_figures(model, path, imgsz)
    if data:
        found.update(accuracy(path, data, imgsz, device=device, keep=keep))
        remember(model, data, imgsz, score(found))
    return found
