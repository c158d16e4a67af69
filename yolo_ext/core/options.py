# Copyright (C) yolo_ext authors. AGPL-3.0 licence.
"""Options of yolo_ext, declared: one frozen dataclass for each technique, checked by itself; `config` reads several."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import Field, dataclass, field, fields
from functools import wraps
from pathlib import Path
from typing import Any, TypeVar

from yolo_ext.core.errors import UsageError, refused
from yolo_ext.core.plain_yaml import plain_yaml
from yolo_ext.core.registry import suggest

T = TypeVar("T", bound=type)
Stack = str | list[Any]  # a method, or several: names, or dicts with a name and options
Entries = list[Any]  # dicts that each say something of some layers; a YAML or JSON file with them is read at once


def option(default: Any, help: str, **limits: Any) -> Any:
    """Declare one option: default, help, and `choices`, `low`/`high` (inclusive), `above`/`below` (exclusive), `only`
    with another option (`kind=structured`) or, `stages=True`, only in commands with stages."""
    mutable = isinstance(default, (list, dict))
    how: dict[str, Any] = {"default_factory": lambda: type(default)(default)} if mutable else {"default": default}
    return field(metadata={"help": help, **limits}, **how)


def checked(technique: str) -> Callable[[T], T]:
    """Have a dataclass refuse unknown names and illegal values when one is made, in the words of the command line."""

    def add(cls: T) -> T:
        init, names = vars(cls)["__init__"], [f.name for f in fields(cls)]

        @wraps(init)
        def read_first(self: Any, *args: Any, **given: Any) -> None:
            values, problems = read_options(technique, {**dict(zip(names, args)), **given})
            refuse(problems)
            init(self, **values)

        setattr(cls, "__init__", read_first)  # noqa: B010  mypy would ask whose it is
        return cls

    return add


@checked("prune")
@dataclass(frozen=True)
class PruneConfig:
    """Pruning: channels (structured) or single weights (unstructured, 2:4)."""

    method: str = option("auto", "Criterion: auto is taylor with train images, else lamp; or tp:LAMPImportance and "
                         "others of torch-pruning, or package.module:name", only="kind=structured")  # fmt: skip
    kind: str = option("structured", "Remove channels, or zero single weights, which saves no time on today's runtimes",
                       choices=("structured", "unstructured", "2:4"))  # fmt: skip
    pruner: str | None = option(None, "A torch-pruning pruner instead: package.module:function", only="kind=structured")
    speedup: float | None = option(None, "Target: FLOPs before / FLOPs after, such as 2", above=1.0)
    params: float | None = option(None, "Target: parameters before / parameters after, such as 3", above=1.0)
    latency: float | None = option(None, "Target: measured latency before / after, such as 1.5", above=1.0)
    runtime: str = option("ort", "What measures prune.latency, one thread", choices=("ort", "torch"), only="latency")
    size_mb: float | None = option(None, "Target: size of the .pt in MB", above=0.0)
    max_drop: float | None = option(None, "Target: no metric drops by more; beside another one, a check", above=0.0)
    ratio: float | None = option(None, "Target: share of channels (of weights) to remove", low=0.0, below=1.0)
    scope: str = option(
        "global", "Rank channels over the model, by layer or among layers of one structure",
        choices=("global", "local", "isomorphic"), only="kind=structured/unstructured")  # fmt: skip
    include: list[str] = option([], "Prune only these: layer index, name, type, backbone/neck/head, expression, re:")
    exclude: list[str] = option([], "Keep these whole: layer index, name, type, backbone/neck/head, expression, re:")
    ratios: dict[str, float] = option({}, "Share of channels to remove from these layers, such as {'model.9.cv2': 0.5}",
                                      only="kind=structured")  # fmt: skip
    sensitivity: str | None = option(None, "File of `yolo-ext sensitivity`, to spare layers", only="kind=structured")
    round_to: int = option(8, "Round kept channels to the nearest multiple of this", low=1, only="kind=structured")
    min_channels: int = option(8, "Floor: never fewer channels than this in a group", low=1, only="kind=structured")
    max_ratio: float = option(0.8, "Floor: largest share of a group to go", low=0.0, below=1.0, only="kind=structured")
    at: list[int] = option([], "While training: prune at the start of these epochs, counted from 0, such as [5,10,15]")
    every: int | None = option(None, "While training: prune every so many epochs", low=1)
    start: int | None = option(None, "While training: first epoch that prunes (0)", low=0)
    end: int | None = option(None, "While training: last epoch that may prune (half of the epochs)", low=0)
    steps: int | None = option(None, "While training: largest number of prunings", low=1)
    schedule: str = option("cubic", "While training: how the target grows by step", choices=("cubic", "linear"),
                           only="at or every or steps")  # fmt: skip
    images: int = option(128, "Train images for criteria, budgets and trials with data", low=1, only="kind=structured")
    recalibrate: int = option(128, "Train images used to re-estimate BatchNorm after pruning; 0 switches it off", low=0,
                              only="kind=structured/2:4")  # fmt: skip
    force: bool = option(False, "Prune by a sparsity criterion though no sparsity training ran", only="kind=structured")
    compare: bool = option(False, "Report a random-criterion baseline of the same FLOPs and training too",
                           only="kind=structured", stages=True)  # fmt: skip
    seed: int = option(0, "Seed of the random criterion and of the images", low=0, only="kind=structured/2:4")


TARGETS = ("speedup", "params", "latency", "size_mb", "ratio", "max_drop")  # of pruning; the last may limit another


@checked("sparsity")
@dataclass(frozen=True)
class SparsityConfig:
    """Sparsity training: scale factors or weights of channels that the loss does not defend go to zero."""

    method: str = option("slim", "Penalty: see `yolo-ext help sparsity`, or your own as package.module:function")
    coefficient: float | None = option(None, "Pull towards zero, summed over the run; None: the method's", above=0.0)
    adaptive: bool = option(True, "Pull less where the loss is more sensitive to a scale (root mean square gradient)")
    schedule: str = option("constant", "Pull over the epochs", choices=("constant", "linear", "cosine"))
    final: float = option(0.1, "Share of the pull left at the end", low=0.0, high=1.0, only="schedule=linear/cosine")
    start: int = option(0, "First epoch with a pull, counted from 0", low=0)
    end: int | None = option(None, "First epoch without a pull; None pulls to the end or to the first pruning", low=1)
    warmup: int = option(1, "Epochs over which the pull rises", low=0)
    epochs: int = option(15, "Epochs of the sparsify stage of `yolo-ext compress` and `prune`", low=1, stages=True)
    threshold: float = option(0.01, "Channels below this (of the largest of their group) count as gone", above=0.0)
    auto: bool = option(False, "Raise the pull until `target` is reached or mAP drops by `max_drop`, then lower it")
    target: float = option(0.5, "Share of channels to bring below the threshold", above=0.0, below=1.0, only="auto")
    max_drop: float = option(0.05, "Largest drop of the fitness that `auto` allows", above=0.0, only="auto")
    protect: float = option(0.1, "Strongest share of each group, at least 8, that never goes", low=0.0, high=1.0)


@checked("distill")
@dataclass(frozen=True)
class DistillConfig:
    """Knowledge distillation."""

    teacher: str | list[str] = option(
        "self", "Teacher .pt, or several; 'self': model before pruning or quantization, 'ema': the student's average",
    )  # fmt: skip
    features: Stack | None = option("cwd", "Feature loss: name, or list of names and {name, weight, layers, ...}")
    logits: Stack | None = option(
        "auto", "Loss on the outputs of the head, as for features; auto: kl_binary and ld, or bckd where bins differ"
    )
    feature_weight: float = option(1.0, "Weight of the feature losses", low=0.0, only="features")
    logit_weight: float = option(1.0, "Weight of the logit losses", low=0.0, only="logits")
    layers: list[str] = option([], "Feature maps: neck (default), backbone, index, name; 'student:teacher' if unlike")
    schedule: str = option("cosine", "Weight over the epochs", choices=("constant", "linear", "cosine"))
    final: float = option(0.1, "Share of the weight that is left at the last epoch (linear, cosine)", low=0.0, high=1.0)
    start: int = option(0, "First epoch with distillation, counted from 0", low=0)
    end: int | None = option(None, "First epoch without distillation; None is the end of the run", low=1)
    warmup: int = option(0, "Epochs over which the weight rises", low=0)
    mosaic: str = option("keep", "Distillation after mosaic is switched off (close_mosaic)", choices=("keep", "stop"))
    alpha: float = option(1.0, "Weight of the task's own loss (hard targets)", low=0.0)
    beta: float = option(1.0, "Weight of all distillation losses together (soft targets)", low=0.0)
    balance: str = option("fixed", "fixed: as given; auto: keep `share` of the task loss", choices=("fixed", "auto"))
    share: float = option(0.3, "Distillation loss / task loss, times the schedule", above=0.0, only="balance=auto")
    every: int = option(1, "Ask the teacher in every so many batches, with a weight as many times higher", low=1)
    imgsz: int | None = option(None, "Longer side in pixels of the teacher's images; None: as they are", low=32)
    half: bool | None = option(None, "Teacher in bfloat16 on a CPU; None: where it computes in it. On a GPU: float16")
    preflight: bool = option(True, "Measure teacher and student on the val split, and time a step, before training")


@checked("quant")
@dataclass(frozen=True)
class QuantConfig:
    """INT8 quantization."""

    mode: str = option("auto", "auto: PTQ, then QAT if PTQ misses the budget", choices=("auto", "ptq", "qat"))
    profile: str = option("auto", "What runs the model; auto looks at this CPU. See `yolo-ext help quantize`")
    calib: int | None = option(None, "Calibration images; None takes up to 300 of the train split", low=1)
    source: str | list[str] | None = option(None, "Folder, list or glob of calibration images; None: the train split")
    seed: int = option(0, "Seed of the choice of calibration images", low=0)
    observer: str = option("mse", "How activation ranges are found; see `yolo-ext help quantize`")
    weight_observer: str = option("max", "How weight ranges are found; see `yolo-ext help quantize`")
    exclude: list[str] = option([], "Layers that stay float: as for prune.exclude")
    config_list: Entries = option(
        [], "Only these are quantized, and how: NNI-style entries (op_types, op_names, quant_bits, ...), or a file"
    )
    adaround: int = option(0, "PTQ: steps per block that learn the rounding of the weights (AdaRound); 0 is off", low=0)
    max_drop: float = option(0.01, "Budget: loss of any metric by INT8 against its float self", low=0.0, stages=True)
    mixed: bool = option(True, "Keep the fewest layers float that bring PTQ within `max_drop`, before QAT is tried",
                         only="mode=auto/ptq", stages=True)  # fmt: skip
    strict: bool = option(False, "Fail when a convolution that should be INT8 is not, or mAP collapses", stages=True)
    epochs: int = option(10, "QAT epochs", low=1, only="mode=auto/qat", stages=True)
    lr0: float = option(5e-5, "QAT learning rate (AdamW)", above=0.0, only="mode=auto/qat")
    observe_epochs: int = option(0, "QAT epochs in which activation ranges still move", low=0, only="mode=auto/qat")
    freeze_bn: float = option(0.0, "Share of QAT epochs after which the statistics of BatchNorm freeze", low=0.0,
                              high=1.0, only="mode=auto/qat")  # fmt: skip
    supervision: str = option(
        "auto", "QAT learns from labels, or features of its float self; auto: from features unless distill.* is given",
        choices=("auto", "labels", "features"), only="mode=auto/qat")  # fmt: skip


CONFIGS: dict[str, Any] = dict(sparsity=SparsityConfig, prune=PruneConfig, distill=DistillConfig, quant=QuantConfig)
# Options that are gone: values with which a run that was saved goes on, the default first, and what to do instead.
PAGCP = "prune.scope=pagcp went, as the default criterion is as good without its trials. Leave it out"
RETIRED: dict[str, tuple[tuple[Any, ...], str]] = {
    "quant.learned": ((False,), "ranges that QAT learned were no better. Leave it out"),
    "quant.cache": ((True, False), "every run calibrates. Leave it out"),
    "quant.bn": ((False, True), "quant.adaround=200 does better"),
    "quant.bias_correction": ((False, True), "quant.adaround=200 does better"),
    "sparsity.mode": (("proximal",), "channels shrink after each step, to exact zeros. Leave it out"),
    "distill.temperature": ((None,), "each loss takes its own, such as distill.features=[{name: cwd, temperature: 2}]"),
    "prune.budget": ((0.05,), PAGCP),
    "prune.total_budget": ((5.0,), PAGCP),
    "prune.topk": ((0.8,), PAGCP),
    "distill.compile": ((False, True), "it did not pay. Leave it out"),
}


# Reading --------------------------------------------------------------------------------------------------------------
def number(value: Any) -> bool:
    """Tell whether a value is a finite number."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < 1e300


