# Copyright (C) yolo_ext authors. AGPL-3.0 licence.
"""The commands that explain: help, recipes, cfg, version, checks; and the lists of methods for Python."""

import inspect
import re
import shutil
import textwrap
from collections.abc import Callable, Iterator
from copy import deepcopy
from importlib import import_module, metadata
from itertools import takewhile
from logging import ERROR
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from yolo_ext import __version__
from yolo_ext.commands import COMMANDS, HELP, LOGGER, command, keys, needed
from yolo_ext.core.config import CONFIGS, PruneConfig, cfg_dir, default_yaml, help_lines
from yolo_ext.core.errors import CheckFailed, UsageError
from yolo_ext.core.registry import suggest

WIDTH = 100  # most columns of a help
FORWARDED = {  # commands of Ultralytics: what they do, examples
    "val": ("Validate a model", "model=best.pt data=data.yaml", "model=int8.onnx data=data.yaml imgsz=640"),
    "track": ("Track objects in a video", "model=best.pt source=video.mp4"),
    "benchmark": ("Benchmark export formats", "model=best.pt data=data.yaml imgsz=640"),
}  # fmt: skip
STOCK = ("predict", *FORWARDED)  # whose keys Ultralytics reads; predict is ours where it compares
TOPICS = {"compress": (*CONFIGS,), "train": (*CONFIGS,), "quantize": ("quant",), **{t: (t,) for t in CONFIGS}}
TABLES = {  # of methods, by technique
    "prune": ("pruning.criteria:criteria", "core.schedules:removals"),
    "sparsity": ("sparsity.penalties:penalties",),
    "distill": ("distillation.losses:logit_losses", "distillation.losses:feature_losses", "core.schedules:decays"),
    "quant": ("quantization.observers:observers", "quantization.observers:weight_observers", "quantization.spec:ROWS"),
}
OPTIONS = {  # headings in the help of a technique, each by the first option below it
    "prune": {"method": "how", "speedup": "how far (one of them)", "scope": "where", "round_to": "floors",
              "at": "while training", "images": "data and checks"},
    "sparsity": {"method": "how", "schedule": "over the epochs", "threshold": "how far"},
    "distill": {"teacher": "teacher", "features": "losses", "schedule": "over the epochs",
                "alpha": "beside the task's own loss", "every": "cost of the teacher"},
    "quant": {"mode": "how", "calib": "calibration", "exclude": "layers", "adaround": "better PTQ",
              "max_drop": "budget", "epochs": "QAT"},
}  # fmt: skip
FURTHER = {"native": "and also", "place": "run folder"}  # what stands for several keys


@command("List the bundled recipes, which are keys for a purpose: recipe=NAME")
def recipes() -> None:
    """Print each bundled recipe with what it is for and a command that uses it."""
    rows = [*bundled()]
    words = [words.removeprefix("yolo-ext ") for *_, words in rows]
    print(_page(recipes=[(name, about) for name, about, _ in rows], words=words))


@command("Print all options with their defaults as YAML, from which to write a recipe")
def cfg() -> None:
    """Print the options of all techniques as YAML."""
    print(default_yaml())


@command("Print the version")
def version() -> None:
    """Print the version of yolo_ext."""
    print(__version__)


@command("Check the installation: versions, and each step of a compression on a small model")
def checks() -> dict[str, Any]:
    """Print versions with those supported, and try each step; return ``problems``, and whether it has ``passed``."""
    from ultralytics.utils.checks import check_version

    from yolo_ext import stock
    from yolo_ext.quantization.spec import resolve_profile
    from yolo_ext.stock.model import THOP

    there = {str(d.name).lower(): d for d in reversed([*metadata.distributions()])}  # the first one found counts
    own = there.get("yolo-ext")  # None in a clone that is not installed
    needs = [f"python{own.metadata['Requires-Python']}", *(own.requires or [])] if own else []
    legal = {found[1]: found[2] for need in needs if (found := re.fullmatch(r"([\w-]+)([<>=.,\d]+)", need))}
    profile, problems = resolve_profile("auto"), list[str]()
    have = {**{k: there[k].version for k in legal if k in there}, **stock.cpu_info(), "profile": profile.name}
    for key, value in have.items():
        LOGGER.info(f"{key:<18}{'not known' if value is None else value!s:<14}{legal.get(key, '')}".rstrip())
        if key in legal and not check_version(value, legal[key]):
            problems.append(f"{key} {value} is not supported. Legal: {legal[key]}")
    if "thop" in there:
        clash = "overwrites 'ultralytics-thop': FLOPs lack what attention takes, and Ultralytics may report 0.0 GFLOPs"
        problems.append(f"PyPI's 'thop' {clash}. Run: {THOP}")
    with TemporaryDirectory() as folder:
        steps = _steps(Path(folder) / "model.onnx", profile)
        for name in ("build", "trace", "prune", "fake-quant", "export", "INT8"):
            try:
                with stock.quiet(ERROR):
                    done = next(steps, "not tried")
            except Exception as e:  # whatever another version of a library raises
                done = f"failed ({str(e) or type(e).__name__})"
                problems.append(f"{name} {done}")
            LOGGER.info(f"{name:<18}{done}")
    told = [*problems, f"{len(problems)} problems"] if problems else ["All checks passed. Next: yolo-ext demo"]
    LOGGER.info("\n".join(told))
    return {"passed": not problems, "problems": problems}


