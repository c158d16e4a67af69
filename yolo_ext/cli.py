# Copyright (C) yolo_ext authors. AGPL-3.0 licence.
"""`yolo-ext COMMAND key=value ...`: the `yolo` command line with dotted keys for compression."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import import_module
from typing import Any

from yolo_ext.arguments import check_native, check_whole, has_target, need
from yolo_ext.core.config import COMPRESS_DEFAULTS, CONFIGS, default_yaml, help_lines, load_recipe
from yolo_ext.core.errors import UsageError, YoloExtError
from yolo_ext.core.registry import suggest

FORWARDED = {
    "val": "Validate a model (Ultralytics)",
    "predict": "Run a model on images (Ultralytics); compare=base.pt marks what the base finds differently",
    "track": "Track objects (Ultralytics)",
    "benchmark": "Benchmark export formats (Ultralytics)",
}


@dataclass(frozen=True)
class Command:
    """One command: what runs it, its help line, the keys it takes besides, and whether native keys are legal."""

    run: Callable[[dict[str, Any]], int]
    help: str
    keys: tuple[str, ...] = ()
    native: bool = False


# Parsing -------------------------------------------------------------------------------------------------------------
def parse_args(argv: list[str]) -> tuple[str, dict[str, Any]]:
    """Split a command line into the command and its options, dotted keys nested.

    Args:
        argv: Words after the program name, in any order.

    Returns:
        Command and options; options of a `recipe=file.yaml` come first and are overridden by the words.

    Raises:
        UsageError: One message that lists all unknown words and keys.
    """
    from ultralytics.cfg import TASKS, merge_equals_args, parse_key_value_pair
    from ultralytics.utils import DEFAULT_CFG_DICT

    try:
        words = [w[2:] if w.startswith("--") else w for w in merge_equals_args(argv)]
    except (SyntaxError, IndexError) as e:  # unmatched brackets
        raise UsageError(f"Cannot read the command line '{' '.join(argv)}': check its brackets and '=' signs.") from e
    command, problems = "", []
    flat: dict[str, Any] = {}
    names = [*COMMANDS, *FORWARDED]
    for word in (w.rstrip(",") for w in words):
        if "=" in word:
            try:
                key, value = parse_key_value_pair(word)
            except (AssertionError, ValueError, SyntaxError) as e:
                problems.append(f"Cannot read '{word}': {e}")
                continue
            listed = isinstance(value, str) and value.startswith("[") and value.endswith("]")
            flat[key] = [v.strip() for v in value[1:-1].split(",")] if listed else value  # a shell eats the quotes
        elif not command and word in names:
            command = word
        elif command == "help" and (word in CONFIGS or word in names):
            flat["topic"] = word
        elif word in TASKS:
            flat["task"] = word
        elif isinstance(DEFAULT_CFG_DICT.get(word), bool):
            flat[word] = True
        else:
            problems.append(
                f"'{word}' is no command, task or key=value pair.{suggest(word, [*names, *DEFAULT_CFG_DICT])}"
            )
    if not command and not problems:
        problems.append(f"The command is missing. Legal: {', '.join(names)}.")
    if problems:
        raise UsageError("\n".join(problems) + "\nSee `yolo-ext help`.")
    recipe = flat.pop("recipe", None)
    options = _nest({**(load_recipe(recipe) if recipe else {}), **flat})
    _check_keys(command, options)
    return command, options


def _nest(flat: Mapping[str, Any]) -> dict[str, Any]:
    """Turn ``prune.speedup`` into ``{"prune": {"speedup": ...}}``; a technique may also be None, True or a dict."""
    nested: dict[str, Any] = {}
    for key, value in flat.items():
        technique, dot, name = key.partition(".")
        if not dot:
            nested[key] = value
        elif isinstance(nested.setdefault(technique, {}), dict):
            nested[technique] = {**nested[technique], name: value}
        else:
            nested[technique] = {name: value}
    return nested


def _check_keys(command: str, options: Mapping[str, Any]) -> None:
    from ultralytics.utils import DEFAULT_CFG_DICT

    if command in FORWARDED:
        return
    entry = COMMANDS[command]
    legal = [*entry.keys, *(DEFAULT_CFG_DICT if entry.native else ())]
    unknown = [k for k in options if k not in legal]
    if unknown:
        dotted = [f"{t}.{k.split('.')[1]}" for t in CONFIGS for k, _, _ in help_lines(t)]
        lines = [f"Unknown key '{k}' for '{command}'.{suggest(k, legal + dotted)}" for k in unknown]
        own = f" Legal: {', '.join(entry.keys)}" + (" and all Ultralytics keys." if entry.native else ".")
        raise UsageError("\n".join(lines) + (own if entry.keys else "") + f"\nSee `yolo-ext help {command}`.")


# Commands ------------------------------------------------------------------------------------------------------------
def _compress(options: dict[str, Any], mode: str, techniques: tuple[str, ...]) -> int:
    """Run the pipeline with the named techniques on by default; the user's keys switch others on or any off."""
    from yolo_ext.pipeline import compress

    need(options, "model")
    for name in techniques:
        given = options.get(name, {})
        if given not in (None, False):
            given = given if isinstance(given, dict) else {}
            options[name] = {**({} if name == "prune" and has_target(given) else COMPRESS_DEFAULTS[name]), **given}
    check_native(options, epochs=0)
    _check_task(options)
    summary = compress(**options, mode=mode)
    failed = [c for c in summary["checks"] if not c["passed"]]
    for c in failed:
        _say(f"Check failed: {c['name']}: {c['value']} (limit {c['limit']})")
    return 1 if failed else 0


