# Copyright (C) yolo_ext authors. AGPL-3.0 licence.
"""`yolo-ext COMMAND key=value ...`: the `yolo` command line with dotted keys for compression, and its help."""

import inspect
import os
import sys
import textwrap
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from typing import Any

from yolo_ext import __version__
from yolo_ext.commands import COMMANDS, HELP, LOGGER, command, keys, need, takes_native
from yolo_ext.core.config import CONFIGS, comma_list, default_yaml, help_lines, load_recipe, misspelt, option_names
from yolo_ext.core.errors import UsageError, YoloExtError
from yolo_ext.core.registry import Table, suggest

for _module in ("compress", "deploy", "measure", "data", "label"):  # fill the table, in the order of the help
    import_module(f"yolo_ext.commands.{_module}")

FORWARDED = {"val": "Validate a model (Ultralytics)", "track": "Track objects (Ultralytics)",
             "benchmark": "Benchmark export formats (Ultralytics)"}  # fmt: skip
TOPICS = {"quantize": ("quant",), **dict.fromkeys(("compress", "train"), tuple(CONFIGS)), **{t: (t,) for t in CONFIGS}}
TABLES = {  # of methods, by technique
    "prune": ("pruning.criteria:criteria", "core.schedules:removals"),
    "sparsity": ("sparsity.penalties:penalties",),
    "distill": ("distillation.logits:logit_losses", "distillation.features:feature_losses", "core.schedules:decays"),
    "quant": ("quantization.observers:observers", "quantization.observers:weight_observers"),
}
STOCK = (*FORWARDED, "predict")  # whose keys Ultralytics reads; predict is ours where it compares
VARIABLE = "YOLO_EXT_"  # start of a variable that holds an option: YOLO_EXT_MODEL, YOLO_EXT_PRUNE__SPEEDUP
PLAIN = ("help", "cfg", "version", "checks")  # commands that take nothing from the environment
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

