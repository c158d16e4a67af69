# Copyright (C) yolo_ext authors. AGPL-3.0 licence.
"""Values of options: what fits a type, how it is read, and what is said of what does not fit."""

import math
import operator
from collections.abc import Callable, Mapping
from dataclasses import Field
from pathlib import Path
from typing import Any

from yolo_ext.core.errors import UsageError
from yolo_ext.core.registry import suggest


def _number(value: Any) -> bool:
    """Tell whether a value is a finite number."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


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
    "int": (lambda v: _number(v) and v == int(v), int, ": give a whole number ({help})."),
    "float": (_number, float, ": give a number ({help})."),
    "list[int]": (lambda v: all(isinstance(n, int) and not isinstance(n, bool) and n >= 0 for n in listed(v)), listed,
                  ": give a list of whole numbers ({help})."),
    "list[str]": (_strings, lambda v: [str(n) for n in listed(v)], ": give a list of strings."),
    "str | list[str]": (lambda v: isinstance(v, str) or (isinstance(v, (list, tuple)) and _strings(v)),
                        lambda v: v if isinstance(v, str) else [str(n) for n in v],
                        ": give a string or a list of strings ({help})."),
    "dict[str, float]": (lambda v: isinstance(v, Mapping) and all(_number(n) and 0 <= n < 1 for n in v.values()),
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


def read_value(key: str, f: Field, value: Any) -> Any:
    """Return the value of an option in its type; the error says what is wrong with it."""
    kind, optional, _ = str(f.type).partition(" | None")
    m = f.metadata
    if value is None and optional:
        return None
    if value is None:
        raise UsageError(f"'{key}=None' is illegal: a value is needed ({m['help']}).")
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
    import yaml  # Ultralytics' YAML.load reads .yaml files only

    hint = "a list of dicts such as [{'op_types': ['Conv2d'], 'quant_bits': 4}], or a YAML or JSON file with one"
    items = [value] if isinstance(value, Mapping) else value
    try:
        if isinstance(value, str):
            if not Path(value).is_file():
                raise FileNotFoundError(f"there is no file '{value}'")
            items = yaml.safe_load(Path(value).read_text())
    except OSError as e:
        raise UsageError(f"'{key}={value}' is illegal: {str(e).splitlines()[0]}. Give {hint}.") from e
    except Exception as e:  # YAML has exceptions of its own
        raise UsageError(f"'{key}={value}' is illegal: the file is not valid YAML or JSON. Give {hint}.") from e
    if isinstance(items, Mapping):
        items = items.get("config_list")
    if not isinstance(items, (list, tuple)) or not all(isinstance(v, Mapping) for v in items):
        raise UsageError(f"'{key}={value}' is illegal: give {hint}.")
    return [dict(v) for v in items]
