# Copyright (C) yolo_ext authors. AGPL-3.0 licence.
"""`yolo-ext COMMAND key=value ...`: the `yolo` command line with dotted keys for compression, and its help."""

import os
import re
import signal
import sys
import threading
import traceback
from collections import deque
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import fields
from functools import cache
from tempfile import NamedTemporaryFile
from typing import Any

from yolo_ext.commands import compare, compress, data, deploy, label, measure  # noqa: F401  isort: skip
from yolo_ext.commands import COMMANDS, LOGGER, NATIVE, keys, read_values, takes_native
from yolo_ext.commands.help import FORWARDED, STOCK, TOPICS
from yolo_ext.core.config import CONFIGS, comma_list, load_recipe, option_names, read_flat
from yolo_ext.core.errors import UsageError, YoloExtError, brief, out_of_memory
from yolo_ext.core.registry import suggest

NAMES = (*COMMANDS.names(), *FORWARDED)
VARIABLE = "YOLO_EXT_"  # start of a variable that holds an option: YOLO_EXT_MODEL, YOLO_EXT_PRUNE__SPEEDUP
SWITCHED = {"no": False, "off": False, "yes": True, "on": True}  # besides False and True
HELP_WORDS = {"help", "-h", "--help"}
PLAIN = ("help", "recipes", "cfg", "version", "checks")  # commands that take nothing from the environment