def finite(value: Any) -> bool:
    """Tell whether all numbers in a value are finite, and whole ones fit into 32 bits, in lists and dicts, too."""
    if isinstance(value, (list, tuple, Mapping)):
        return all(map(finite, value.values() if isinstance(value, Mapping) else value))
    return not isinstance(value, (int, float)) or abs(value) < (2**32 if isinstance(value, int) else math.inf)


def listed(value: Any) -> list[Any]:
    """Return the items of a list, or a single value as one."""
    return list(value) if isinstance(value, (list, tuple)) else [value]


def _strings(value: Any) -> bool:
    """Tell whether a value is one or several strings; layer indices are as good."""
    return all(isinstance(n, (str, int)) and not isinstance(n, bool) for n in listed(value))


# By type of an option: what fits, how it is read, and what is said if it does not fit.
FORMS: dict[str, tuple[Callable[[Any], bool], Callable[[Any], Any], str]] = {
    "bool": (lambda v: isinstance(v, bool), bool, ". Legal: True, False."),
    "str": (lambda v: isinstance(v, str), str, ": give a string ({help})."),
    "int": (lambda v: number(v) and v == int(v) and abs(v) < 2**31, int, ": give a whole number ({help})."),
    "float": (number, float, ": give a number ({help})."),
    "list[int]": (lambda v: all(isinstance(n, int) and not isinstance(n, bool) and n >= 0 for n in listed(v)), listed,
                  ": give a list of whole numbers ({help})."),
    "list[str]": (_strings, lambda v: [str(n) for n in listed(v)], ": give a list of strings."),
    "str | list[str]": (lambda v: isinstance(v, str) or (isinstance(v, (list, tuple)) and _strings(v)),
                        lambda v: v if isinstance(v, str) else [str(n) for n in v],
                        ": give a string or a list of strings ({help})."),
    "dict[str, float]": (lambda v: isinstance(v, Mapping) and all(number(n) and 0 <= n < 1 for n in v.values()),
                         lambda v: {str(k): float(n) for k, n in v.items()},
                         ": give shares of 0 to below 1 by name ({help})."),
    "Stack": (lambda v: bool(listed(v)) and all(isinstance(n.get("name") if isinstance(n, Mapping) else n, str)
                                                 for n in listed(v)),  # names are looked up where the methods are
              lambda v: [dict(n) if isinstance(n, Mapping) else n for n in v] if isinstance(v, (list, tuple)) else v,
              ": give a name, or a list of names and dicts such as {{name: cwd, weight: 0.5}}."),
}  # fmt: skip
BOUNDS: dict[str, tuple[str, Callable[[float, float], bool]]] = {
    "low": ("at least", operator.ge), "above": ("above", operator.gt),
    "high": ("at most", operator.le), "below": ("below", operator.lt),
}  # fmt: skip


