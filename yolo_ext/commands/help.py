# Copyright (C) yolo_ext authors. AGPL-3.0 licence.
"""The commands that explain: help, recipes, cfg, version, checks; and the lists of methods for Python."""

import inspect
import re
import shutil
import textwrap
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from importlib import import_module, metadata
from itertools import takewhile
from typing import Any

from yolo_ext import __version__
from yolo_ext.commands import COMMANDS, HELP, LOGGER, command, keys, needed
from yolo_ext.core.config import CONFIGS, cfg_dir, default_yaml, help_lines
from yolo_ext.core.errors import UsageError, YoloExtError
from yolo_ext.core.registry import suggest

WIDTH = 100  # most columns of a help
LEFT = 28  # most columns of names; the text of a longer one starts on a line of its own
FORWARDED = {  # commands of Ultralytics: what they do, examples
    "val": ("Validate a model", "model=best.pt data=data.yaml", "model=int8.onnx data=data.yaml imgsz=640"),
    "track": ("Track objects in a video", "model=best.pt source=video.mp4"),
    "benchmark": ("Benchmark export formats", "model=best.pt data=data.yaml imgsz=640"),
}  # fmt: skip
STOCK = ("predict", *FORWARDED)  # whose keys Ultralytics reads; predict is ours where it compares
STOCK_HELP = """The words go to `yolo {0}` of Ultralytics as they are, with any model, ours too. Its keys:
https://docs.ultralytics.com/modes/{0}. Besides, modules=mypkg.layers names Python modules with layers of your own."""
GROUPS = {"compress": "Compress", "data": "Data", "label": "Data", "help": "Help"}  # of modules of commands
MEASURE = "Deploy and measure"  # the group of all others
ALL = ("prune", "distill", "quant", "sparsity")
TOPICS = {"compress": ALL, "train": ALL, "quantize": ("quant",), **{technique: (technique,) for technique in ALL}}
TABLES = {  # of methods, by technique
    "prune": ("pruning.criteria:criteria", "core.schedules:removals"),
    "sparsity": ("sparsity.penalties:penalties",),
    "distill": ("distillation.logits:logit_losses", "distillation.features:feature_losses", "core.schedules:decays"),
    "quant": ("quantization.observers:observers", "quantization.observers:weight_observers", "quantization.spec:ROWS"),
}
OPTIONS = {  # headings in the help of a technique, each by the first option below it
    "prune": {"method": "how", "speedup": "how far (one of them)", "scope": "where", "round_to": "floors",
              "at": "while training", "images": "data and checks", "budget": "scope=pagcp"},
    "sparsity": {"method": "how", "schedule": "over the epochs", "threshold": "how far"},
    "distill": {"teacher": "teacher", "features": "losses", "schedule": "over the epochs",
                "alpha": "beside the task's own loss", "every": "cost of the teacher"},
    "quant": {"mode": "how", "calib": "calibration", "exclude": "layers", "bn": "better PTQ", "max_drop": "budget",
              "epochs": "QAT"},
}  # fmt: skip
FURTHER = {"native": "and also", "place": "run folder"}  # what stands for several keys
ABOUT = f"yolo-ext {__version__}: makes a trained Ultralytics YOLO smaller and faster, and proves it"
USAGE = """Usage: yolo-ext COMMAND key=value ...
All about a command: yolo-ext COMMAND --help"""
FIRST = ("demo", "compress model=best.pt data=data.yaml prune.speedup=2 epochs=30",
         "quantize model=best.pt data=data.yaml", "bench models=best.pt,best_int8.onnx")  # fmt: skip
SOURCES = """Keys of Ultralytics (batch, lr0, device ...) stand beside ours. recipe=NAME or FILE.yaml reads keys from a
file, YOLO_EXT_PRUNE__SPEEDUP=2 in the environment stands for prune.speedup=2. The command line wins over the recipe,
the recipe over the environment."""


@command("List the bundled recipes, which are keys for a purpose: recipe=NAME")
def recipes() -> None:
    """Print each bundled recipe with what it is for and a command that uses it."""
    rows = [*bundled()]
    told = _aligned([(name, about) for name, about, _ in rows])
    commands = _commands(words.removeprefix("yolo-ext ") for *_, words in rows)
    print(f"Usage: yolo-ext COMMAND recipe=NAME key=value ...\n\nRecipes:\n{told}\n\nCommands:\n{commands}")


@command("Print all options with their defaults as YAML, from which to write a recipe")
def cfg() -> None:
    """Print the options of all techniques as YAML."""
    print(default_yaml())


@command("Print the version")
def version() -> None:
    """Print the version of yolo_ext."""
    print(__version__)


