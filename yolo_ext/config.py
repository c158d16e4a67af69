# Copyright (C) yolo_ext authors. AGPL-3.0 licence.
"""Options of yolo_ext: frozen dataclasses that are the one source of names, types, ranges and help."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Mapping
from dataclasses import MISSING, Field, asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from yolo_ext.errors import UsageError
from yolo_ext.registry import suggest


def cfg_dir() -> Path:
    """Return the folder with recipes, model and dataset YAMLs: inside the wheel, or beside the package in a clone."""
    here = Path(__file__).parent
    return here / "cfg" if (here / "cfg").is_dir() else here.parent / "cfg"


def option(default: Any, help: str, **limits: Any) -> Any:
    """Declare one option: default, help, and `choices`, `low`/`high` (inclusive), `above`/`below` (exclusive)."""
    if isinstance(default, (list, dict)):
        return field(default_factory=lambda: type(default)(default), metadata={"help": help, **limits})
    return field(default=default, metadata={"help": help, **limits})


@dataclass(frozen=True)
class PruneConfig:
    """Pruning: channels (structured) or single weights (unstructured, 2:4)."""

    method: str = option("lamp", "Criterion: see `yolo-ext help prune`, or your own as package.module:function")
    kind: str = option(
        "structured",
        "Remove channels, or zero single weights, which saves no time on today's runtimes",
        choices=("structured", "unstructured", "2:4"),
    )
    speedup: float | None = option(None, "Target: FLOPs before / FLOPs after, such as 2", above=1.0)
    params: float | None = option(None, "Target: parameters before / parameters after, such as 3", above=1.0)
    latency: float | None = option(None, "Target: measured latency before / after, such as 1.5", above=1.0)
    size_mb: float | None = option(None, "Target: size of the .pt in MB", above=0.0)
    max_drop: float | None = option(None, "Target: prune as far as mAP50-95 drops by no more, such as 0.02", above=0.0)
    ratio: float | None = option(None, "Target: share of channels (of weights) to remove", low=0.0, below=1.0)
    runtime: str = option("ort", "What prune.latency is measured on, one thread", choices=("ort", "torch"))
    scope: str = option(
        "global",
        "Rank channels over the model, layer by layer, or among layers of one structure; pagcp spends a loss budget",
        choices=("global", "local", "isomorphic", "pagcp"),
    )
    include: list[str] = option([], "Prune only these: layer index, name, regular expression, type, backbone/neck/head")
    exclude: list[str] = option([], "Keep these whole: layer index, name, regular expression, type, backbone/neck/head")
    ratios: dict[str, float] = option({}, "Share of channels to remove from these layers, such as {'model.9.cv2': 0.5}")
    sensitivity: str | None = option(None, "File of `yolo-ext sensitivity`: spares the layers that mAP depends on")
    round_to: int = option(8, "Round kept channels to the nearest multiple of this", low=1)
    min_channels: int = option(8, "Floor: never fewer channels than this in a group", low=1)
    max_ratio: float = option(0.8, "Floor: never remove a larger share of a group than this", low=0.0, below=1.0)
    at: list[int] = option([], "While training: prune at the start of these epochs, counted from 0, such as [5,10,15]")
    every: int | None = option(None, "While training: prune every so many epochs", low=1)
    start: int | None = option(None, "While training: first epoch that prunes (0)", low=0)
    end: int | None = option(None, "While training: last epoch that may prune (half of the epochs)", low=0)
    steps: int | None = option(None, "While training: largest number of prunings", low=1)
    schedule: str = option("cubic", "While training: how the target grows by step", choices=("cubic", "linear"))
    images: int = option(128, "Train images for criteria, budgets and trials that need data", low=1)
    recalibrate: int = option(128, "Train images used to re-estimate BatchNorm after pruning; 0 switches it off", low=0)
    budget: float = option(0.05, "PAGCP: loss increase that the first layer may cost", above=0.0)
    total_budget: float = option(5.0, "PAGCP: product of (1 + budget) over all layers", above=1.0)
    topk: float = option(0.8, "PAGCP: share of layers that are pruned in the end", above=0.0, high=1.0)
    compare: bool = option(False, "Train a random-criterion baseline too, for the report")
    seed: int = option(0, "Seed of the random criterion and of the images", low=0)


TARGETS = ("speedup", "params", "latency", "size_mb", "max_drop", "ratio")  # of pruning; a run has one of them


@dataclass(frozen=True)
class DistillConfig:
    """Knowledge distillation."""

    teacher: str = option("self", "Teacher .pt, or 'self' for the model as it was before pruning or quantization")
    features: str | None = option("cwd", "Feature loss on the inputs of the head; None switches it off")
    logits: str | None = option("bckd", "Loss on the outputs of the head; None switches it off")
    feature_weight: float = option(1.0, "Weight of the feature loss", low=0.0)
    logit_weight: float = option(1.0, "Weight of the logit losses", low=0.0)
    temperature: float = option(1.0, "Temperature of the softmax in cwd", above=0.0)
    schedule: str = option("cosine", "Weight over the epochs", choices=("constant", "linear", "cosine"))
    final: float = option(0.1, "Share of the weight that is left at the last epoch (linear, cosine)", low=0.0, high=1.0)


@dataclass(frozen=True)
class QuantConfig:
    """INT8 quantization."""

    mode: str = option("auto", "auto: PTQ, then QAT if PTQ misses the budget", choices=("auto", "ptq", "qat"))
    profile: str = option("auto", "What runs the model; auto looks at this CPU. See `yolo-ext help quantize`")
    calib: int = option(300, "Calibration images, taken from the train split", low=1)
    source: str | None = option(None, "Calibration images from a folder, list or glob instead of the train split")
    observer: str = option("mse", "How activation ranges are found; see `yolo-ext help quantize`")
    exclude: list[str] = option([], "Regular expressions of module names that stay float")
    max_drop: float = option(0.01, "Budget: largest mAP50-95 loss of the INT8 ONNX against its float self", low=0.0)
    epochs: int = option(10, "QAT epochs", low=1)
    lr0: float = option(2e-5, "QAT learning rate (AdamW)", above=0.0)
    observe_epochs: int = option(1, "QAT epochs in which activation ranges still move", low=0)


CONFIGS: dict[str, Any] = {"prune": PruneConfig, "distill": DistillConfig, "quant": QuantConfig}
EXT_DEFAULTS: dict[str, None] = dict.fromkeys(CONFIGS)
COMPRESS_DEFAULTS: dict[str, dict[str, Any]] = {"prune": {"speedup": 2.0}, "distill": {}, "quant": {}}


def _problem(key: str, f: Field, value: Any) -> str | None:
    """Return what is wrong with this value of an option, or None."""
    kind, m = str(f.type), f.metadata
    if value is None:
        return None if "None" in kind else f"'{key}=None' is illegal: a value is needed ({m['help']})."
    if kind.startswith(("list", "dict")):
        return _collection_problem(key, kind, value, m)
    if kind == "bool":
        return None if isinstance(value, bool) else f"'{key}={value}' is illegal. Legal: True, False."
    if kind.startswith("str"):
        if not isinstance(value, str):
            return f"'{key}={value}' is illegal: give a string ({m['help']})."
        if "choices" in m and value not in m["choices"]:
            near = suggest(value, list(m["choices"]))
            return f"'{key}={value}' is illegal.{near} Legal: {', '.join(m['choices'])}."
        return None
    whole = kind.startswith("int")
    if not _number(value) or (whole and value != int(value)):
        return f"'{key}={value}' is illegal: give {'a whole number' if whole else 'a number'} ({m['help']})."
    return _range_problem(key, value, m)


def _number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


BOUNDS: dict[str, tuple[str, Callable[[float, float], bool]]] = {
    "low": ("at least", operator.ge),
    "above": ("above", operator.gt),
    "high": ("at most", operator.le),
    "below": ("below", operator.lt),
}


def _range_problem(key: str, value: float, limits: Mapping[str, Any]) -> str | None:
    given = {name: limits[name] for name in BOUNDS if limits.get(name) is not None}
    if all(BOUNDS[name][1](value, limit) for name, limit in given.items()):
        return None
    legal = " and ".join(f"{BOUNDS[name][0]} {limit}" for name, limit in given.items())
    return f"'{key}={value}' is out of range. Legal: {legal}."


def _collection_problem(key: str, kind: str, value: Any, m: Mapping[str, Any]) -> str | None:
    if kind.startswith("dict"):
        legal = isinstance(value, Mapping) and all(_number(v) and 0 <= v < 1 for v in value.values())
        return None if legal else f"'{key}={value}' is illegal: give shares of 0 to below 1 by name ({m['help']})."
    items = value if isinstance(value, (list, tuple)) else [value]
    if kind == "list[int]":
        legal = all(isinstance(v, int) and not isinstance(v, bool) and v >= 0 for v in items)
        return None if legal else f"'{key}={value}' is illegal: give a list of whole numbers ({m['help']})."
    legal = all(isinstance(v, str) or (isinstance(v, int) and not isinstance(v, bool)) for v in items)
    return None if legal else f"'{key}={value}' is illegal: give a list of strings."


def parse(options: Mapping[str, Any]) -> dict[str, Any]:
    """Turn ``{"prune": {...}, "distill": {...}, "quant": {...}}`` into config dataclasses, None where a key is off.

    Args:
        options: Dicts or dataclasses by technique. None and False mean off, True means defaults.

    Returns:
        One entry for each technique.

    Raises:
        UsageError: One message that lists every unknown name and every illegal value.
    """
    parsed: dict[str, Any] = {}
    problems: list[str] = []
    for technique, given in options.items():
        if technique not in CONFIGS:
            problems.append(f"Unknown technique '{technique}'.{suggest(technique, list(CONFIGS))}")
            continue
        cls = CONFIGS[technique]
        if given is None or given is False:
            parsed[technique] = None
            continue
        if isinstance(given, cls):
            given = asdict(given)
        elif given is True:
            given = {}
        if not isinstance(given, Mapping):
            problems.append(f"'{technique}={given}' is illegal: give options such as '{technique}.{_first(cls)}=...'.")
            continue
        known = {f.name: f for f in fields(cls)}
        for name, value in given.items():
            key = f"{technique}.{name}"
            if name not in known:
                problems.append(f"Unknown option '{key}'.{suggest(key, [f'{technique}.{n}' for n in known])}")
            elif problem := _problem(key, known[name], value):
                problems.append(problem)
        if not problems:
            parsed[technique] = cls(**{k: _cast(known[k], v) for k, v in given.items()})
    if not problems:
        problems += _conflicts(parsed)
    if problems:
        more = "" if len(problems) == 1 else f"{len(problems)} problems with the options:\n  "
        raise UsageError(more + "\n  ".join(problems) + " See `yolo-ext help` for all options.")
    return {**EXT_DEFAULTS, **parsed}


def _cast(f: Field, value: Any) -> Any:
    kind = str(f.type)
    if value is None:
        return value
    if kind.startswith("list"):
        items = list(value) if isinstance(value, (list, tuple)) else [value]
        return items if kind == "list[int]" else [str(v) for v in items]
    if kind.startswith("dict"):
        return {str(k): float(v) for k, v in value.items()}
    return int(value) if kind.startswith("int") else float(value) if kind.startswith("float") else value


def _first(cls: type) -> str:
    return fields(cls)[0].name


def _conflicts(parsed: Mapping[str, Any]) -> list[str]:
    """Return the problems between options that are legal one by one."""
    prune, distill = parsed.get("prune"), parsed.get("distill")
    problems = _prune_conflicts(prune) if prune else []
    if distill and not distill.features and not distill.logits:
        problems.append("'distill.features' and 'distill.logits' are both off: give at least one loss.")
    return problems


def _prune_conflicts(cfg: PruneConfig) -> list[str]:
    problems = []
    targets = [t for t in TARGETS if getattr(cfg, t) is not None]
    if len(targets) > 1:
        problems.append(f"{', '.join('prune.' + t for t in targets)} are all targets: give one of them.")
    if not targets and not cfg.ratios and cfg.scope != "pagcp" and cfg.kind == "structured":
        problems.append(
            "Pruning needs a target: give 'prune.speedup=2' (FLOPs ratio), "
            + ", ".join(f"'prune.{t}'" for t in TARGETS[1:])
            + " or 'prune.ratios'."
        )
    if cfg.kind == "unstructured" and targets != ["ratio"]:
        problems.append("'prune.kind=unstructured' needs 'prune.ratio' and no other target, such as prune.ratio=0.8.")
    if cfg.kind == "2:4" and targets:
        problems.append(f"'prune.kind=2:4' always zeroes half of the weights: leave 'prune.{targets[0]}' out.")
    if cfg.kind != "structured" and (cfg.ratios or cfg.sensitivity or cfg.scope not in ("global", "local")):
        problems.append(f"'prune.kind={cfg.kind}' knows no 'ratios', 'sensitivity' or 'scope={cfg.scope}'.")
    if cfg.at and (cfg.every or cfg.steps or cfg.start is not None or cfg.end is not None):
        problems.append("'prune.at' lists the epochs: leave 'prune.every', 'start', 'end' and 'steps' out.")
    if cfg.at != sorted(set(cfg.at)):
        problems.append(f"'prune.at={cfg.at}' is illegal: give each epoch once, in order.")
    if cfg.start is not None and cfg.end is not None and cfg.end < cfg.start:
        problems.append(f"'prune.end={cfg.end}' is before 'prune.start={cfg.start}'.")
    if cfg.sensitivity and cfg.scope == "pagcp":
        problems.append("'prune.sensitivity' and 'prune.scope=pagcp' both share out the channels: give one.")
    return problems


def as_plain(configs: Mapping[str, Any]) -> dict[str, Any]:
    """Turn parsed configs back into plain dicts that YAML, JSON and pickle carry; the inverse of `parse`."""
    return {k: None if v is None else asdict(v) for k, v in configs.items()}


def help_lines(technique: str) -> list[tuple[str, str, str]]:
    """Return (dotted key, default, help with the legal values) for every option of a technique."""
    rows = []
    for f in fields(CONFIGS[technique]):
        default = f.default if f.default is not MISSING else f.default_factory()  # type: ignore[misc, operator]
        choices = f.metadata.get("choices")
        rows.append(
            (
                f"{technique}.{f.name}",
                _plain(default),
                f.metadata["help"] + (f" ({', '.join(choices)})" if choices else ""),
            )
        )
    return rows


def _plain(value: Any) -> str:
    """Write a default without an exponent, which YAML would read as a string."""
    return f"{value:.8f}".rstrip("0") if isinstance(value, float) and "e" in str(value) else str(value)


def default_yaml() -> str:
    """Return the text of `cfg/default.yaml`: every option with its default and help."""
    lines = [
        "# Options of yolo_ext with their defaults. Generated by `yolo-ext cfg`; edit yolo_ext/config.py instead.",
        "",
    ]
    for technique, cls in CONFIGS.items():
        lines.append(f"{technique}:  # {cls.__doc__}")
        for key, default, help in help_lines(technique):
            value = {"None": "null"}.get(default, default)
            lines.append(f"  {key.split('.')[1]}: {value}  # {help}")
        lines.append("")
    return "\n".join(lines)


def load_recipe(name: str) -> dict[str, Any]:
    """Load a recipe by path or by the name of a bundled one, flat with dotted keys.

    Raises:
        UsageError: If there is no such recipe, or it is not a YAML of options.
    """
    from ultralytics.utils import YAML

    bundled = cfg_dir() / "recipes"
    file = next((p for p in (Path(str(name)), bundled / str(name), bundled / f"{name}.yaml") if p.is_file()), None)
    if file is None:
        known = sorted(p.stem for p in bundled.glob("*.yaml"))
        raise UsageError(f"Recipe '{name}' does not exist.{suggest(str(name), known)} Bundled: {', '.join(known)}.")
    try:
        content = YAML.load(file)
    except Exception as e:
        raise UsageError(f"Recipe '{file}' is not a YAML file: {str(e).splitlines()[0]}.") from e
    if not isinstance(content, dict):
        raise UsageError(f"Recipe '{file}' holds no options. Write it as 'prune: {{speedup: 2}}' and so on.")
    flat: dict[str, Any] = {}
    for key, value in content.items():
        flat.update({f"{key}.{k}": v for k, v in value.items()} if isinstance(value, dict) else {key: value})
    return flat
