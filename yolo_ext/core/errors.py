# Copyright (C) yolo_ext authors. AGPL-3.0 licence.
"""The two things that can go wrong from a user's point of view, and what is said of all others."""

from collections.abc import Iterator
from contextlib import contextmanager


class YoloExtError(Exception):
    """Base of both errors. The CLI prints its message without a traceback."""

    exit_status = 1  # of the command line


class UsageError(YoloExtError, ValueError):
    """Wrong input: an unknown option, an illegal value, a missing or broken file. A `ValueError` too."""

    exit_status = 2


class CheckFailed(YoloExtError):
    """The input was legal, but a check or a budget was not met. Exit status 1."""


@contextmanager
def refused(told: str, *kinds: type[Exception], error: type[Exception] = UsageError) -> Iterator[None]:
    """Raise these kinds of exceptions, or any, as an error of ours, whose `{e}` is what they say, `{why}` in short."""
    try:
        yield
    except Exception as e:
        if not isinstance(e, kinds) if kinds else isinstance(e, YoloExtError):  # which says it already
            raise
        why = f"{type(e).__name__}: {' '.join(str(e).split())[:200]}"
        raise error(told.replace("{e}", str(e)).replace("{why}", why)) from e


MEMORY = ("not enough memory", "out of memory", "Failed to allocate memory", "bad_alloc", "bad allocation",
          "Storage size calculation overflowed", "Insufficient memory")  # torch, ONNX Runtime, OpenCV  # fmt: skip


def out_of_memory(e: BaseException) -> bool:
    """Tell whether an error is that there is not enough memory, of the CPU or a GPU."""
    return isinstance(e, MemoryError) or any(words in str(e) for words in MEMORY)


def brief(e: BaseException) -> str:
    """Return the first line of what an error says, or its type where it says nothing."""
    return next(iter(str(e).strip().splitlines()), type(e).__name__)
