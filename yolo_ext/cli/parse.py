# Copyright (C) yolo_ext authors. AGPL-3.0 licence.
"""Words of a command line into a command and its options."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from importlib import import_module
from typing import Any

from yolo_ext.commands import COMMANDS, keys, takes_native
from yolo_ext.core.config import CONFIGS, comma_list, help_lines, load_recipe
from yolo_ext.core.errors import UsageError
from yolo_ext.core.registry import suggest

for _module in ("compress", "deploy", "bench", "analyze", "data", "label"):  # fill the table, in the order of the help
    import_module(f"yolo_ext.commands.{_module}")

FORWARDED = {
    "val": "Validate a model (Ultralytics)",
    "track": "Track objects (Ultralytics)",
    "benchmark": "Benchmark export formats (Ultralytics)",
}
STOCK = (*FORWARDED, "predict")  # whose keys Ultralytics reads; predict is ours where it compares


def command_names() -> list[str]:
    """Return all commands, ours first."""
    return [*COMMANDS.names(), *FORWARDED]


def needed(function: Callable[..., Any]) -> list[str]:
    """Return the keys that a command cannot do without."""
    return [k for k, p in keys(function).items() if p.default is inspect.Parameter.empty]


def parse_args(argv: list[str]) -> tuple[str, dict[str, Any]]:
    """Split words into the command and its options, dotted keys nested; the words override those of a recipe."""
    from ultralytics.utils import DEFAULT_CFG_DICT

    from yolo_ext.stock.context import TASKS, merge_equals_args

    try:
        words = [w[2:] if w.startswith("--") else w for w in merge_equals_args(argv)]
    except (SyntaxError, IndexError) as e:  # unmatched brackets
        raise UsageError(f"Cannot read the command line '{' '.join(argv)}': check its brackets and '=' signs.") from e
    command, problems = "", []
    flat: dict[str, Any] = {}
    names = command_names()
    for word in (w.rstrip(",") for w in words):
        if "=" in word:
            problems += _read_pair(word, flat)
        elif not command and word in names:
            command = word
        elif command == "help" and (word in CONFIGS or word in names):
            flat["topic"] = word
        elif word in TASKS:
            flat["task"] = word
        elif isinstance(DEFAULT_CFG_DICT.get(word), bool):
            flat[word] = True
        else:
            hint = suggest(word, [*names, *DEFAULT_CFG_DICT])
            problems.append(f"'{word}' is no command, task or key=value pair.{hint}")
    if not command and not problems:
        problems.append(f"The command is missing. Legal: {', '.join(names)}.")
    if problems:
        raise UsageError("\n".join(problems) + "\nSee `yolo-ext help`.")
    recipe = flat.pop("recipe", None)
    options = _nest({**(load_recipe(recipe) if recipe else {}), **flat})
    if command not in STOCK:
        _check_keys(command, options)
    return command, options


def _read_pair(word: str, flat: dict[str, Any]) -> list[str]:
    """Read `key=value` as Ultralytics does into `flat` and return what is wrong with it."""
    from yolo_ext.stock.context import parse_key_value_pair

    try:
        key, value = parse_key_value_pair(word)
    except (AssertionError, ValueError, SyntaxError) as e:
        return [f"Cannot read '{word}': {e}"]
    listed = isinstance(value, str) and value.startswith("[") and value.endswith("]")
    flat[key] = comma_list(value[1:-1]) if listed else value  # a shell eats the quotes
    return []


def _nest(flat: Mapping[str, Any]) -> dict[str, Any]:
    """Turn ``prune.speedup`` into ``{"prune": {"speedup": ...}}``; a technique may also be None, True or a dict."""
    nested: dict[str, Any] = {}
    for key, value in flat.items():
        technique, dot, name = key.partition(".")
        before = nested.get(technique)
        nested[technique] = {**(before if isinstance(before, dict) else {}), name: value} if dot else value
    return nested


def _check_keys(command: str, options: Mapping[str, Any]) -> None:
    """Refuse keys that the command does not know, all in one message."""
    from ultralytics.utils import DEFAULT_CFG_DICT

    own = list(keys(COMMANDS[command].fn))
    native = takes_native(COMMANDS[command].fn)
    legal = [*own, *(DEFAULT_CFG_DICT if native else ())]
    unknown = [k for k in options if k not in legal]
    if unknown:
        dotted = [key for t in CONFIGS for key, _, _ in help_lines(t)]
        lines = [f"Unknown key '{k}' for '{command}'.{suggest(k, legal + dotted)}" for k in unknown]
        told = f" Legal: {', '.join(own)}" + (" and all Ultralytics keys." if native else ".") if own else ""
        raise UsageError("\n".join(lines) + told + f"\nSee `yolo-ext help {command}`.")