@command("Check the installation")
def checks() -> dict[str, Any]:
    """Print versions and the state of the installation; return ``problems``, and whether it has ``passed``."""
    from yolo_ext import stock
    from yolo_ext.quantization.spec import resolve_profile
    from yolo_ext.stock.model import THOP

    for key, value in {**stock.cpu_info(), "profile": resolve_profile("auto").name}.items():
        LOGGER.info(f"{key:<14}{'not known' if value is None else value}")
    problems = []
    with suppress(metadata.PackageNotFoundError):
        metadata.version("thop")
        clash = "overwrites 'ultralytics-thop': FLOPs lack what attention takes, and Ultralytics may report 0.0 GFLOPs"
        problems.append(f"PyPI's 'thop' {clash}. Run: {THOP}")
    try:
        stock.check_stock()
        stock.gflops(stock.load_model("yolov8n.yaml")[0], 64)
    except YoloExtError as e:
        problems.append(str(e))
    for p in problems:
        LOGGER.error(p)
    LOGGER.info(f"{len(problems)} problems" if problems else "All checks passed. Next: yolo-ext demo")
    return {"passed": not problems, "problems": problems}


@command("Print the help of a command or technique: prune, sparsity, distill, quant", examples=("quantize", "sparsity"))
def help(topic: str | None = None) -> None:
    """Print the help for a command or technique, or the overview.

    Args:
        topic: Command or technique; the word alone will do.
    """
    print(help_text(topic))


def bundled() -> Iterator[tuple[str, str, str]]:
    """Yield name, purpose and command of each bundled recipe: the comment at its top."""
    for file in sorted((cfg_dir() / "recipes").glob("*.yaml")):
        lines = takewhile(lambda line: line.startswith("#"), file.read_text(encoding="utf-8").splitlines())
        *about, words = (line.lstrip("# ") for line in lines)
        yield file.stem, " ".join(about), words


def _lister(kind: str, *places: str) -> Callable[[], dict[str, str]]:
    """Make the public function that lists the methods of tables."""

    def listed() -> dict[str, str]:
        found: dict[str, str] = {}
        for of, lines in map(_table, places):
            for name, line in lines.items():
                text = line if len(places) == 1 else f"{of}: {line}"
                found[name] = f"{found[name]}. {text}" if name in found else text
        return found

    listed.__doc__ = f"Return the names of all {kind}, each with one line."
    return listed


list_criteria = _lister("pruning criteria, for `prune.method`", "pruning.criteria:criteria")
list_penalties = _lister("sparsity penalties, for `sparsity.method`", *TABLES["sparsity"])
list_losses = _lister("distillation losses, for `distill.logits` and `distill.features`", *TABLES["distill"][:2])
list_observers = _lister("observers, for `quant.observer` and `quant.weight_observer`", *TABLES["quant"][:2])
list_schedules = _lister("schedules", "core.schedules:removals", "core.schedules:decays")
list_profiles = _lister("quantization profiles, for `quant.profile`", "quantization.spec:ROWS")


def _table(place: str) -> tuple[str, dict[str, str]]:
    """Return what the table `module:name` is of, and for each of its methods what it does, what it needs, its paper."""
    module, _, name = place.partition(":")
    table = getattr(import_module(f"yolo_ext.{module}"), name)
    lines = {r.name: "; ".join(filter(None, [r.summary, *(n.value for n in r.needs), r.paper])) for r in table}
    return getattr(table, "kind", "quantization profile"), lines


def help_text(topic: str | None) -> str:
    """Return the help for a command or technique, or the overview."""
    if topic is None:
        return _overview()
    names = [*COMMANDS.names(), *FORWARDED]
    if topic not in names and topic not in TOPICS:
        legal = [*dict.fromkeys([*names, *TOPICS])]
        raise UsageError(f"There is no help on '{topic}'.{suggest(topic, legal)} Legal: {', '.join(legal)}.")
    parts = [command_help(topic)] if topic in names else []
    methods = topic not in ("compress", "train")  # which have all techniques: too much for one page
    parts += [technique_help(t, methods) for t in TOPICS.get(topic, ())]
    return "\n\n".join(parts) + ("" if methods else "\n\nMethods by name: yolo-ext help prune, and so on.")


def _overview() -> str:
    """Return the first page: usage, and the commands by what they are for."""
    titles = ("Compress", MEASURE, "Data", "Help", "Ultralytics")
    groups: dict[str, list[tuple[str, str]]] = {title: [] for title in titles}
    for r in COMMANDS:
        title = "Ultralytics" if r.name in STOCK else GROUPS.get(r.fn.__module__.rpartition(".")[2], MEASURE)
        groups[title].append((r.name, r.summary))
    groups["Ultralytics"] += [(name, summary) for name, (summary, *_) in FORWARDED.items()]
    left = max(map(len, [*COMMANDS.names(), *FORWARDED]))
    parts = [f"{title}:\n{_aligned(rows, left)}" for title, rows in groups.items()]
    return "\n\n".join([_filled(ABOUT), USAGE, _commands(FIRST), *parts, _filled(SOURCES)])


