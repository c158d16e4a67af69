# Copyright (C) yolo_ext authors. AGPL-3.0 licence.
"""`yolo-ext COMMAND key=value ...`: the `yolo` command line with dotted keys for compression."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Mapping
from typing import Any

from yolo_ext.cli.help import COMMANDS, FORWARDED
from yolo_ext.commands import keys, need, say, takes_native
from yolo_ext.core.config import CONFIGS, comma_list, help_lines, load_recipe
from yolo_ext.core.errors import UsageError, YoloExtError
from yolo_ext.core.registry import suggest

STOCK = (*FORWARDED, "predict")  # whose keys Ultralytics reads; predict is ours where it compares


def main(argv: list[str] | None = None) -> int:
    """Run the command line and return the exit status: 0 done, 1 a check or budget failed, 2 wrong usage, 130 stopped.

    `argv` are the words after the program name; those of this process by default.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    if "" not in sys.path:
        sys.path.insert(0, "")  # the user's own methods lie in the working folder
    words = [{"-h": "help", "--help": "help", "--version": "version", "-v": "version"}.get(w, w) for w in words]
    try:
        command, options = parse_args(words or ["help"])
        return _stock(command, words, options) if command in STOCK else _run(command, options)
    except YoloExtError as e:
        sys.stderr.write(f"yolo-ext: {e}\n")
        return e.exit_status
    except OSError as e:  # a folder that cannot be written, a file that is gone
        sys.stderr.write(f"yolo-ext: {str(e).strip().splitlines()[0]}\n")
        return UsageError.exit_status
    except KeyboardInterrupt:
        sys.stderr.write("yolo-ext: stopped. What is finished is kept; go on with resume=True (label: same command).\n")
        return 130


def _run(command: str, options: dict[str, Any]) -> int:
    """Run a command of ours and return the exit status."""
    function = COMMANDS[command].fn
    need(options, *needed(function))
    found = function(**options)
    passed = found.get("passed") if isinstance(found, Mapping) else found is not False
    if passed is None:
        failed = [c for c in found.get("checks", ()) if not c["passed"]]
        for c in failed:
            say(f"Check failed: {c['name']}: {c['value']} (limit {c['limit']})")
        passed = not failed
    return 0 if passed else 1


def _stock(command: str, words: list[str], options: dict[str, Any]) -> int:
    """Hand the words on to Ultralytics, unless two models are to be compared."""
    from yolo_ext.stock.context import yolo_entrypoint

    try:
        if command == "predict" and "compare" in options:
            return _run(command, options)
        yolo_entrypoint(words)
    except UsageError:
        raise
    except (SyntaxError, TypeError, ValueError, FileNotFoundError, ModuleNotFoundError) as e:
        raise UsageError(f"yolo {command}: {str(e).strip().splitlines()[0]}") from e
    return 0


# Words ---------------------------------------------------------------------------------------------------------------
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
    names = [*COMMANDS.names(), *FORWARDED]
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
