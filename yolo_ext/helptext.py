# Copyright (C) yolo_ext authors. AGPL-3.0 licence.
"""Help, generated from the dataclasses and the method tables."""

from __future__ import annotations

import inspect
import re
import textwrap
from collections.abc import Mapping
from importlib import import_module
from typing import Any

from yolo_ext.core.config import CONFIGS, help_lines
from yolo_ext.core.errors import UsageError
from yolo_ext.core.registry import Table

TOPICS = {
    "sparsity": ("sparsity",),
    "prune": ("prune",),
    "distill": ("distill",),
    "quantize": ("quant",),
    "quant": ("quant",),
}
FUNCTIONS = {  # where the function of a command is; its docstring is the help
    "export": "deploy_tools", "verify": "deploy_tools", "bench": "bench_tools", "analyze": "tools",
    "sensitivity": "tools", "convert": "data_tools", "split": "data_tools", "data": "data_tools",
    "label": "label_tools", "predict": "predict_tools", "demo": "demo",
}  # fmt: skip
FURTHER = {"options": "further", "native": "further", "place": "run folder"}  # what stands for several keys
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


def _aligned(rows: list[tuple[str, ...]]) -> str:
    widths = [max(len(r[i]) for r in rows) for i in range(len(rows[0]) - 1)]
    return "\n".join("  " + "  ".join([c.ljust(w) for c, w in zip(r, widths)] + [r[-1]]) for r in rows)


def method_tables(technique: str) -> list[Table]:
    """Return the method tables of a technique."""
    if technique == "prune":
        from yolo_ext.pruning.criteria import criteria
        from yolo_ext.pruning.schedules import schedules as steps

        return [criteria, steps]
    if technique == "sparsity":
        from yolo_ext.sparsity.penalties import penalties

        return [penalties]
    if technique == "distill":
        from yolo_ext.distillation.features import feature_losses
        from yolo_ext.distillation.logits import logit_losses
        from yolo_ext.distillation.schedules import schedules

        return [logit_losses, feature_losses, schedules]
    from yolo_ext.quantization.observers import observers, weight_observers

    return [observers, weight_observers]


def technique_help(technique: str) -> str:
    """Return options and method tables of a technique as aligned text."""
    parts = [f"{CONFIGS[technique].__doc__}\n{_aligned(help_lines(technique))}"]  # type: ignore[arg-type]
    for table in method_tables(technique):
        rows = [(r.name, r.summary, ", ".join(n.value for n in r.needs), r.paper) for r in table]
        parts.append(f"{table.kind}:\n{_aligned(rows)}")  # type: ignore[arg-type]
    if technique == "quant":
        from yolo_ext.quantization.profiles import PROFILES

        parts.append("quantization profile:\n" + _aligned([(p.name, p.summary) for p in PROFILES.values()]))
    return "\n\n".join(parts)


def command_help(command: str) -> str:
    """Return the keys of a command with their defaults, from the docstring of its function, as aligned text."""
    function = getattr(import_module(f"yolo_ext.{FUNCTIONS[command]}"), command)
    arguments = re.search(r"Args:\n(.*?)(?:\n\n|$)", inspect.getdoc(function) or "", re.DOTALL)
    entries = re.findall(r"^    (\w+): (.*(?:\n {8}.*)*)", arguments[1] if arguments else "", re.MULTILINE)
    given = inspect.signature(function).parameters
    lines: list[tuple[str, ...]] = []
    for name, text in entries:
        default = given[name].default if name in given else inspect.Parameter.empty
        value = "" if default is inspect.Parameter.empty else str(default)
        plain = " ".join(text.split()).replace("`", "").rstrip(".")
        first, *rest = textwrap.wrap(plain, 88)
        lines += [(FURTHER.get(name, name), value, first), *(("", "", more) for more in rest)]
    return _aligned(lines)


def help_text(topic: str | None, commands: Mapping[str, Any]) -> str:
    """Return the help for a command or technique, or the overview.

    Raises:
        UsageError: If there is no such topic.
    """
    from yolo_ext import __version__

    if topic is None:
        rows: list[tuple[str, ...]] = [(n, h) for n, h in commands.items()]
        tail = "Options: yolo-ext help COMMAND, yolo-ext help sparsity, or all of them with yolo-ext cfg"
        return f"{USAGE.format(version=__version__)}\nCommands:\n{_aligned(rows)}\n\n{tail}"
    if topic in TOPICS:
        techniques: tuple[str, ...] = TOPICS[topic]
    elif topic in ("compress", "train"):
        techniques = tuple(CONFIGS)
    elif topic in commands:
        keys = f"\n\n{command_help(topic)}" if topic in FUNCTIONS else ""
        return f"yolo-ext {topic}: {commands[topic]}{keys}"
    else:
        raise UsageError(f"There is no help on '{topic}'. Legal: {', '.join([*commands, *TOPICS])}.")
    head = f"yolo-ext {topic}: {commands[topic]}\n\n" if topic in commands else ""
    return head + "\n\n".join(technique_help(t) for t in techniques)
