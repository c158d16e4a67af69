# Copyright (C) yolo_ext authors. AGPL-3.0 licence.
"""The commands: one typed function each. Its signature gives the keys, the section `Args` of its docstring their help.

Modules of commands import nothing heavy at the top: the command line reads them all to know what there is.
"""

import functools
import inspect
import typing
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from types import UnionType
from typing import TYPE_CHECKING, Annotated, Any, Literal, ParamSpec

from yolo_ext.core.config import CONFIGS, comma_list, finite, listed, misspelt, number, option_names, read_flat
from yolo_ext.core.errors import UsageError, brief
from yolo_ext.core.log import LOGGER, log_folder, logged
from yolo_ext.core.registry import Table, suggest

if TYPE_CHECKING:
    from yolo_ext.reporting.result import Result

P = ParamSpec("P")


def whole(value: Any, least: int = 1) -> bool:
    """Tell whether a value is a whole number, which 32 bits hold."""
    return isinstance(value, int) and not isinstance(value, bool) and least <= value < 2**31


def each(given: Any, kind: Callable[[str], Any], legal: Callable[[Any], bool]) -> bool:
    """Tell whether one or several values, in a list or with commas between them, can be read, and all are legal."""
    try:
        found = comma_list(given, kind)
    except (ValueError, OverflowError):
        return False
    return bool(found) and all(map(legal, found))


def some(value: Any, *kinds: type) -> bool:
    """Tell whether a value is of these types, or is a list of such ones."""
    return bool(listed(value)) and all(isinstance(v, kinds) and not isinstance(v, bool) for v in listed(value))


def _device(value: Any) -> bool:
    """Tell whether there is a device; the error that there is none says more."""
    from yolo_ext import stock

    return bool(stock.device_of(value))


# Types of keys. Behind `Annotated`: what Python sees, what fits, and the words for that.
Count = Annotated[int, whole, "a whole number of at least 1"]
Natural = Annotated[int, lambda v: whole(v, 0), "a whole number of at least 0"]
Share = Annotated[float, lambda v: number(v) and 0 <= v <= 1, "a number from 0 to 1"]
Counts = Annotated[Any, lambda v: each(v, int, lambda n: 0 < n <= 1024), "whole numbers from 1 to 1024, such as 1,2"]
Size = Annotated[Any, lambda v: each(v, int, whole) and len(listed(v)) < 3 and some(v, int), "a whole number, or "
                 "height and width as [480,640]"]  # fmt: skip
Device = Annotated[Any, _device, "cpu, or the number of a GPU"]
Weights = Annotated[Any, lambda v: isinstance(v, (str, Path)), "a path"]  # for which a YOLO, or its module, may stand
Names = Annotated[Any, lambda v: some(v, str, Path, int), "a name or path, or a list of them"]
Limits = Annotated[Any, lambda v: isinstance(v, (str, Path, Mapping)), "limits by figure, or a YAML file of them"]
Technique = Annotated[
    Any, lambda v: isinstance(v, (bool, Mapping, *CONFIGS.values())), "True, False, or options by dotted key"
]
Layers = Annotated[Any, lambda v: listed(v) == [] or some(v, int), "a number of layers, or a list of their indices"]
Resume = bool | str | Path  # True or the folder of a run
PLACE = {"project": str | Path, "name": str | Path, "exist_ok": bool, "save_dir": str | Path}  # of the run folder
CENTRAL: dict[str, Any] = {"modules": Names, "trust": bool, **PLACE}  # keys that signatures do not name
NATIVE: dict[str, Any] = {  # keys of Ultralytics that it does not check itself
    "model": Weights, "data": str | Path, "device": Device, "freeze": Layers, "pretrained": Resume, **PLACE,
}  # fmt: skip

COMMANDS = Table("command")
EXAMPLES = Path(__file__).with_name("examples.txt").read_text(encoding="utf-8").splitlines()  # of all commands
OPTIMIZERS = ("auto", "SGD", "MuSGD", "Adam", "AdamW", "Adamax", "NAdam", "RAdam", "RMSProp")
MODELS = ("model", "models", "other", "compare", "distill")  # keys that take a YOLO where others take a path
# Keys of Ultralytics: prediction and no training reads them, both read them, only exports do, nothing does.
PREDICTS = ("source", "vid_stride", "stream_buffer", "retina_masks", "show", "save_frames", "save_crop", "show_boxes",
            "line_width")  # fmt: skip
BOTH = ("agnostic_nms", "augment", "batch", "cfg", "channels_last", "classes", "compile", "conf", "data", "device",
        "dnn", "end2end", "half", "imgsz", "iou", "max_det", "model", "nms", "quantize", "rect", "save", "save_conf",
        "save_txt", "show_conf", "show_labels", "task", "verbose", "visualize")  # fmt: skip
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
    "trust": "Load model files that hold more than a YOLO, and run what is in them, as you know who wrote them",
    "place": f"{', '.join(PLACE)} for the run folder",
    "native": f"{', '.join(PLACE)} for the run folder, and any training argument of Ultralytics",
}