def main(argv: list[str] | None = None) -> int:
    """Run `argv`, the words after the program name.

    Returns: Exit status: 0 done, 1 check failed, 2 wrong input or too little memory, 3 error of ours, 130 stopped.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    if "" not in sys.path:
        sys.path.append("")  # the user's own methods lie in the working folder, where no file stands in for a package
    words = ["version" if word in ("--version", "-v") else word for word in words]
    try:
        with _sigterm_is_ctrl_c():
            command, options = parse_args(words or ["help"])
            stock = command in STOCK
            found = _stock(command, plain_words(words), options) if stock else COMMANDS[command].fn(**options)
        return 0 if found is None or found.passed else 1
    except YoloExtError as e:
        sys.stderr.write(f"yolo-ext: {e}\n")
        return e.exit_status
    except OSError as e:  # a folder that cannot be written, a file that is gone
        sys.stderr.write(f"yolo-ext: {brief(e)}\n")
        return UsageError.exit_status
    except KeyboardInterrupt:
        sys.stderr.write("yolo-ext: stopped\n")  # how to go on has been said, where there is a run to go on with
        return 130
    except Exception as e:
        if out_of_memory(e):
            lower = "Lower what takes it, such as imgsz, batch, workers or images, or end other programs"
            sys.stderr.write(f"yolo-ext: out of memory ({brief(e)}). {lower}.\n")
            return UsageError.exit_status
        sys.stderr.write(f"yolo-ext: internal error ({type(e).__name__}: {brief(e)}), log at {_log_of(e)}\n")
        return 3


def _log_of(e: Exception) -> str:
    """Return the file with the traceback of an error: the log of its run, else one in the temporary folder."""
    if file := getattr(e, "log", None):
        return str(file)
    with suppress(OSError), NamedTemporaryFile("w", -1, "utf-8", None, ".log", "yolo_ext_", delete=False) as log:
        traceback.print_exception(e, file=log)
        return log.name
    return "nowhere: the disk is full"


@contextmanager
def _sigterm_is_ctrl_c() -> Iterator[None]:
    """Have SIGTERM stop this process as Ctrl-C does; one that it forks, such as a reader of images, just ends."""
    owner, main_thread = os.getpid(), threading.current_thread() is threading.main_thread()

    def stop(*_: Any) -> None:
        if os.getpid() != owner:
            os._exit(1)
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, stop) if main_thread else None  # other threads must not ask for signals
    try:
        yield
    finally:
        if main_thread:
            signal.signal(signal.SIGTERM, before)


def _stock(command: str, words: list[str], options: dict[str, Any]) -> Any:
    """Hand the words on to Ultralytics, unless two models are to be compared."""
    from yolo_ext.stock import register_layers
    from yolo_ext.stock.context import yolo_entrypoint
    from yolo_ext.stock.safety import safely

    try:
        if command == "predict" and "compare" in options:
            return COMMANDS[command].fn(**options)
        read_values(options, NATIVE)
        register_layers(options.pop("modules", None))
        trust = options.pop("trust", None)
        words = [word for word in words if not word.startswith(("modules=", "recipe=", "trust="))]
        given = {word.partition("=")[0] for word in words}
        outside = [f"{k}={v}" for k, v in options.items() if not {k, str(v)} & given]  # of the environment
        with safely(trust):
            yolo_entrypoint([*words, *outside])
    except YoloExtError:
        raise
    except (SyntaxError, TypeError, ValueError, OSError, ModuleNotFoundError) as e:
        raise UsageError(f"yolo {command}: {brief(e)}") from e
    except Exception as e:  # of Ultralytics and the runtimes, which have exceptions of their own for a wrong value
        if out_of_memory(e):
            raise
        why, file = f"{type(e).__name__}: {' '.join(str(e).split())[:200]}", str(options.get("model"))
        fails = f"'{file}' does not work as a YOLO ({why})" if file.endswith(".onnx") else why
        raise UsageError(f"yolo {command}: {fails}. Look at the values given; log at {_log_of(e)}") from e
    return None


def parse_args(argv: list[str]) -> tuple[str, dict[str, Any]]:
    """Split words into the command and its options, dotted keys nested; the words override those of a recipe."""
    if HELP_WORDS & {*argv}:
        others = [w for word in argv if "=" not in (w := word.removeprefix("topic=")) and w not in HELP_WORDS]
        known = [word for word in others if word in (*NAMES, *TOPICS)]
        return "help", {"topic": (known or others)[0]} if others else {}
    command, flat, problems = "", dict[str, Any](), list[str]()
    _, switches, tasks = _legal()
    for word in plain_words(argv):
        if "=" in word:
            problems += _read_pair(word, flat)
        elif not command and word in NAMES:
            command = word
        elif word in tasks:
            flat["task"] = word
        elif word in switches:
            flat[word] = True
        else:
            problems.append(_misplaced(word, command, flat))
    if not command and not problems:
        problems.append(f"The command is missing. Legal: {', '.join(NAMES)}.")
    if problems:
        raise UsageError("\n".join(problems) + f"\nSee `yolo-ext help{f' {command}' if command else ''}`.")
    outside = _environment(command)
    recipe = flat.pop("recipe", outside.pop("recipe", None))
    given = {**(load_recipe(recipe) if recipe else {}), **flat}
    outside = {k: v for k, v in outside.items() if _is_on(k.split(".")[0], command, given)}
    if outside:
        LOGGER.info(f"From the environment: {', '.join(map(_variable, outside))}")
    return command, _nest({**outside, **given})


def plain_words(argv: list[str]) -> list[str]:
    """Return the words in the form `key=value`, in which ``--key value``, ``-key=value`` and ``key value`` are read."""
    from yolo_ext.stock.context import merge_equals_args

    try:
        queue = deque(merge_equals_args(argv))
    except (SyntaxError, IndexError) as e:  # unmatched brackets
        raise UsageError(f"Cannot read the command line '{' '.join(argv)}': check its brackets and '=' signs.") from e
    (legal, switches, tasks), names, words = _legal(), {*NAMES}, list[str]()
    while queue:
        given = queue.popleft().rstrip(",")
        word, after = given.lstrip("-"), queue[0].rstrip(",") if queue else ""
        dashed, chosen = word != given, names & {*words}  # the command, once it is there
        is_key = (word in legal and (dashed or chosen or word not in names)) or (dashed and word not in names | tasks)
        another = re.match("-+[a-z]", after) or ("=" in after and after.partition("=")[0] in legal)
        another = another or (word in switches and after in names | tasks | legal)
        if is_key and after and not another and "=" not in word and word not in tasks:
            word += f"={after}"
            queue.popleft()
        words.append(_plain(word))
    return words


def _plain(word: str) -> str:
    """Return a word `key=value` with no, off, yes and on of a switch as False and True."""
    key, _, value = word.partition("=")
    truth = SWITCHED.get(value.strip().lower()) if key.strip() in (*_legal()[1], *CONFIGS) else None
    return word if truth is None else f"{key}={truth}"


def _misplaced(word: str, command: str, flat: dict[str, Any]) -> str:
    """Say what a word without a meaning may have meant; a file is noted as the value of the next free key."""
    if word in (legal := _legal()[0]):
        return f"'{word}' has no value. Write {word}=..."
    order = keys(COMMANDS[command].fn) if command in COMMANDS.names() else ("model", "data")
    key = next((k for k in order if k not in flat), "")
    if key and {".", "/"} & {*word}:
        flat[key] = word
        return f"'{word}' is no key=value pair. Did you mean '{key}={word}'?"
    return f"'{word}' is no command, task or key=value pair.{suggest(word, [*NAMES, *legal])}"


@cache
def _legal() -> tuple[set[str], set[str], set[str]]:
    """Return the keys of all commands, those of them that are True where no value is given, and Ultralytics' tasks."""
    from ultralytics.utils import DEFAULT_CFG_DICT

    from yolo_ext.stock.context import TASKS

    own = [p for row in COMMANDS for p in keys(row.fn).values()]
    switches = {k for k, v in DEFAULT_CFG_DICT.items() if isinstance(v, bool)}
    switches |= {p.name for p in own if "bool" in str(p.annotation)}
    switches |= {f"{t}.{f.name}" for t, cls in CONFIGS.items() for f in fields(cls) if "bool" in str(f.type)}
    return {*DEFAULT_CFG_DICT, *option_names(), *CONFIGS, "recipe", *(p.name for p in own)}, switches, {*TASKS}


