# Copyright (C) yolo_ext authors. AGPL-3.0 licence.
"""Reading options: the dataclasses of `options` are the one source of names, types, ranges and help."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

from yolo_ext.core.errors import UsageError, refused
from yolo_ext.core.plain_yaml import plain_yaml

# Options are imported from here, declared there
from yolo_ext.core.options import (  # noqa: F401  isort: skip
    CONFIGS, TARGETS, DistillConfig, PruneConfig, QuantConfig, SparsityConfig, finite, listed, misspelt, number,
    option_names, read_options, refuse,
)  # fmt: skip
from yolo_ext.core.registry import suggest


def cfg_dir() -> Path:
    """Return the folder with recipes, model and dataset YAMLs: inside the wheel, or beside the package in a clone."""
    here = Path(__file__).parents[1]
    return here / "cfg" if (here / "cfg").is_dir() else here.parent / "cfg"


EXT_DEFAULTS: dict[str, None] = dict.fromkeys(CONFIGS)


def parse(options: Mapping[str, Any]) -> dict[str, Any]:
    """Turn dicts or dataclasses by technique (True: defaults, None and False: off) into dataclasses, None where off.

    Raises: `UsageError` with one message that lists every unknown name and every illegal value.
    """
    parsed: dict[str, Any] = {}
    problems: list[str] = []
    for technique, given in options.items():
        cls = CONFIGS.get(technique)
        if cls is None:
            problems.append(f"Unknown technique '{technique}'.{suggest(technique, list(CONFIGS))}")
        elif given is None or given is False or isinstance(given, cls):
            parsed[technique] = given or None
        elif given is True or isinstance(given, Mapping):
            values, wrong = read_options(technique, {} if given is True else given)
            problems += wrong
            parsed[technique] = cls(**values)
        else:
            hint = f"give options such as '{technique}.{fields(cls)[0].name}=...'"
            problems.append(f"'{technique}={given}' is illegal: {hint}.")
    prune, sparsity = parsed.get("prune"), parsed.get("sparsity")
    if prune and sparsity and prune.method == "auto" and prune.kind == "structured":  # the criterion of the penalty
        parsed["prune"] = replace(prune, method=sparsity.method)
    refuse(problems or [*_conflicts(parsed)])
    return {**EXT_DEFAULTS, **parsed}


def changed(cfg: Any) -> dict[str, Any]:
    """Return the options of a technique that are not at their default."""
    default = type(cfg)()
    return {f.name: value for f in fields(cfg) if (value := getattr(cfg, f.name)) != getattr(default, f.name)}


def given_options(given: Any) -> dict[str, Any]:
    """Return the options of a technique that the user gave as a dict, a dataclass, or not at all."""
    return dict(given) if isinstance(given, Mapping) else changed(given) if given and given is not True else {}


def changes(configs: Mapping[str, Any]) -> dict[str, Any]:
    """Return the changed options of all techniques that are on, by dotted key."""
    return {f"{t}.{name}": value for t, cfg in configs.items() if cfg for name, value in changed(cfg).items()}


def unmet(technique: str, cfg: Any, stages: bool = True) -> Iterator[tuple[str, str]]:
    """Yield dotted key of each changed option that does nothing without another one or without stages, and why."""
    for f in (f for f in fields(cfg) if f.name in changed(cfg)):
        only = f.metadata.get("only")
        if f.metadata.get("stages") and not stages:
            yield f"{technique}.{f.name}", "only in compress, prune and quantize"
        elif only and not any(_holds(cfg, part) for part in only.split(" or ")):
            yield f"{technique}.{f.name}", f"only with {technique}.{only}"


def _holds(cfg: Any, condition: str) -> bool:
    """Tell whether an option is one of the values after `=`, or is set where there are none."""
    name, _, values = condition.partition("=")
    return str(getattr(cfg, name)) in values.split("/") if values else bool(getattr(cfg, name))


def without_effect(configs: Mapping[str, Any], *, stages: bool = True) -> list[str]:
    """Name the changed options that do nothing beside the others, or in a command without `stages`, and why."""
    return [f"{key} ({why})" for t, cfg in configs.items() if cfg for key, why in unmet(t, cfg, stages)]


def comma_list(given: Any, kind: Callable[[str], Any] = str) -> list[Any]:
    """Return a list that a user wrote as text with commas, as a list or as its only item, each read as `kind`."""
    items = given.split(",") if isinstance(given, str) else listed(given)
    return [kind(text) for text in (str(item).strip() for item in items) if text]


def _conflicts(parsed: Mapping[str, Any]) -> Iterator[str]:
    """Yield the problems between options that are legal one by one."""
    if parsed.get("prune"):
        yield from _prune_conflicts(parsed["prune"])
    for technique in ("sparsity", "distill"):
        cfg = parsed.get(technique)
        if cfg and cfg.end is not None and cfg.end <= cfg.start:
            yield f"'{technique}.end={cfg.end}' is not after '{technique}.start={cfg.start}'."
    cfg = parsed.get("distill")
    if cfg and not cfg.features and not cfg.logits:
        yield "'distill.features' and 'distill.logits' are both off: give at least one loss."
    if cfg and cfg.layers and not cfg.features:
        yield f"'distill.layers={cfg.layers}' goes with 'distill.features', which is off."
    if cfg and isinstance(cfg.teacher, list) and (not cfg.teacher or {"self", "ema"} & set(cfg.teacher)):
        yield f"'distill.teacher={cfg.teacher}' is illegal: several teachers are a list of .pt files."


def _prune_conflicts(cfg: PruneConfig) -> Iterator[str]:
    """Yield the problems between options of pruning."""
    targets = [t for t in TARGETS if getattr(cfg, t) is not None]
    if len(targets) > 1 and targets[1:] != ["max_drop"]:
        yield f"{', '.join('prune.' + t for t in targets)} are all targets: give one of them."
    if not targets and not cfg.ratios and cfg.kind == "structured":
        others = ", ".join(f"'prune.{t}'" for t in TARGETS[1:])
        yield f"Pruning needs a target: give 'prune.speedup=2' (FLOPs ratio), {others} or 'prune.ratios'."
    if cfg.kind == "unstructured" and targets != ["ratio"]:
        yield "'prune.kind=unstructured' needs 'prune.ratio' and no other target, such as prune.ratio=0.8."
    if cfg.kind == "2:4" and targets:
        yield f"'prune.kind=2:4' always zeroes half of the weights: leave 'prune.{targets[0]}' out."
    if cfg.kind == "unstructured" and cfg.scope not in ("global", "local"):
        yield f"'prune.kind=unstructured' knows no 'prune.scope={cfg.scope}'. Legal: global, local."
    if alien := [key for key, why in unmet("prune", cfg) if why.startswith("only with prune.kind=")]:
        yield f"'prune.kind={cfg.kind}' knows no {', '.join(alien)}. Leave them out, or take prune.kind=structured."
    if cfg.at and (cfg.every or cfg.steps or cfg.start is not None or cfg.end is not None):
        yield "'prune.at' lists the epochs: leave 'prune.every', 'start', 'end' and 'steps' out."
    if cfg.at != sorted(set(cfg.at)):
        yield f"'prune.at={cfg.at}' is illegal: give each epoch once, in order."
    if cfg.start is not None and cfg.end is not None and cfg.end < cfg.start:
        yield f"'prune.end={cfg.end}' is before 'prune.start={cfg.start}'."
    if cfg.pruner and not {"speedup", "params", "ratio"} & {*targets}:
        yield f"'prune.pruner={cfg.pruner}' needs one of the targets prune.ratio, prune.speedup and prune.params."
    if cfg.pruner and (cfg.ratios or cfg.sensitivity or cfg.scope != "global"):
        yield "'prune.pruner' chooses the channels: leave 'prune.ratios', 'sensitivity' and 'scope' out."


def as_plain(configs: Mapping[str, Any]) -> dict[str, Any]:
    """Turn parsed configs back into plain dicts that YAML, JSON and pickle carry; the inverse of `parse`."""
    return {k: None if v is None else asdict(v) for k, v in configs.items()}


def help_lines(technique: str) -> list[tuple[str, str, str]]:
    """Return (dotted key, default, help with the legal values) for every option of a technique."""
    rows, defaults = [], CONFIGS[technique]()
    for f in fields(defaults):
        default = getattr(defaults, f.name)
        if isinstance(default, float) and "e" in str(default):  # YAML would read an exponent as a string
            default = f"{default:.8f}".rstrip("0")
        choices = f" ({', '.join(f.metadata['choices'])})" if "choices" in f.metadata else ""
        only = f"; only with {f.metadata['only']}" if "only" in f.metadata else ""
        rows.append((f"{technique}.{f.name}", str(default), f.metadata["help"] + choices + only))
    return rows


def default_yaml() -> str:
    """Return the text of `cfg/default.yaml`: every option with its default and help."""
    text = "# Options of yolo_ext with their defaults. Generated by `yolo-ext cfg`; edit core/options.py instead.\n"
    for technique, cls in CONFIGS.items():
        text += f"\n{technique}:  # {cls.__doc__}\n"
        for key, default, help in help_lines(technique):
            text += f"  {key.split('.')[1]}: {'null' if default == 'None' else default}  # {help}\n"
    return text


def load_recipe(name: str) -> dict[str, Any]:
    """Load a recipe by path or by the name of a bundled one, flat with dotted keys."""
    bundled = cfg_dir() / "recipes"
    file = next((p for p in (Path(str(name)), bundled / str(name), bundled / f"{name}.yaml") if p.is_file()), None)
    if file is None:
        known = sorted(p.stem for p in bundled.glob("*.yaml"))
        raise UsageError(f"Recipe '{name}' does not exist.{suggest(str(name), known)} Bundled: {', '.join(known)}.")
    return read_flat(file, f"Recipe '{file}'", "prune: {speedup: 2}")


def read_flat(given: Any, what: str, form: str) -> dict[str, Any]:
    """Return a mapping, or that in a YAML file, flat with dotted keys; `form` shows how `what` is written."""
    with refused(f"{what} is not a YAML file: {{why}}."):
        content = plain_yaml(Path(given).read_text(encoding="utf-8")) if isinstance(given, (str, Path)) else given
    if not content or not isinstance(content, Mapping):
        raise UsageError(f"{what} holds no options. Write it as '{form}' and so on.")
    flat: dict[str, Any] = {}
    for key, value in content.items():
        flat.update({f"{key}.{k}": v for k, v in value.items()} if isinstance(value, Mapping) else {str(key): value})
    if strange := [f"{k}: {v}" for k, v in flat.items() if not finite(v)]:
        raise UsageError(f"{what} holds '{strange[0]}'. Give finite numbers.")
    if "trust" in flat:
        raise UsageError(f"{what} cannot vouch for other files. Take 'trust' out, and give it with the command.")
    return flat