def command(
    summary: str, *, like: Callable[..., Any] | None = None
) -> Callable[[Callable[P, Any]], Callable[P, "Result"]]:
    """Have a function, with keys as `like`, check keys and values, take models as files, and return a `Result`."""

    def add(fn: Callable[P, Any]) -> Callable[P, "Result"]:
        call: Callable[..., Any] = fn

        @functools.wraps(fn)
        def checked(*args: P.args, **options: P.kwargs) -> Any:
            with logged(), ExitStack() as held:
                if not fn.__module__.endswith(".help"):  # whose commands start without torch
                    from yolo_ext.stock.safety import safely

                    held.enter_context(safely(options.pop("trust", None) if "trust" in keys(fn) else None))
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
    given = read_values(given, NATIVE | CENTRAL | typing.get_type_hints(fn, include_extras=True))
    if takes_native(fn):
        _check_values({k: v for k, v in given.items() if k not in (*signature.parameters, "modules")})
    return given


def read_values(given: Mapping[str, Any], kinds: Mapping[str, Any]) -> dict[str, Any]:
    """Return values that fit the types of their keys, numbers as text where that is asked for; refuse all others."""
    found = dict(given)
    for key, value in given.items():
        legal = _legal(kinds[key], value) if value is not None and key in kinds else ""
        if legal and number(value) and not _legal(kinds[key], str(value)):
            found[key] = str(value)  # a folder may be called 2026
        elif legal or not finite(value):
            raise UsageError(f"'{key}={value}' is illegal{legal or ': give finite numbers of usual size.'}")
    return found


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
    more = [k for k in CENTRAL if k not in PLACE] if {"model", "models"} & {*found} else []
    more += PLACE if found.pop("native" if takes_native(fn) else "place", None) else []
    how: dict[str, Any] = {"kind": inspect.Parameter.KEYWORD_ONLY, "default": None}
    return found | {k: inspect.Parameter(k, annotation=CENTRAL[k], **how) for k in more}


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
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if origin in (typing.Union, UnionType):
        found = [_legal(k, value) for k in args if k is not type(None)]
        return "" if "" in found else found[0]
    if origin is Literal:
        return "" if value in args else f".{suggest(value, [*args])} Legal: {', '.join(args)}."
    if origin is Annotated:
        return "" if args[1](value) else f". Legal: {args[2]}."
    words = "True or False" if kind is bool else "text, such as a name or a path"
    return "" if isinstance(value, kind) else f". Legal: {words}."


def refuse_unread(command: str, native: Mapping[str, Any], unread: Callable[[str], bool]) -> None:
    """Refuse keys of Ultralytics that a command does not read; those that have their default do no harm."""
    from ultralytics.utils import DEFAULT_CFG_DICT

    if found := [k for k, v in native.items() if unread(k) and v != DEFAULT_CFG_DICT.get(k)]:
        raise UsageError(f"'{command}' does not read {', '.join(found)} of Ultralytics. Leave it out.")


def tell_idle(keys: Sequence[Any]) -> None:
    """Warn of keys without an effect, once for all; what is no text names none."""
    if idle := [k for k in keys if isinstance(k, str) and k]:
        LOGGER.warning(f"Without effect here: {', '.join(idle)}")


def _check_values(native: Mapping[str, Any]) -> None:
    """Refuse values of Ultralytics' keys, and of a YAML file with more of them, that Ultralytics would refuse."""
    from yolo_ext.stock.context import get_cfg, quiet

    more = dict[str, Any]()
    if file := native.get("cfg"):
        if not Path(str(file)).is_file():
            raise UsageError(f"'cfg={file}' does not exist. Give the path of a YAML file with training arguments.")
        more = read_flat(file, f"'cfg={file}'", "lr0: 0.01")
    try:
        with quiet():  # about how the command line of Ultralytics is used
            get_cfg(overrides={**{k: v for k, v in more.items() if k.split(".")[0] not in CONFIGS}, **native})
    except (SyntaxError, TypeError, ValueError) as e:
        raise UsageError(brief(e)) from e


def check_native(command: str, model: Any, native: dict[str, Any], also: Sequence[str] = ()) -> None:
    """Refuse keys of Ultralytics that no training and not the command `also` reads; a right task word is taken out."""
    from yolo_ext import stock

    refuse_unread(command, native, lambda key: key in {*PREDICTS, *EXPORTS, *NEITHER} - {*also})
    task = native.pop("task", None)
    name = str(native.get("optimizer", "auto"))
    if name.lower() not in map(str.lower, OPTIMIZERS):
        raise UsageError(f"Unknown optimizer '{name}'.{suggest(name, [*OPTIMIZERS])} Legal: {', '.join(OPTIMIZERS)}.")
    if task and (found := stock.task_of(stock.load_model(model)[0])) != task:
        raise UsageError(f"'{model}' is a '{found}' model, not '{task}'. Leave the task word out.")