All Ultralytics keys are accepted. recipe=FILE.yaml reads options from a file, YOLO_EXT_PRUNE__SPEEDUP=2 in the
environment stands for prune.speedup=2. The command line wins over the recipe, the recipe over the environment.
"""


def main(argv: list[str] | None = None) -> int:
    """Run `argv`, the words after the program name; exit status 0 done, 1 check failed, 2 wrong usage, 130 stopped."""
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
    need(options, *needed(COMMANDS[command].fn))
    found = COMMANDS[command].fn(**options)
    passed = found.get("passed") if isinstance(found, Mapping) else found is not False
    if passed is None:
        failed = [c for c in found.get("checks", ()) if not c["passed"]]
        passed = not failed
        for c in failed:
            print(f"Check failed: {c['name']}: {c['value']} (limit {c['limit']})")
    return 0 if passed else 1


def _stock(command: str, words: list[str], options: dict[str, Any]) -> int:
    """Hand the words on to Ultralytics, unless two models are to be compared."""
    from yolo_ext.stock import register_layers
    from yolo_ext.stock.context import yolo_entrypoint

    try:
        if command == "predict" and "compare" in options:
            return _run(command, options)
        register_layers(options.pop("modules", None))
        words = [word for word in words if not word.removeprefix("--").startswith("modules=")]
        given = {word.partition("=")[0].removeprefix("--") for word in words}
        outside = [f"{k}={v}" for k, v in options.items() if not {k, str(v)} & given]  # of the environment
        yolo_entrypoint([*words, *outside])
    except UsageError:
        raise
    except (SyntaxError, TypeError, ValueError, FileNotFoundError, ModuleNotFoundError) as e:
        raise UsageError(f"yolo {command}: {str(e).strip().splitlines()[0]}") from e
    except Exception as e:  # a runtime has exceptions of its own for a file that is no YOLO
        if not (file := str(options.get("model"))).endswith(".onnx"):
            raise
        why = f"{type(e).__name__}: {' '.join(str(e).split())[:200]}"
        raise UsageError(f"yolo {command}: '{file}' does not work as a YOLO ({why}). Give an exported one.") from e
    return 0


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
    outside = _environment(command)
    recipe = flat.pop("recipe", outside.pop("recipe", None))
    options = _nest({**outside, **(load_recipe(recipe) if recipe else {}), **flat})
    if command not in STOCK:
        _check_keys(command, options)
    return command, options


def _environment(command: str) -> dict[str, Any]:
    """Return the options of a command that stand in environment variables, flat; refuse names of no command."""
    from ultralytics.utils import DEFAULT_CFG_DICT

    names = {v.removeprefix(VARIABLE).lower().replace("__", "."): v for v in os.environ if v.startswith(VARIABLE)}
    if command in PLAIN or not names:
        return {}
    legal = {*DEFAULT_CFG_DICT, *option_names(), *CONFIGS, "recipe", *(k for r in COMMANDS for k in keys(r.fn))}
    legal -= {"mode"}  # which is the command
    shown = [VARIABLE + key.upper().replace(".", "__") for key in sorted(legal)]
    unknown = [f"Unknown environment variable '{v}'.{suggest(v, shown)}" for k, v in names.items() if k not in legal]
    own = [*(DEFAULT_CFG_DICT if command in STOCK or takes_native(COMMANDS[command].fn) else ()), "recipe"]
    own += keys(COMMANDS[command].fn) if command in COMMANDS.names() else []
    found: dict[str, Any] = {}
    for key, variable in names.items():
        if key.split(".")[0] in own:  # others are for other commands
            unknown += [f"{variable}: {p}" for p in _read_pair(f"{key}={os.environ[variable]}", found)]
    if unknown:
        raise UsageError("\n".join(unknown))
    if found:
        LOGGER.info(f"From the environment: {', '.join(names[k] for k in found)}")
    return found


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

    own, native = [*keys(COMMANDS[command].fn)], takes_native(COMMANDS[command].fn)
    legal = [*own, *(DEFAULT_CFG_DICT if native else ())]
    if unknown := [k for k in options if k not in legal]:
        near = legal + [n for n in option_names() if n.split(".")[0] in own]
        lines = [f"Unknown key '{k}' for '{command}'.{suggest(k, near)}" for k in unknown]
        for technique in (t for t in CONFIGS if t in own and isinstance(options.get(t), Mapping)):
            lines += misspelt(technique, options[technique])
        told = f" Legal: {', '.join(own)}" + (" and all Ultralytics keys." if native else ".") if own else ""
        raise UsageError("\n".join(lines) + told + f"\nSee `yolo-ext help {command}`.")


@command("Print all options with their defaults")
def cfg() -> None:
    """Print the options of all techniques as YAML."""
    print(default_yaml())


@command("Print the version")
def version() -> None:
    """Print the version of yolo_ext."""
    print(__version__)


@command("Print help: yolo-ext help [COMMAND | sparsity]")
def help(topic: str | None = None) -> None:
    """Print the help for a command or technique, or the overview.

    Args:
        topic: Command or technique.
    """
    print(help_text(topic))


def help_text(topic: str | None) -> str:
    """Return the help for a command or technique, or the overview."""
    commands = {**{row.name: row.summary for row in COMMANDS}, **FORWARDED}
    if topic is None:
        tail = "Options: yolo-ext help COMMAND, yolo-ext help sparsity, or all of them with yolo-ext cfg"
        return f"{USAGE.format(version=__version__)}\nCommands:\n{_aligned([*commands.items()])}\n\n{tail}"
    if topic not in commands and topic not in TOPICS:
        raise UsageError(f"There is no help on '{topic}'. Legal: {', '.join(dict.fromkeys([*commands, *TOPICS]))}.")
    head = f"yolo-ext {topic}: {commands[topic]}" if topic in commands else ""
    own = command_help(COMMANDS[topic].fn) if topic in COMMANDS.names() else ""
    return "\n\n".join(p for p in (head, own, *map(technique_help, TOPICS.get(topic, ()))) if p)


def command_help(function: Callable[..., Any]) -> str:
    """Return the keys of a command with their defaults and help as aligned text."""
    about = documented(function)
    lines: list[tuple[str, ...]] = []
    extra = {k: p for k, p in keys(function).items() if k == "modules"}
    for name, parameter in {**inspect.signature(function).parameters, **extra}.items():
        default = "" if parameter.default is inspect.Parameter.empty else str(parameter.default)
        lines.append((FURTHER.get(name, name), default, about.get(name) or HELP[name]))
    return _aligned(lines)


def documented(function: Callable[..., Any]) -> dict[str, str]:
    """Return the help of each parameter: from the section `Args` of the docstring, else of a command like it."""
    section = (inspect.getdoc(function) or "").partition("Args:\n")[2].partition("\n\n")[0]
    like, found = getattr(function, "like", None), dict[str, str]()
    others = documented(like) if like else {k: HELP[k] for k in inspect.signature(function).parameters if k in HELP}
    for line in textwrap.dedent(section).splitlines():
        name, _, text = line.partition(": ") if not line.startswith(" ") else (next(reversed(found)), "", line)
        found[name] = " ".join(f"{found.get(name, '')} {text}".replace("`", "").split())
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


def _aligned(given: Sequence[tuple[str, ...]]) -> str:
    """Align the columns of rows below each other, the last one wrapped."""
    rows: list[tuple[str, ...]] = []
    for *cells, last in given:
        first, *rest = textwrap.wrap(last, 88) or [""]
        rows += [(*cells, first), *((*[""] * len(cells), more) for more in rest)]
    widths = [max(len(r[i]) for r in rows) for i in range(len(rows[0]) - 1)] if rows else []
    return "\n".join("  " + "  ".join([c.ljust(w) for c, w in zip(r, widths)] + [r[-1]]) for r in rows)
