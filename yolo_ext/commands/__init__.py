# Copyright (C) yolo_ext authors. AGPL-3.0 licence.
"""The commands: one typed function each. Its signature gives the keys, the section `Args` of its docstring their help.

Modules of commands import nothing heavy at the top: the command line reads them all to know what there is.
"""

import functools
import inspect
import typing
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import UnionType
from typing import TYPE_CHECKING, Annotated, Any, Literal, ParamSpec

from yolo_ext.core.config import CONFIGS, comma_list, misspelt, option_names
from yolo_ext.core.errors import UsageError
from yolo_ext.core.log import LOGGER, log_folder, logged
from yolo_ext.core.registry import Table, suggest

if TYPE_CHECKING:
    from yolo_ext.reporting.result import Result

P = ParamSpec("P")
COMMANDS = Table("command")
EXAMPLES = Path(__file__).with_name("examples.txt").read_text(encoding="utf-8").splitlines()  # of all commands
OPTIMIZERS = ("auto", "SGD", "MuSGD", "Adam", "AdamW", "Adamax", "NAdam", "RAdam", "RMSProp")
MODELS = ("model", "models", "other", "compare", "distill")  # keys that take a YOLO where others take a path
PLACE = ("project", "name", "exist_ok", "save_dir")  # what `**place` and `**native` of a command stand for
# Keys of Ultralytics: prediction and no training reads them, both read them, only exports do, nothing does.
PREDICTS = ("source", "vid_stride", "stream_buffer", "retina_masks", "show", "save_frames", "save_crop", "show_boxes",
            "line_width")  # fmt: skip
BOTH = ("agnostic_nms", "augment", "batch", "cfg", "channels_last", "classes", "compile", "conf", "data", "device",
        "dnn", "half", "imgsz", "iou", "max_det", "model", "nms", "quantize", "rect", "save", "save_conf", "save_txt",
        "show_conf", "show_labels", "task", "verbose", "visualize")  # fmt: skip
EXPORTS = ("format", "optimize", "dynamic", "simplify", "opset", "workspace")
NEITHER = ("mode", "tracker", "embed")
HELP = {  # of keys that a command does not explain itself
    "imgsz": "Side of the square input in pixels; that of the training by default",
    "device": "Device as Ultralytics takes it, such as cpu, 0 or 0,1; a GPU where there is one by default",
    "quant": "Options of quantization",
    "contract": "Limits by figure, such as contract.recall.person=-0.02, or a YAML file of them; by default no class "
    "may surely lose more than 0.05 of its recall or mAP50-95 (top-1), and the model no more than 0.02",
    "confidence": "Hold budgets and limits with this confidence, such as 0.95; by the measured change by default",
    "resume": "Go on with a stopped run: its folder, or True with its name; its options need not be given",
    "modules": "Python modules whose layers the model or its YAML names, such as mypkg.layers",
    "place": f"{', '.join(PLACE)} for the run folder",
    "native": f"{', '.join(PLACE)} for the run folder, and any training argument of Ultralytics",
}

# Types of keys. A number behind `int` is the least legal one.
Count = Annotated[int, 1]
Natural = Annotated[int, 0]
Share = Annotated[float, "0 to 1"]
Weights = str | Path | Any  # a path, a YOLO, or the module of one, which stand for their file
Resume = bool | str | Path  # True or the folder of a run
Technique = Any  # options as a dict or a dataclass, True for the defaults, None or False for off