def _environment(command: str) -> dict[str, Any]:
    """Return the options of a command that stand in environment variables, flat; refuse names of no command."""
    from ultralytics.utils import DEFAULT_CFG_DICT

    legal, problems, found = _legal()[0] - {"mode"}, list[str](), dict[str, Any]()  # `mode` is the command
    own = ["recipe", *(keys(COMMANDS[command].fn) if command in COMMANDS.names() else ())]
    own += DEFAULT_CFG_DICT if command in STOCK or takes_native(COMMANDS[command].fn) else []
    for variable in (v for v in os.environ if v.startswith(VARIABLE) and command not in PLAIN):
        key = variable.removeprefix(VARIABLE).lower().replace("__", ".")
        if key not in legal:
            near = suggest(variable, [*map(_variable, sorted(legal))])
            problems.append(f"Unknown environment variable '{variable}'.{near}")
        elif key.split(".")[0] in own:  # others are for other commands
            problems += [f"{variable}: {p}" for p in _read_pair(_plain(f"{key}={os.environ[variable]}"), found)]
    if problems:
        raise UsageError("\n".join(problems))
    return found


def _is_on(key: str, command: str, given: Mapping[str, Any]) -> bool:
    """Tell whether a technique is on without variables, by default or as given; other keys are."""
    values = [value for k, value in given.items() if k.split(".")[0] == key]
    default = key not in CONFIGS or keys(COMMANDS[command].fn)[key].default is True
    return any(value not in (None, False) for value in values) if key in CONFIGS and values else default


def _variable(key: str) -> str:
    return VARIABLE + key.upper().replace(".", "__")


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
    if isinstance(file := flat.get("contract"), str) and any(key.startswith("contract.") for key in flat):
        limits = read_flat(file, f"'contract={file}'", "recall: {person: -0.02}")  # single limits win over its own
        flat = {f"contract.{k}": v for k, v in limits.items()} | {k: v for k, v in flat.items() if k != "contract"}
    nested: dict[str, Any] = {}
    for key, value in flat.items():
        technique, dot, name = key.partition(".")
        before = nested.get(technique)
        nested[technique] = {**(before if isinstance(before, dict) else {}), name: value} if dot else value
    return nested
