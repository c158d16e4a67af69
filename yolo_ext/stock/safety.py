# Copyright (C) yolo_ext authors. AGPL-3.0 licence.
"""Files of others are read, and what they hold is not run: model files, model and data YAMLs, caches of labels."""

import os
import pickle
import re
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from PIL import Image
from ultralytics.data import dataset
from ultralytics.data import utils as data_utils
from ultralytics.nn import tasks
from ultralytics.utils import LOGGER, ROOT, YAML, checks, patches

from yolo_ext.core.errors import UsageError
from yolo_ext.core.plain_yaml import PlainLoader
from yolo_ext.stock.context import check_stock, replaced

VARIABLE = "ULTRALYTICS_SAFE_LOAD"  # of Ultralytics, which the processes of a training on several GPUs inherit
ARRAYS = {"_reconstruct", "scalar", "ndarray", "dtype"}  # all that a cache of labels is made of, in NumPy
# Ultralytics replaces Image.open by one that pip-installs pi-heif as soon as a corrupt file is met
open_image = Image.open if find_spec("pi_heif") else getattr(patches, "_image_open", Image.open)


@contextmanager
def safely(trust: Any = None) -> Iterator[None]:
    """Have Ultralytics run nothing that files hold, change no image and install nothing for as long as a block runs.

    With `trust`, by default where ULTRALYTICS_SAFE_LOAD=0 is in the environment, model files may run what they hold.
    """
    check_stock()
    if trust not in (None, True, False):
        raise UsageError(f"'trust={trust}' is illegal. Legal: True or False.")
    before = os.environ.get(VARIABLE)
    trust = before == "0" if trust is None else trust
    loads = torch if trust else SimpleNamespace(**{**vars(torch), "load": _load})
    os.environ[VARIABLE] = str(int(not trust))
    try:
        with (
            replaced(tasks, SAFE_LOAD=not trust),
            replaced(patches, torch=loads),
            replaced(checks, AUTOINSTALL=False, check_yolov5u_filename=lambda file, *_, **__: file),  # or reads another
            replaced(dataset, load_dataset_cache_file=_load_cache),
            replaced(data_utils, YAML=SimpleNamespace(load=_data_yaml), check_image=check_image),
            replaced(YAML._get_instance(), SafeLoader=PlainLoader),
        ):
            yield
    finally:
        os.environ.pop(VARIABLE)
        os.environ.update({VARIABLE: before} if before is not None else {})


def _load(file: Any, *args: Any, **options: Any) -> Any:
    """Load as `torch.load` what is made of tensors, plain data and layers of torch, Ultralytics and `modules=`."""
    known = tasks._SafeLoad.loading(file) if isinstance(file, (str, Path)) else nullcontext()
    try:
        with known, replaced(tasks, yaml_model_load=None):  # or it could build a model from a YAML on the net
            return torch.load(file, *args, **{**options, "weights_only": True})  # nosec B614  # weights_only
    except pickle.UnpicklingError as e:
        if not (found := re.search(r"GLOBAL (\S+)|unsafe (getattr\(.*?\))", str(e))):
            raise  # damaged
        if found[0].startswith("GLOBAL models."):
            raise ModuleNotFoundError(name="models") from e  # by which Ultralytics knows the YOLOv5 repository
        told = f"'{file}' is not loaded: it holds {found[1] or found[2]}, which is no part of a YOLO"
        mend = "If you know who wrote it, add trust=True; name layers of your own by modules=package.module."
        raise UsageError(f"{told} and could do anything. {mend}") from e


class _Arrays(pickle.Unpickler):
    """Reads plain data and arrays of NumPy."""

    def find_class(self, module: str, name: str) -> Any:
        """Return a function or class of NumPy that makes arrays, and refuse all else."""
        if name not in ARRAYS or not re.fullmatch(r"numpy(\._?core\.multiarray)?", module):
            raise pickle.UnpicklingError(f"{module}.{name}")
        return super().find_class(module, name)


def _load_cache(path: Path) -> Any:
    """Read a cache of labels that `numpy.save` wrote; one that holds more is as good as missing, and made anew."""
    with Path(path).open("rb") as file:
        try:
            np.lib.format.read_magic(file)
            np.lib.format.read_array_header_1_0(file)
            return _Arrays(file).load().item()
        except Exception as e:  # whatever is in there
            LOGGER.warning(f"'{path}' is not read, as it is damaged or holds more than labels ({e})")
            raise FileNotFoundError(path) from e


def _data_yaml(file: str | Path, append_filename: bool = False) -> dict[str, Any]:
    """Read a data.yaml, of which only those that come with Ultralytics may fetch what is missing."""
    found = dict(YAML.load(file, append_filename))
    if found.get("download") and not Path(file).resolve().is_relative_to(ROOT):
        told = f"The images of '{file}' are missing, and its 'download:' is not run. Fetch them, then try again."
        found["download"] = f"raise FileNotFoundError({told!r})"  # which Ultralytics runs in its place
    return found


def check_image(file: str | Path) -> tuple[str, tuple[int, int]]:
    """Check an image as Ultralytics does for a training, and return no message and (height, width) upright."""
    with open_image(file) as im:
        im.verify()
        (width, height), kind = data_utils.exif_size(im), str(im.format)
    if kind.lower() not in data_utils.IMG_FORMATS | {"jpeg2000"}:
        raise ValueError(f"Invalid image format {kind}. Legal: {', '.join(sorted(data_utils.IMG_FORMATS))}")
    if min(width, height) < 10:
        raise ValueError(f"image size {height, width} <10 pixels")
    if kind == "JPEG" and not Path(file).read_bytes().endswith(b"\xff\xd9"):
        with open_image(file) as im:
            im.load()  # whole, with bytes behind its end
    if kind not in {"JPEG", "MPO", "PNG"} and patches.imread(str(file)) is None:  # which would end a training
        raise ValueError("is truncated, or cannot be decoded")
    return "", (height, width)
