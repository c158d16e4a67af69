# Copyright (C) yolo_ext authors. AGPL-3.0 licence.
"""Method tables: a method is one function plus one row."""

import difflib
import importlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any, TypeVar

from yolo_ext.core.errors import UsageError, refused

F = TypeVar("F", bound=Callable[..., Any])
# Methods that are gone, and what the figures in benchmarks/RESULTS.md say for.
GONE = {"entropy": "mse", "moving_average": "mse", "l2": "l1", "ast": "ld", "chsim": "cwd", "spkd": "cwd", "fgd": "cwd",
        "group_reg": "group_slim"}  # fmt: skip


def suggest(name: str, legal: list[str]) -> str:
    """Return `` Did you mean 'x'?`` for the nearest legal name, of same last part or letters first; else nothing."""
    same = [n for n in legal if n.rpartition(".")[2] == str(name).rpartition(".")[2]]
    same = same or [n for n in legal if sorted(n) == sorted(str(name))]
    near = difflib.get_close_matches(str(name), same or legal, n=1, cutoff=0.0 if same else 0.5)
    return f" Did you mean '{near[0]}'?" if near else ""


class Need(Enum):
    """What a method needs besides its first arguments; the value is what the help says."""

    DATA = "needs data"
    SPARSITY = "after sparsity training"
    SCALES = "BatchNorm scales"
    WEIGHTS = "all weights"
    EQUAL_WIDTH = "equal width"
    MODULE = "module"
    SEVERAL_CLASSES = "several classes"
    EQUAL_BINS = "equal bins"


@dataclass(frozen=True)
class Row:
    """One method: its function and what help, docs and validation need to know about it."""

    name: str
    fn: Callable[..., Any]
    summary: str
    paper: str = ""
    needs: tuple[Need, ...] = ()
    examples: tuple[str, ...] = ()  # of a command: the words after its name


def imported(kind: str, name: str) -> Callable[..., Any]:
    """Return the user's own method of this kind for a dotted path ``package.module:function``."""
    module, _, attribute = name.partition(":")
    with refused(f"Cannot import {kind} '{name}' ({{why}}). Write it as 'package.module:function'."):
        fn: Callable[..., Any] = getattr(importlib.import_module(module), attribute)
    if not callable(fn):
        raise UsageError(f"The {kind} '{name}' is not callable.")
    return fn


class Table:
    """A named table of methods, filled by the `row` decorator."""

    def __init__(self, kind: str, own: Callable[[str, str], Callable[..., Any]] = imported) -> None:
        """Make an empty table of methods of a kind, such as ``pruning criterion``; `own` reads the path of others."""
        self.kind, self._own = kind, own
        self._rows: dict[str, Row] = {}

    def row(
        self, name: str, summary: str, *, paper: str = "", needs: Sequence[Need] = (), examples: Sequence[str] = ()
    ) -> Callable[[F], F]:
        """Register the decorated function under `name`, which must be new."""

        def add(fn: F) -> F:
            if name in self._rows:
                raise ValueError(f"There are two of the {self.kind} '{name}'. Give one of them another name.")
            self._rows[name] = Row(name, fn, summary, paper, tuple(needs), tuple(examples))
            return fn

        return add

    def __iter__(self) -> Iterator[Row]:
        """Iterate over the rows in the order of registration."""
        return iter(self._rows.values())

    def names(self) -> list[str]:
        """Return the registered names."""
        return list(self._rows)

    def __getitem__(self, name: str) -> Row:
        """Return the row called `name`, or one of the user's own method by its dotted path."""
        if name in self._rows:
            return self._rows[name]
        if ":" not in str(name):
            legal = f"Legal: {', '.join(self.names())}, or your own as 'package.module:function'."
            better = GONE.get(str(name))
            near = f" It is gone: '{better}' does better." if better in self._rows else suggest(name, self.names())
            raise UsageError(f"Unknown {self.kind} '{name}'.{near} {legal}")
        return Row(name, self._own(self.kind, str(name)), "user method")