def _check_task(options: dict[str, Any]) -> None:
    from yolo_ext.stock.load import load_model
    from yolo_ext.stock.model import task_of

    task = options.pop("task", None)
    if task and (found := task_of(load_model(options["model"])[0])) != task:
        raise UsageError(f"'{options['model']}' is a '{found}' model, not '{task}'. Leave the task word out.")


def _train(options: dict[str, Any]) -> int:
    from yolo_ext.training import train

    need(options, "model", *(() if options.get("resume") else ("data",)))
    check_native(options, epochs=1)
    _check_task(options)
    train(**options)
    return 0


def _export(options: dict[str, Any]) -> int:
    from yolo_ext.deploy_tools import export

    need(options, "model")
    if options.get("format", "onnx") in ("onnx", "openvino"):
        check_whole(options, batch=1, opset=1, max_det=1)
    export(**options)
    return 0


def _tool(name: str, *needed: str, **whole: int) -> Callable[[dict[str, Any]], int]:
    """Return what runs the function of a command: keys that it needs, and least values of whole numbers."""

    def run(options: dict[str, Any]) -> int:
        from yolo_ext.helptext import FUNCTIONS

        need(options, *needed)
        check_whole(options, **whole)
        found = getattr(import_module(f"yolo_ext.{FUNCTIONS[name]}"), name)(**options)
        return 1 if isinstance(found, dict) and found.get("passed") is False else 0

    return run


def _demo(options: dict[str, Any]) -> int:
    from yolo_ext.demo import demo

    failed = [c for c in demo(**options)["checks"] if not c["passed"]]
    for c in failed:
        _say(f"Check failed: {c['name']}: {c['value']} (limit {c['limit']})")
    return 1 if failed else 0


def _checks(options: dict[str, Any]) -> int:
    from yolo_ext.tools import checks

    return 0 if checks() else 1


def _cfg(options: dict[str, Any]) -> int:
    _say(default_yaml())
    return 0


def _version(options: dict[str, Any]) -> int:
    from yolo_ext import __version__

    _say(__version__)
    return 0


def _help(options: dict[str, Any]) -> int:
    from yolo_ext.helptext import help_text

    _say(help_text(options.get("topic"), {**{n: c.help for n, c in COMMANDS.items()}, **FORWARDED}))
    return 0


def _forward(command: str, argv: list[str], options: dict[str, Any]) -> int:
    from yolo_ext.stock.cfg import yolo_entrypoint

    try:
        if command == "predict" and "compare" in options:
            from yolo_ext.predict_tools import predict

            need(options, "model", "source", "compare")
            predict(**options)
        else:
            yolo_entrypoint(argv)
    except UsageError:
        raise
    except (SyntaxError, TypeError, ValueError, FileNotFoundError, ModuleNotFoundError) as e:
        raise UsageError(f"yolo {command}: {str(e).strip().splitlines()[0]}") from e
    return 0