def command_help(name: str) -> str:
    """Return usage, purpose, keys and examples of a command."""
    summary, *examples = FORWARDED[name] if name in FORWARDED else (COMMANDS[name].summary, *COMMANDS[name].examples)
    required, others = ([], []) if name in FORWARDED else _keys(name)
    usage = [f"Usage: yolo-ext {name}", *(f"{key}=..." for key, _ in required)]
    usage += ["key=value ..."] if others or name in FORWARDED else []
    parts = [_filled(" ".join(usage)), _filled(f"{summary}.")]
    parts += [f"{title}:\n{_aligned(rows)}" for title, rows in {"Required": required, "Keys": others}.items() if rows]
    parts += [_filled(STOCK_HELP.format(name))] if name in STOCK else []
    return "\n\n".join([*parts, "Examples:\n" + _commands(f"{name} {words}" for words in examples)])


def _keys(name: str) -> tuple[list[tuple[str, str]], list[tuple[str, str]]]:
    """Return the keys that a command needs and the others, each with its help."""
    function = COMMANDS[name].fn
    about, required, others = documented(function), list[tuple[str, str]](), list[tuple[str, str]]()
    modules = {k: p for k, p in keys(function).items() if k == "modules"}
    for key, parameter in {**inspect.signature(function).parameters, **modules}.items():
        text = about.get(key) or HELP[key]
        text += f" (yolo-ext help {key})" if key in CONFIGS and key not in TOPICS.get(name, ()) else ""
        if key in needed(function) and (name, key) != ("predict", "compare"):
            required.append((key, text))
        else:
            others.append((FURTHER.get(key) or _pair(key, parameter.default), text))
    return required, others


def documented(function: Callable[..., Any]) -> dict[str, str]:
    """Return the help of each parameter: from the section `Args` of the docstring, else of a command like it."""
    section = (inspect.getdoc(function) or "").partition("Args:\n")[2].partition("\n\n")[0]
    like, found = getattr(function, "like", None), dict[str, str]()
    others = documented(like) if like else {k: HELP[k] for k in inspect.signature(function).parameters if k in HELP}
    for line in textwrap.dedent(section).splitlines():
        name, _, text = line.partition(": ") if not line.startswith(" ") else (next(reversed(found)), "", line)
        found[name] = " ".join(f"{found.get(name, '')} {text}".replace("`", "").split())
    return {**others, **{name: text.rstrip(".") for name, text in found.items()}}


def technique_help(technique: str, methods: bool = True) -> str:
    """Return the options of a technique in their groups, and its tables of methods."""
    groups: dict[str, list[tuple[str, str]]] = {}
    for key, default, text in help_lines(technique):
        title = OPTIONS[technique].get(key.partition(".")[2]) or next(reversed(groups))
        text = re.sub("[Ss]ee `yolo-ext help [a-z]+`", "see below", text) if methods else text
        groups.setdefault(title, []).append((_pair(key, default), text))
    parts = [_filled(f"{technique}.*  {CONFIGS[technique].__doc__}")]
    parts += [f"{technique}, {title}:\n{_aligned(rows)}" for title, rows in groups.items()]
    tables = map(_table, TABLES[technique] if methods else ())
    return "\n\n".join([*parts, *(f"{kind}:\n{_aligned([*lines.items()])}" for kind, lines in tables)])


def _pair(key: str, default: Any) -> str:
    """Return a key as it is given, with its default where that says something."""
    return key if default is inspect.Parameter.empty or str(default) in ("None", "[]", "{}") else f"{key}={default}"


def _width() -> int:
    """Return the columns that there are for a help."""
    return min(shutil.get_terminal_size((WIDTH, 24)).columns or WIDTH, WIDTH)


def _filled(text: str) -> str:
    """Return a paragraph in lines of the width of the terminal."""
    return textwrap.fill(text, max(_width(), 30), break_on_hyphens=False)


def _commands(given: Iterable[str]) -> str:
    """Return command lines, indented; what is too long, in several lines that a shell takes as one."""
    width = max(_width() - 4, 30)
    wrapped = [textwrap.wrap(f"yolo-ext {words}", width, subsequent_indent="    ", break_on_hyphens=False)
               for words in given]  # fmt: skip
    return "\n".join(" \\\n".join(f"  {line}" for line in lines) for lines in wrapped)


def _aligned(rows: Sequence[tuple[str, str]], least: int = 0) -> str:
    """Align names, and texts that are wrapped beside them; `least` is how many columns names have at least."""
    width = _width()
    left = max(least, min(max((len(name) for name, _ in rows), default=0), LEFT, width // 3))
    lines = []
    for name, text in rows:
        wrapped = textwrap.wrap(text, max(width - left - 4, 20), break_on_hyphens=False)
        if len(name) > left:
            lines.append(f"  {name}")
            name = ""
        lines += [f"  {head:<{left}}  {line}".rstrip() for head, line in zip([name] + [""] * len(wrapped), wrapped)]
    return "\n".join(lines)
