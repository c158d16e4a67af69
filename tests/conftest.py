# Copyright (C) yolo_ext authors. AGPL-3.0 licence.
"""Settings of the whole test session, in place before Ultralytics is imported: offline, no user folders."""

from __future__ import annotations

import atexit
import os
import shutil
import tempfile

_CONFIG = tempfile.mkdtemp(prefix="yolo_ext_tests_")
atexit.register(shutil.rmtree, _CONFIG, ignore_errors=True)
os.environ.update(YOLO_CONFIG_DIR=_CONFIG, YOLO_AUTOINSTALL="false", YOLO_OFFLINE="1", MPLBACKEND="Agg")

import torch  # noqa: E402  the variables above count when Ultralytics is imported

torch.set_num_threads(1)  # many small convolutions: more threads spin on shared cores

from hypothesis import settings  # noqa: E402

settings.register_profile("ci", derandomize=True)  # a run of CI finds the same as the next one
if os.environ.get("CI"):
    settings.load_profile("ci")