def _read(key: str, f: Field[Any], value: Any) -> Any:
    """Return the value of an option in its type; the error says what is wrong with it."""
    kind, optional, _ = str(f.type).partition(" | None")
    m = f.metadata
    if value is None and optional:
        return None
    if value is None:
        raise UsageError(f"'{key}=None' is illegal: a value is needed ({m['help']}).")
    if not finite(value):
        raise UsageError(f"'{key}={value}' is illegal: give finite numbers ({m['help']}).")
    if kind == "Entries":
        return _entries(key, value)
    fits, cast, words = FORMS[kind]
    if not fits(value):
        raise UsageError(f"'{key}={value}' is illegal{words.format(help=m['help'])}")
    if value not in m.get("choices", (value,)):
        near = suggest(value, list(m["choices"]))
        raise UsageError(f"'{key}={value}' is illegal.{near} Legal: {', '.join(m['choices'])}.")
    if not all(holds(value, m[name]) for name, (_, holds) in BOUNDS.items() if name in m):
        legal = " and ".join(f"{text} {m[name]}" for name, (text, _) in BOUNDS.items() if name in m)
        raise UsageError(f"'{key}={value}' is out of range. Legal: {legal}.")
    return cast(value)


def _entries(key: str, value: Any) -> list[dict[str, Any]]:
    """Return dicts as they are given or lie in a file; what they say is looked up where the model is."""
    hint = "a list of dicts such as [{'op_types': ['Conv2d'], 'quant_bits': 4}], or a YAML or JSON file with one"
    wrong = f"'{key}={value}' is illegal:"
    absent = refused(f"{wrong} there is no file of this name. Give {hint}.", OSError)
    with refused(f"{wrong} the file is not valid YAML or JSON ({{why}}). Give {hint}."), absent:
        items = plain_yaml(Path(value).read_text()) if isinstance(value, str) else value
    items = items.get("config_list", [items]) if isinstance(items, Mapping) else items
    if not isinstance(items, (list, tuple)) or not all(isinstance(v, Mapping) for v in items):
        raise UsageError(f"{wrong} give {hint}.")
    return [dict(v) for v in items]


