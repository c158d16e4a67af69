# Copyright (C) yolo_ext authors. AGPL-3.0 licence.
"""Reading options: the dataclasses of `options` are the one source of names, types, ranges and help."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Mapping
from dataclasses import MISSING, Field, asdict, fields, replace
from pathlib import Path
from typing import Any

from yolo_ext.core.errors import UsageError
from yolo_ext.core.options import TARGETS, DistillConfig, PruneConfig, QuantConfig, SparsityConfig
from yolo_ext.core.registry import suggest

# Options that are gone, with the values that change nothing: runs that yolo_ext 0.1 saved name them.
RETIRED: dict[str, tuple[Any, ...]] = {"quant.learned": (False,), "quant.cache": (True, False)}


def cfg_dir() -> Path:
    """Return the folder with recipes, model and dataset YAMLs: inside the wheel, or beside the package in a clone."""
    here = Path(__file__).parents[1]
    return here / "cfg" if (here / "cfg").is_dir() else here.parent / "cfg"


CONFIGS: dict[str, Any] = {
    "sparsity": SparsityConfig,
    "prune": PruneConfig,
    "distill": DistillConfig,
    "quant": QuantConfig,
}
EXT_DEFAULTS: dict[str, None] = dict.fromkeys(CONFIGS)
COMPRESS_DEFAULTS: dict[str, dict[str, Any]] = {"prune": {"speedup": 2.0}, "distill": {}, "quant": {}}


def _number(value: Any) -> bool:
    """Tell whether a value is a finite number."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _whole(value: Any) -> bool:
    """Tell whether a value is a whole number."""
    return isinstance(value, int) and not isinstance(value, bool)


def _listed(value: Any) -> list[Any]:
    """Return the items of a list, or a single value as one."""
    return list(value) if isinstance(value, (list, tuple)) else [value]


def _stacked(value: Any) -> bool:
    """Tell whether a value has the form of a stack of methods; the names are looked up where the methods are."""
    items = _listed(value)
    return bool(items) and all(isinstance(v.get("name") if isinstance(v, Mapping) else v, str) for v in items)


FORMS: dict[str, tuple[Callable[[Any], bool], str]] = {  # by type of an option: what fits, and what is said if not
    "bool": (lambda v: isinstance(v, bool), ". Legal: True, False."),
    "str": (lambda v: isinstance(v, str), ": give a string ({help})."),
    "int": (lambda v: _number(v) and v == int(v), ": give a whole number ({help})."),
    "float": (_number, ": give a number ({help})."),
    "list[int]": (lambda v: all(_whole(n) and n >= 0 for n in _listed(v)), ": give a list of whole numbers ({help})."),
    "list[str]": (lambda v: all(isinstance(n, str) or _whole(n) for n in _listed(v)), ": give a list of strings."),
    "dict[str, float]": (
        lambda v: isinstance(v, Mapping) and all(_number(n) and 0 <= n < 1 for n in v.values()),
        ": give shares of 0 to below 1 by name ({help}).",
    ),
    "Stack": (_stacked, ": give a name, or a list of names and dicts such as {{name: cwd, weight: 0.5}}."),
}
BOUNDS: dict[str, tuple[str, Callable[[float, float], bool]]] = {
    "low": ("at least", operator.ge),
    "above": ("above", operator.gt),
    "high": ("at most", operator.le),
    "below": ("below", operator.lt),
}


def _problem(key: str, f: Field, value: Any) -> str | None:
    """Return what is wrong with this value of an option, or None."""
    kind, m = str(f.type).removesuffix(" | None"), f.metadata
    if value is None:
        return None if "None" in str(f.type) else f"'{key}=None' is illegal: a value is needed ({m['help']})."
    if kind == "Entries":
        return _entries_problem(key, value)
    if kind == "str | list[str]":
        kind = "list[str]" if isinstance(value, (list, tuple)) else "str"
    fits, words = FORMS[kind]
    if not fits(value):
        return f"'{key}={value}' is illegal{words.format(help=m['help'])}"
    if "choices" in m and value not in m["choices"]:
        near = suggest(value, list(m["choices"]))
        return f"'{key}={value}' is illegal.{near} Legal: {', '.join(m['choices'])}."
    limits = {name: m[name] for name in BOUNDS if name in m}
    if all(BOUNDS[name][1](value, limit) for name, limit in limits.items()):
        return None
    legal = " and ".join(f"{BOUNDS[name][0]} {limit}" for name, limit in limits.items())
    return f"'{key}={value}' is out of range. Legal: {legal}."


def _entries_problem(key: str, value: Any) -> str | None:
    """Return what is wrong with the form of entries; what they say is looked up where the model is."""
    try:
        items = _entries(value)
    except Exception as e:  # YAML has exceptions of its own
        reason = str(e).splitlines()[0] if isinstance(e, OSError) else "the file is not valid YAML or JSON"
        return f"'{key}={value}' is illegal: {reason}. Give a list of dicts, or a YAML or JSON file with one."
    legal = isinstance(items, list) and all(isinstance(v, Mapping) for v in items)
    if legal:
        return None
    example = "[{'op_types': ['Conv2d'], 'quant_bits': 4}]"
    return f"'{key}={value}' is illegal: give a list of dicts such as {example}, or a YAML or JSON file with one."


