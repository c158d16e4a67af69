# Copyright (C) yolo_ext authors. AGPL-3.0 licence.
"""Help, generated from the functions of the commands, the dataclasses of options and the method tables."""

from __future__ import annotations

import inspect
import textwrap
from collections.abc import Callable, Sequence
from importlib import import_module
from typing import Any

from yolo_ext.commands import COMMANDS, HELP, command, say
from yolo_ext.core.config import CONFIGS, default_yaml, help_lines
from yolo_ext.core.errors import UsageError
from yolo_ext.core.registry import Table

for _module in ("compress", "deploy", "bench", "analyze", "data", "label"):  # fill the table, in the order of the help
    import_module(f"yolo_ext.commands.{_module}")

FORWARDED = {
    "val": "Validate a model (Ultralytics)",
    "track": "Track objects (Ultralytics)",
    "benchmark": "Benchmark export formats (Ultralytics)",
}
TOPICS = {  # whose options are explained in full
    "compress": tuple(CONFIGS), "train": tuple(CONFIGS), "quantize": ("quant",), **{t: (t,) for t in CONFIGS},
}  # fmt: skip
TABLES = {  # of methods, by technique
    "prune": ("pruning.criteria:criteria", "core.schedules:removals"),
    "sparsity": ("sparsity.penalties:penalties",),
    "distill": ("distillation.logits:logit_losses", "distillation.features:feature_losses", "core.schedules:decays"),
    "quant": ("quantization.observers:observers", "quantization.observers:weight_observers"),
}
FURTHER = {"native": "further", "place": "run folder"}  # what stands for several keys
USAGE = """yolo-ext {version}: compression for stock Ultralytics YOLO

Usage: yolo-ext [TASK] COMMAND key=value ...

  yolo-ext demo
  yolo-ext compress model=best.pt data=data.yaml imgsz=640 prune.speedup=2 epochs=30
  yolo-ext train model=yolov8n.pt data=data.yaml epochs=50 prune.speedup=2 distill.teacher=yolov8s.pt
  yolo-ext prune model=best.pt epochs=0 prune.method=l2 prune.ratio=0.3
  yolo-ext analyze model=best.pt
  yolo-ext quantize model=best.pt data=data.yaml quant.calib=300
  yolo-ext convert format=voc source=VOC2012 out=voc_yolo

All Ultralytics keys are accepted. recipe=FILE.yaml reads options from a file.
"""


# Commands ------------------------------------------------------------------------------------------------------------
@command("Print all options with their defaults")
def cfg() -> None:
    """Print the options of all techniques as YAML."""
    say(default_yaml())


@command("Print the version")
def version() -> None:
    """Print the version of yolo_ext."""
    from yolo_ext import __version__

    say(__version__)


@command("Print help: yolo-ext help [COMMAND | sparsity]")
def help(topic: str | None = None) -> None:
    """Print the help for a command or technique, or the overview.

    Args:
        topic: Command or technique.
    """
    say(help_text(topic))


# Text ----------------------------------------------------------------------------------------------------------------
def help_text(topic: str | None) -> str:
    """Return the help for a command or technique, or the overview."""
    from yolo_ext import __version__

    commands = {**{row.name: row.summary for row in COMMANDS}, **FORWARDED}
    if topic is None:
        tail = "Options: yolo-ext help COMMAND, yolo-ext help sparsity, or all of them with yolo-ext cfg"
        return f"{USAGE.format(version=__version__)}\nCommands:\n{_aligned([*commands.items()])}\n\n{tail}"
    if topic not in commands and topic not in TOPICS:
        raise UsageError(f"There is no help on '{topic}'. Legal: {', '.join(dict.fromkeys([*commands, *TOPICS]))}.")
    parts = [f"yolo-ext {topic}: {commands[topic]}"] if topic in commands else []
    if topic in COMMANDS.names():
        parts.append(command_help(COMMANDS[topic].fn))
    parts += [technique_help(t) for t in TOPICS.get(topic, ())]
    return "\n\n".join(p for p in parts if p)


def command_help(function: Callable[..., Any]) -> str:
    """Return the keys of a command with their defaults and help as aligned text."""
    about = documented(function)
    lines: list[tuple[str, ...]] = []
    for name, parameter in inspect.signature(function).parameters.items():
        default = "" if parameter.default is inspect.Parameter.empty else str(parameter.default)
        first, *rest = textwrap.wrap(about[name], 88)
        lines += [(FURTHER.get(name, name), default, first), *(("", "", more) for more in rest)]
    return _aligned(lines)


def documented(function: Callable[..., Any]) -> dict[str, str]:
    """Return the help of each parameter: from the section `Args` of the docstring, else of a command like it."""
    section = (inspect.getdoc(function) or "").partition("Args:\n")[2].partition("\n\n")[0]
    found: dict[str, str] = {}
    for line in textwrap.dedent(section).splitlines():
        name, _, text = line.partition(": ") if not line.startswith(" ") else (next(reversed(found)), "", line)
        found[name] = " ".join(f"{found.get(name, '')} {text}".replace("`", "").split())
    like = getattr(function, "like", None)
    others = (
        documented(like) if like else {k: v for k, v in HELP.items() if k in inspect.signature(function).parameters}
    )
    return {**others, **{name: text.rstrip(".") for name, text in found.items()}}


def technique_help(technique: str) -> str:
    """Return options and method tables of a technique as aligned text."""
    parts = [f"{CONFIGS[technique].__doc__}\n{_aligned(help_lines(technique))}"]
    for table in method_tables(technique):
        rows = [(r.name, r.summary, ", ".join(n.value for n in r.needs), r.paper) for r in table]
        parts.append(f"{table.kind}:\n{_aligned(rows)}")
    if technique == "quant":
        from yolo_ext.quantization.spec import PROFILES

        parts.append("quantization profile:\n" + _aligned([(p.name, p.summary) for p in PROFILES.values()]))
    return "\n\n".join(parts)


def method_tables(technique: str) -> list[Table]:
    """Return the method tables of a technique."""
    places = (place.split(":") for place in TABLES[technique])
    return [getattr(import_module(f"yolo_ext.{module}"), name) for module, name in places]


def _aligned(rows: Sequence[tuple[str, ...]]) -> str:
    """Align the columns of rows below each other."""
    widths = [max(len(r[i]) for r in rows) for i in range(len(rows[0]) - 1)] if rows else []
    return "\n".join("  " + "  ".join([c.ljust(w) for c, w in zip(r, widths)] + [r[-1]]) for r in rows)