def read_options(technique: str, given: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Return the legal ones of some options, each in its type, and what is wrong with the others."""
    known, values, problems = {f.name: f for f in fields(CONFIGS[technique])}, {}, []
    for name, value in given.items():
        if name in known:
            try:
                values[name] = _read(f"{technique}.{name}", known[name], value)
            except UsageError as e:
                problems.append(str(e))
    return values, problems + misspelt(technique, given)


def refuse(problems: Sequence[str]) -> None:
    """Raise one error that lists all problems with options, if there are any."""
    if problems:
        more = "" if len(problems) == 1 else f"{len(problems)} problems with the options:\n  "
        raise UsageError(more + "\n  ".join(problems) + " See `yolo-ext help` for all options.")


def misspelt(technique: str, given: Mapping[str, Any]) -> list[str]:
    """Say which names of options there are not, with the nearest of all techniques, or what to do without."""
    legal, problems = option_names(), []
    for key, value in {f"{technique}.{name}": value for name, value in given.items()}.items():
        if key in RETIRED:
            values, instead = RETIRED[key]
            problems += [f"'{key}={value}' is gone: {instead}."] if value != values[0] else []
        elif key not in legal:
            problems.append(f"Unknown option '{key}'.{suggest(key, legal)}")
    return problems


def lasting(saved: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options of a saved run by technique, without those that are gone and change nothing any more."""
    gone = {key: values for key, (values, _) in RETIRED.items()}
    return {t: cfg and {k: v for k, v in cfg.items() if v not in gone.get(f"{t}.{k}", ())} for t, cfg in saved.items()}


def option_names() -> list[str]:
    """Return the dotted keys of all techniques."""
    return [f"{technique}.{f.name}" for technique, cls in CONFIGS.items() for f in fields(cls)]