def _entries(value: Any) -> Any:
    """Return a list of dicts as it is, or as it is in a file."""
    import yaml  # Ultralytics' YAML.load reads .yaml files only

    if isinstance(value, Mapping):
        return [dict(value)]
    if not isinstance(value, str):
        return list(value) if isinstance(value, tuple) else value
    if not Path(value).is_file():
        raise FileNotFoundError(f"there is no file '{value}'")
    found = yaml.safe_load(Path(value).read_text())
    return found.get("config_list") if isinstance(found, Mapping) else found


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
        known = {f.name: f for f in fields(cls)}
        if given is None or given is False:
            parsed[technique] = None
            continue
        if isinstance(given, cls):
            given = asdict(given)
        elif given is True:
            given = {}
        if not isinstance(given, Mapping):
            problems.append(
                f"'{technique}={given}' is illegal: give options such as '{technique}.{fields(cls)[0].name}=...'."
            )
            continue
        known = {f.name: f for f in fields(cls)}
        given = {k: v for k, v in given.items() if k in known or v not in RETIRED.get(f"{technique}.{k}", ())}
        for name, value in given.items():
            key = f"{technique}.{name}"
            if name not in known:
                problems.append(f"Unknown option '{key}'.{suggest(key, [f'{technique}.{n}' for n in known])}")
            elif problem := _problem(key, known[name], value):
                problems.append(problem)
        if not problems:
            parsed[technique] = cls(**{k: _cast(known[k], v) for k, v in given.items()})
    prune, sparsity = parsed.get("prune"), parsed.get("sparsity")
    if prune and sparsity and prune.method == "auto":  # the criterion that goes with the penalty
        parsed["prune"] = replace(prune, method=sparsity.method)
    if not problems:
        problems += _conflicts(parsed)
    if problems:
        more = "" if len(problems) == 1 else f"{len(problems)} problems with the options:\n  "
        raise UsageError(more + "\n  ".join(problems) + " See `yolo-ext help` for all options.")
    return {**EXT_DEFAULTS, **parsed}


def _cast(f: Field, value: Any) -> Any:
    """Return a legal value in the type of its option."""
    kind = str(f.type).removesuffix(" | None")
    if value is None:
        return None
    if kind == "Entries":
        return [dict(v) for v in _entries(value)]
    if kind == "Stack":
        return [dict(v) if isinstance(v, Mapping) else v for v in value] if isinstance(value, (list, tuple)) else value
    if kind == "dict[str, float]":
        return {str(k): float(v) for k, v in value.items()}
    if kind == "list[int]":
        return _listed(value)
    if "list" in kind and not (kind.startswith("str") and isinstance(value, str)):
        return [str(v) for v in _listed(value)]
    return {"int": int, "float": float}.get(kind, lambda v: v)(value)


def comma_list(given: Any, kind: Callable[[str], Any] = str) -> list[Any]:
    """Return a list that a user wrote as text with commas, as a list or as its only item, each read as `kind`."""
    items = given.split(",") if isinstance(given, str) else _listed(given)
    return [kind(text) for text in (str(item).strip() for item in items) if text]


def _conflicts(parsed: Mapping[str, Any]) -> list[str]:
    """Return the problems between options that are legal one by one."""
    prune, distill, sparsity = (parsed.get(k) for k in ("prune", "distill", "sparsity"))
    problems = _prune_conflicts(prune) if prune else []
    if sparsity and sparsity.end is not None and sparsity.end <= sparsity.start:
        problems.append(f"'sparsity.end={sparsity.end}' is not after 'sparsity.start={sparsity.start}'.")
    return problems + (_distill_conflicts(distill) if distill else [])


def _distill_conflicts(cfg: DistillConfig) -> list[str]:
    """Return the problems between options of distillation."""
    problems = []
    if not cfg.features and not cfg.logits:
        problems.append("'distill.features' and 'distill.logits' are both off: give at least one loss.")
    if cfg.end is not None and cfg.end <= cfg.start:
        problems.append(f"'distill.end={cfg.end}' is not after 'distill.start={cfg.start}'.")
    if cfg.layers and not cfg.features:
        problems.append(f"'distill.layers={cfg.layers}' goes with 'distill.features', which is off.")
    if cfg.teacher == [] or (isinstance(cfg.teacher, list) and {"self", "ema"} & set(cfg.teacher)):
        problems.append(f"'distill.teacher={cfg.teacher}' is illegal: several teachers are a list of .pt files.")
    return problems


def _prune_conflicts(cfg: PruneConfig) -> list[str]:
    """Return the problems between options of pruning."""
    problems = []
    targets = [t for t in TARGETS if getattr(cfg, t) is not None]
    if len(targets) > 1:
        problems.append(f"{', '.join('prune.' + t for t in targets)} are all targets: give one of them.")
    if not targets and not cfg.ratios and cfg.scope != "pagcp" and cfg.kind == "structured":
        others = ", ".join(f"'prune.{t}'" for t in TARGETS[1:])
        problems.append(f"Pruning needs a target: give 'prune.speedup=2' (FLOPs ratio), {others} or 'prune.ratios'.")
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
        choices = f" ({', '.join(f.metadata['choices'])})" if "choices" in f.metadata else ""
        rows.append((f"{technique}.{f.name}", _plain(default), f.metadata["help"] + choices))
    return rows


def _plain(value: Any) -> str:
    """Write a default without an exponent, which YAML would read as a string."""
    return f"{value:.8f}".rstrip("0") if isinstance(value, float) and "e" in str(value) else str(value)


def default_yaml() -> str:
    """Return the text of `cfg/default.yaml`: every option with its default and help."""
    lines = [
        "# Options of yolo_ext with their defaults. Generated by `yolo-ext cfg`; edit core/options.py instead.",
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