def command(
    summary: str, *, like: Callable[..., Any] | None = None
) -> Callable[[Callable[P, Any]], Callable[P, "Result"]]:
    """Have a function, with keys as `like`, check keys and values, take models as files, and return a `Result`."""

    def add(fn: Callable[P, Any]) -> Callable[P, "Result"]:
        call: Callable[..., Any] = fn

        @functools.wraps(fn)
        def checked(*args: P.args, **options: P.kwargs) -> Any:
            with logged():
                found = call(**_given(fn, args, options))
                if found is None:  # what only prints
                    return found
                from yolo_ext.reporting.result import Result

                return Result({"run_dir": log_folder(), **found})

        signature = inspect.signature(fn).replace(return_annotation="Result")
        checked.__dict__.update(like=like, __signature__=signature)
        examples = [words for name, _, words in (line.partition(" ") for line in EXAMPLES) if name == fn.__name__]
        return COMMANDS.row(fn.__name__, summary, examples=examples or [""])(checked)

    return add


def _given(fn: Callable[..., Any], args: Sequence[Any], options: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a function is called with, by key, models as files; those of a run that is gone on with are added."""
    name, signature = fn.__name__, inspect.signature(fn)
    check_keys(name, options)
    signature.bind_partial(*args, **{k: v for k, v in options.items() if k in signature.parameters})  # Python's errors
    given = {**dict(zip(signature.parameters, args)), **options}
    given = {k: _as_files(v) if k in MODELS else v for k, v in given.items()}
    if given.get("resume"):
        from yolo_ext.runs import resumed

        given = resumed(name, given)
    if modules := given.pop("modules", None):
        from yolo_ext import stock

        stock.register_layers(modules)
        if "epochs" in signature.parameters:  # a training hands them on to its processes
            given["modules"] = modules
    need(name, given, *needed(fn))
    if given.get("device") is not None:
        from yolo_ext import stock

        stock.device_of(given["device"])
    kinds = typing.get_type_hints(fn, include_extras=True)
    for key, value in given.items():
        if value is not None and (legal := _legal(kinds.get(key, Any), value)):
            raise UsageError(f"'{key}={value}' is illegal{legal}")
    return given


def _as_files(given: Any) -> Any:
    """Return a value with each YOLO in it, or module of one, as its file: alone, in a list or among the options."""
    if isinstance(given, Mapping):
        return {k: _as_files(v) for k, v in given.items()}
    if isinstance(given, (list, tuple)):
        return [*map(_as_files, given)]
    if not callable(given):
        return given
    from yolo_ext.checkpoint import file_of

    return str(file_of(given))


def check_keys(command: str, options: Mapping[str, Any]) -> None:
    """Refuse keys that a command does not know, all in one message."""
    fn, native = COMMANDS[command].fn, list[str]()
    own = [*keys(fn)]
    if takes_native(fn):
        from ultralytics.utils import DEFAULT_CFG_DICT

        native = [*DEFAULT_CFG_DICT]
    if unknown := [k for k in options if k not in own + native]:
        near = own + [k for k in native if k != "mode"] + [n for n in option_names() if n.split(".")[0] in own]
        lines = [f"Unknown key '{k}' for '{command}'.{suggest(k, near)}" for k in unknown]
        for technique in (t for t in CONFIGS if t in own and isinstance(options.get(t), Mapping)):
            lines += misspelt(technique, options[technique])
        told = f" Legal: {', '.join(own)}" + (" and all Ultralytics keys." if native else ".") if own else ""
        raise UsageError("\n".join(lines) + told + f"\nSee `yolo-ext help {command}`.")


def keys(fn: Callable[..., Any]) -> dict[str, inspect.Parameter]:
    """Return the parameters of a command by key, those of the run folder one by one."""
    found = dict(inspect.signature(fn).parameters)
    more = ["modules"] if {"model", "models"} & {*found} else []
    more += PLACE if found.pop("native" if takes_native(fn) else "place", None) else []
    return found | {k: inspect.Parameter(k, inspect.Parameter.KEYWORD_ONLY, default=None) for k in more}


def takes_native(fn: Callable[..., Any]) -> bool:
    """Tell whether a command takes all keys of Ultralytics."""
    return "native" in inspect.signature(fn).parameters


def needed(fn: Callable[..., Any]) -> list[str]:
    """Return the keys that a command cannot do without."""
    return [k for k, p in keys(fn).items() if p.default is inspect.Parameter.empty]


def need(command: str, options: Mapping[str, Any], *names: str) -> None:
    """Check that the user gave these keys to a command."""
    if missing := [f"{k}=..." for k in names if options.get(k) in (None, "")]:
        example = f"yolo-ext {command} {COMMANDS[command].examples[0]}"
        raise UsageError(f"Missing: {', '.join(missing)}\nExample: {example}\nSee `yolo-ext help {command}`.")


def _legal(kind: Any, value: Any) -> str:
    """Return what is legal for a type, in words, where a value does not fit it; an empty string where it does."""
    origin, args, fits, words = typing.get_origin(kind), typing.get_args(kind), True, ""
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if origin in (typing.Union, UnionType):
        found = [_legal(k, value) for k in args if k is not type(None)]
        fits, words = "" in found, found[0]
    elif kind is bool:
        fits, words = isinstance(value, bool), ". Legal: True or False."
    elif origin is Literal:
        fits, words = value in args, f".{suggest(value, [*args])} Legal: {', '.join(args)}."
    elif kind == Share:
        fits, words = number and 0 <= value <= 1, ". Legal: a number from 0 to 1."
    elif origin is Annotated:
        fits = number and isinstance(value, int) and value >= args[1]
        words = f": give a whole number of at least {args[1]}."
    return "" if fits else words


def numbers(key: str, given: Any, kind: Callable[[str], Any], legal: Callable[[Any], bool], hint: str) -> list[Any]:
    """Read one or several numbers; `hint` says what to give where there is none, or one is not legal."""
    try:
        found = comma_list(given, kind)
    except ValueError:
        found = []
    if not found or not all(map(legal, found)):
        raise UsageError(f"'{key}={given}' is illegal. Give {hint}.")
    return found


def refuse_unread(command: str, native: Mapping[str, Any], unread: Callable[[str], bool]) -> None:
    """Refuse keys of Ultralytics that a command does not read; those that have their default do no harm."""
    from ultralytics.utils import DEFAULT_CFG_DICT

    if found := [k for k, v in native.items() if unread(k) and v != DEFAULT_CFG_DICT.get(k)]:
        raise UsageError(f"'{command}' does not read {', '.join(found)} of Ultralytics. Leave it out.")


def tell_idle(keys: Sequence[Any]) -> None:
    """Warn of keys without an effect, once for all; what is no text names none."""
    if idle := [k for k in keys if isinstance(k, str) and k]:
        LOGGER.warning(f"Without effect here: {', '.join(idle)}")


def check_native(command: str, model: Any, native: dict[str, Any], also: Sequence[str] = ()) -> None:
    """Refuse keys of Ultralytics that no training and not the command `also` reads; a right task word is taken out."""
    from yolo_ext import stock
    from yolo_ext.stock.context import get_cfg

    refuse_unread(command, native, lambda key: key in {*PREDICTS, *EXPORTS, *NEITHER} - {*also})
    task = native.pop("task", None)
    try:
        get_cfg(overrides={k: v for k, v in native.items() if k != "modules"})
    except (SyntaxError, TypeError, ValueError) as e:
        raise UsageError(str(e).strip().splitlines()[0]) from e
    if native.get("cfg") and not Path(str(native["cfg"])).is_file():
        raise UsageError(f"'cfg={native['cfg']}' does not exist. Give the path of a YAML file with training arguments.")
    name = str(native.get("optimizer", "auto"))
    if name.lower() not in map(str.lower, OPTIMIZERS):
        raise UsageError(f"Unknown optimizer '{name}'.{suggest(name, [*OPTIMIZERS])} Legal: {', '.join(OPTIMIZERS)}.")
    if task and (found := stock.task_of(stock.load_model(model)[0])) != task:
        raise UsageError(f"'{model}' is a '{found}' model, not '{task}'. Leave the task word out.")
