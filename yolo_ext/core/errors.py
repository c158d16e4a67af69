# Copyright (C) yolo_ext authors. AGPL-3.0 licence.
"""The two things that can go wrong from a user's point of view."""


class YoloExtError(Exception):
    """Base of both errors. The CLI prints its message without a traceback."""

    exit_status = 1  # of the command line


class UsageError(YoloExtError, ValueError):
    """Wrong input: an unknown option, an illegal value, a missing or broken file. A `ValueError` too."""

    exit_status = 2


class CheckFailed(YoloExtError):
    """The input was legal, but a check or a budget was not met. Exit status 1."""