def _steps(onnx: Path, profile: Any) -> Iterator[str]:
    """Take a small model through what `compress` stands on, and yield after each step what came of it."""
    import torch

    from yolo_ext import pruning, stock
    from yolo_ext.deployment import export, runtime
    from yolo_ext.quantization import calibrate, fake_quant, qdq

    net = stock.load_model(cfg_dir() / "models" / "yolov8n-shapes.yaml")[0]
    yield f"ok, {stock.gflops(net, 64):.3f} GFLOPs"
    yield f"ok, {len(pruning.build_graph(net).groups)} groups of channels"
    net = pruning.prune_model(net, PruneConfig(method="l1", ratio=0.3), 64)
    yield f"ok, {stock.gflops(net, 64):.3f} GFLOPs"
    fake_quant.insert_fake_quant(simulated := deepcopy(net), profile)
    yield f"ok, {len(state := calibrate.calibrate(simulated, [torch.rand(2, 3, 64, 64)]))} layers"
    yield f"ok, {export.export_onnx(net, onnx, 64).stat().st_size / 1e6:.1f} MB"
    qdq.write_qdq(onnx, onnx, state, profile)
    if not (counts := runtime.conv_report(onnx))["int8_convs"]:
        raise CheckFailed("ONNX Runtime runs no convolution in integers")
    yield f"ok, {counts['int8_convs']} of {counts['convs']} convolutions in integers"


@command("Print the help of a command or technique: prune, sparsity, distill, quant")
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
        found: dict[str, list[str]] = {}
        for of, lines in map(_table, places):
            for name, line in lines.items():
                found.setdefault(name, []).append(line if len(places) == 1 else f"{of}: {line}")
        return {name: ". ".join(lines) for name, lines in found.items()}

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
    """Return the help for a command or technique, or the first page: the commands by what they are for."""
    if topic is None:
        modules: dict[str, list[tuple[str, str]]] = {}
        for r in COMMANDS:
            module = "stock" if r.name in STOCK else r.fn.__module__.rpartition(".")[2]
            modules.setdefault(module, []).append((r.name, r.summary))
        modules["stock"] += [(name, FORWARDED[name][0]) for name in FORWARDED]
        return _page(modules=modules, version=__version__)
    names = [*COMMANDS.names(), *FORWARDED]
    legal = [*dict.fromkeys([*names, *TOPICS])]
    if topic not in legal:
        raise UsageError(f"There is no help on '{topic}'.{suggest(topic, legal)} Legal: {', '.join(legal)}.")
    brief = topic in ("compress", "train")  # which have all techniques: too much for one page
    techniques = {t: _technique(t, brief) for t in TOPICS.get(topic, ())}
    return _page(**(_command(topic) if topic in names else {}), techniques=techniques, brief=brief)


def _page(**shown: Any) -> str:
    """Return what the template of help shows, in lines of the width of the terminal."""
    from jinja2 import Environment, FileSystemLoader

    width = min(shutil.get_terminal_size((WIDTH, 24)).columns or WIDTH, WIDTH)
    folder = Path(__file__).parents[1] / "reporting" / "templates"
    environment = Environment(loader=FileSystemLoader(folder), trim_blocks=True, lstrip_blocks=True)  # nosec B701  # text
    return environment.get_template("help.txt.j2").render(width=width, **shown).strip()


def _command(name: str) -> dict[str, Any]:
    """Return usage, purpose, keys and examples of a command."""
    summary, *examples = FORWARDED[name] if name in FORWARDED else (COMMANDS[name].summary, *COMMANDS[name].examples)
    required, others = ([], []) if name in FORWARDED else _keys(name)
    usage = [*(f"{key}=..." for key, _ in required), *(["key=value ..."] if others or name in FORWARDED else [])]
    keys = {"Required": required, "Keys": others}
    shown = {"name": name, "summary": summary, "usage": usage, "keys": keys, "stock": name in STOCK}
    return {**shown, "examples": [f"{name} {words}" for words in examples]}


def _keys(name: str) -> tuple[list[tuple[str, str]], list[tuple[str, str]]]:
    """Return the keys that a command needs and the others, each with its help."""
    function = COMMANDS[name].fn
    about, required, others = documented(function), list[tuple[str, str]](), list[tuple[str, str]]()
    central = {k: p for k, p in keys(function).items() if k in ("modules", "trust")}
    for key, parameter in {**inspect.signature(function).parameters, **central}.items():
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


def _technique(technique: str, brief: bool) -> tuple[str, dict[str, Any], dict[str, Any]]:
    """Return what a technique is, its options below their headings, and its tables of methods unless in brief."""
    options: dict[str, list[tuple[str, str]]] = {}
    for key, default, text in help_lines(technique):
        title = OPTIONS[technique].get(key.partition(".")[2]) or next(reversed(options))
        text = text if brief else re.sub("[Ss]ee `yolo-ext help [a-z]+`", "see below", text)
        options.setdefault(title, []).append((_pair(key, default), text))
    methods = {kind: [*lines.items()] for kind, lines in map(_table, () if brief else TABLES[technique])}
    return str(CONFIGS[technique].__doc__), options, methods


def _pair(key: str, default: Any) -> str:
    """Return a key as it is given, with its default where that says something."""
    return key if default is inspect.Parameter.empty or str(default) in ("None", "[]", "{}") else f"{key}={default}"
