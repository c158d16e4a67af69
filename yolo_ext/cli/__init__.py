# Copyright (C) yolo_ext authors. AGPL-3.0 licence.
"""`yolo-ext COMMAND key=value ...`: the `yolo` command line with dotted keys for compression."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

from yolo_ext.cli.help import COMMANDS
from yolo_ext.cli.parse import STOCK, needed, parse_args
from yolo_ext.commands import need, say
from yolo_ext.core.errors import UsageError, YoloExtError

__all__ = ["COMMANDS", "STOCK", "main", "parse_args"]


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