_PLACE = ("project", "name", "exist_ok", "save_dir")
_TECHNIQUE_KEYS = ("model", "data", *CONFIGS, "resume", "save_dir")
COMMANDS: dict[str, Command] = {
    "compress": Command(
        lambda o: _compress(o, "compress", tuple(COMPRESS_DEFAULTS)),
        "Prune, fine-tune with distillation, quantize, export, verify, measure and report",
        _TECHNIQUE_KEYS, native=True,
    ),
    "train": Command(_train, "Train with any technique in the loop", _TECHNIQUE_KEYS, native=True),
    "prune": Command(
        lambda o: _compress(o, "prune", ("prune",)), "Prune and fine-tune; epochs=0 prunes without data or training",
        _TECHNIQUE_KEYS, native=True,
    ),
    "distill": Command(
        lambda o: _train({"distill": {}, "name": "distill", **o}), "Train a student with a teacher", _TECHNIQUE_KEYS,
        native=True,
    ),
    "quantize": Command(
        lambda o: _compress({"epochs": 0, **o}, "quantize", ("quant",)), "INT8 by PTQ or QAT, as ONNX", _TECHNIQUE_KEYS,
        native=True,
    ),
    "export": Command(_export, "Write ONNX or OpenVINO (FP32, FP16, INT8) or any other Ultralytics format",
                      ("model", "format", "out", "half", "int8", "quant", "save_dir"), native=True),
    "verify": Command(
        _tool("verify", "model", "onnx"),
        "Compare an ONNX file with its .pt; exit status 1 when they differ",
        ("model", "onnx", "int8", "data", "source", "imgsz", *_PLACE),
    ),
    "bench": Command(
        _tool("bench", "models", imgsz=1, rounds=1),
        "Measure latency, memory and mAP of .pt, .onnx and OpenVINO models side by side",
        ("models", "imgsz", "threads", "batch", "rounds", "data", "source", "profile", "memory", *_PLACE),
    ),
    "analyze": Command(
        _tool("analyze", "model", imgsz=1),
        "Print every group of coupled channels: size, cost, prunable or the reason why not",
        ("model", "imgsz", *_PLACE),
    ),
    "sensitivity": Command(
        _tool("sensitivity", "model", "data", imgsz=1, images=1),
        "Measure what each group of channels is worth to pruning; kind=quant: what each layer loses by INT8",
        ("model", "data", "kind", "ratios", "prune", "quant", "by", "images", "map", "imgsz", *_PLACE),
    ),
    "convert": Command(
        _tool("convert", "source", "out", seed=0, folds=2),
        "Convert a dataset between YOLO, Pascal VOC and COCO",
        ("format", "to", "source", "out", "train", "val", "test", "classes", "ratio", "stratify", "folds", "seed",
         "task", "difficult", "broken", "files", "images"),
    ),
    "split": Command(
        _tool("split", "source", "out", seed=0, folds=2),
        "Split a YOLO dataset anew: shares or folds, at random or by class",
        ("source", "out", "classes", "ratio", "stratify", "folds", "seed", "broken", "files"),
    ),
    "data": Command(
        _tool("data", "check", near=0),
        "Summarise a dataset; exit status 1 for leaks between splits or broken files",
        ("check", "near", *_PLACE),
    ),
    "label": Command(
        _tool("label", "model", "source", "out", imgsz=1, review=0),
        "Label images with a model: labels, previews and a review sheet",
        ("model", "source", "out", "format", "classes", "conf", "iou", "imgsz", "device", "beside", "overwrite",
         "save_conf", "previews", "files", "review"),
    ),
    "demo": Command(_demo, "Generate data, train a small YOLO and compress it; needs no network",
                    ("project", "name", "exist_ok", "seed")),
    "checks": Command(_checks, "Check the installation"),
    "cfg": Command(_cfg, "Print all options with their defaults"),
    "version": Command(_version, "Print the version"),
    "help": Command(_help, "Print help: yolo-ext help [COMMAND | sparsity]", ("topic",)),
}  # fmt: skip


def _say(text: str) -> None:
    sys.stdout.write(text + "\n")


def main(argv: list[str] | None = None) -> int:
    """Run the command line and return its exit status: 0 done, 1 a check or budget failed, 2 wrong usage."""
    words = list(sys.argv[1:] if argv is None else argv)
    if "" not in sys.path:
        sys.path.insert(0, "")  # the user's own methods lie in the working folder
    words = [{"-h": "help", "--help": "help", "--version": "version", "-v": "version"}.get(w, w) for w in words] or [
        "help"
    ]
    try:
        command, options = parse_args(words)
        return _forward(command, words, options) if command in FORWARDED else COMMANDS[command].run(options)
    except YoloExtError as e:
        sys.stderr.write(f"yolo-ext: {e}\n")
        return e.exit_status
    except OSError as e:  # a folder that cannot be written, a file that is gone
        sys.stderr.write(f"yolo-ext: {str(e).strip().splitlines()[0]}\n")
        return UsageError.exit_status
    except KeyboardInterrupt:
        sys.stderr.write("yolo-ext: stopped. What is finished is kept; go on with resume=True (label: same command).\n")
        return 130


if __name__ == "__main__":
    sys.exit(main())
