# Copyright (C) yolo_ext authors. AGPL-3.0 licence.
"""OpenVINO's intermediate representation, made by OpenVINO's own converter from our ONNX file."""

from __future__ import annotations

import importlib.util
import shutil
import tempfile
from pathlib import Path
from typing import Any

from ultralytics.utils import YAML

from yolo_ext.core.errors import UsageError
from yolo_ext.deployment.runtime import metadata, session

SUFFIX = "_openvino_model"  # by which Ultralytics knows such a folder


def need_openvino() -> None:
    """Check that OpenVINO is installed; nothing is installed on the way.

    Raises:
        UsageError: It is not.
    """
    if importlib.util.find_spec("openvino") is None:
        raise UsageError("OpenVINO is not installed. Run `pip install openvino`, or give format=onnx.")


def export_openvino(onnx_path: str | Path, out: str | Path, *, half: bool = False) -> Path:
    """Convert an ONNX file, float or with Q/DQ, into a folder that ``YOLO(out)`` and OpenVINO load.

    Args:
        onnx_path: File with Ultralytics' metadata.
        out: Folder to write, ``*_openvino_model``; one that is there is replaced.
        half: Store the weights in FP16.

    Returns:
        ``out`` as a path.

    Raises:
        UsageError: OpenVINO is not installed, ``out`` has another ending, or OpenVINO cannot read the file.
    """
    need_openvino()
    import openvino

    out = Path(out)
    if not out.name.endswith(SUFFIX):
        raise UsageError(f"Output '{out}' does not end in '{SUFFIX}', by which Ultralytics knows it. Rename it.")
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=".openvino_") as folder:
        made = Path(folder) / out.name
        made.mkdir()
        try:
            model = openvino.convert_model(str(onnx_path))
        except Exception as error:  # OpenVINO's exceptions share no public base class
            reason = str(error).strip().splitlines()[0]
            raise UsageError(f"OpenVINO cannot convert '{onnx_path}' ({reason}).") from error
        openvino.save_model(model, str(made / f"{out.name.removesuffix(SUFFIX)}.xml"), compress_to_fp16=half)
        YAML.save(made / "metadata.yaml", metadata(session(onnx_path)))
        if out.exists():
            shutil.rmtree(out)
        made.rename(out)
    return out


def compiled(folder: str | Path, threads: int, options: dict[str, str] | None = None) -> Any:
    """Return a model compiled for the CPU.

    Args:
        folder: ``*_openvino_model``.
        threads: Threads to use.
        options: More properties of OpenVINO, such as ``{"INFERENCE_PRECISION_HINT": "f32"}``: processors with BF16
            arithmetic compute in BF16 otherwise.

    Raises:
        UsageError: OpenVINO is not installed, or the folder holds no model.
    """
    need_openvino()
    import openvino

    file = next(Path(folder).glob("*.xml"), None)
    if file is None:
        raise UsageError(f"'{folder}' holds no OpenVINO model (.xml). Export one with format=openvino.")
    settings = {"INFERENCE_NUM_THREADS": threads, "PERFORMANCE_HINT": "LATENCY", **(options or {})}
    return openvino.Core().compile_model(str(file), "CPU", settings)
