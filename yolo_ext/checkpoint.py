# Copyright (C) yolo_ext authors. AGPL-3.0 licence.
"""Stock-class checkpoints with a plain-dict manifest, atomic writes, and the tripwire against silent un-pruning.

The manifest is in the attribute `yolo_ext` of the model, so that it follows it through EMA, `deepcopy` and stock saves.
"""

import hashlib
import io
import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass, field, fields
from datetime import datetime
from functools import cache
from pathlib import Path
from typing import Any
from uuid import uuid4

import torch
import ultralytics
from torch import nn
from ultralytics.utils import LOGGER

from yolo_ext import __version__
from yolo_ext.core.errors import UsageError
from yolo_ext.stock.load import load_model, raw_checkpoint

MANIFEST = "yolo_ext"
SCHEMA = 1  # raise when the meaning of a field changes, and translate the older one in `manifest`
TRIPWIRE = "PRUNED_MODEL_train_with_yolo_ext"


@contextmanager
def whole(path: Path) -> Iterator[Path]:
    """Give a temporary name in the folder of `path`, which is made; behind the block its file is put in place."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name[:60]}.{os.getpid()}.{uuid4().hex[:8]}.part")  # `core.lock.PART`
    try:
        yield part
        part.replace(path)
    except OSError as e:
        e.filename = e.filename or str(path)  # a full disk does not say where
        raise
    finally:
        part.unlink(missing_ok=True)


def atomic_write(path: Path, data: bytes | str) -> None:
    """Write a whole file (text as UTF-8) or none: temporary file in the same folder, which is made, fsync, rename."""
    with whole(Path(path)) as part, part.open("xb") as f:
        f.write(data.encode() if isinstance(data, str) else data)
        f.flush()
        os.fsync(f.fileno())


def as_bytes(found: Any) -> bytes:
    """Return what `torch.save` writes."""
    buffer = io.BytesIO()
    torch.save(found, buffer)
    return buffer.getvalue()


@dataclass(frozen=True)
class Manifest:
    """What was done to a model, as plain data; a field is empty where nothing of the kind was."""

    schema: int = 0  # version of this layout; 0 in files from before it had one
    version: str = ""  # of yolo_ext that wrote it last
    yaml: Mapping[str, Any] = field(default_factory=dict)  # model YAML before the tripwire was set
    parent: str = ""  # fingerprint of the model that a later pruning counts from
    dense: Mapping[str, Any] = field(default_factory=dict)  # figures of what a run with several prunings started with
    # `kept` and `shapes` count in the dense model of fingerprint `parent`; `gap` is of the proof; one of `steps` each
    # is a pruning in training; and `config`, `frozen` (reason by layer), `coupled` and `notes`.
    prune: Mapping[str, Any] = field(default_factory=dict)
    masks: Mapping[str, Any] = field(default_factory=dict)  # `kind`, `layers` and `ratio` of zero weights
    sparsity: Mapping[str, Any] = field(default_factory=dict)  # last state of a sparsity training
    merged: Sequence[str] = ()  # paths of the blocks whose branches were merged
    # `profile`, `options`, `float` (reason by layer), `calibration`, `state` (ranges); after QAT, its `ptq` and `base`.
    quant: Mapping[str, Any] = field(default_factory=dict)
    other: Mapping[str, Any] = field(default_factory=dict)  # what a newer yolo_ext knows besides; it stays in the file


FIELDS = frozenset(f.name for f in fields(Manifest)) - {"other"}


def manifest(model: nn.Module) -> Manifest:
    """Return the manifest of a model, an empty one for a stock model; reading it writes nothing."""
    found = getattr(model, MANIFEST, None) or {}
    if found.get("schema", 0) > SCHEMA:
        _warn_of_newer(found["schema"], str(found.get("version")))
    known = {k: v for k, v in found.items() if k in FIELDS}
    return Manifest(**known, other={k: v for k, v in found.items() if k not in FIELDS})


@cache
def _warn_of_newer(schema: int, version: str) -> None:
    LOGGER.warning(
        f"This model was written by yolo_ext {version}, whose manifest (schema {schema}) is newer than yolo_ext "
        f"{__version__} knows ({SCHEMA}). What is new in it has no effect. Run: pip install --upgrade yolo-ext"
    )


def note(model: nn.Module, **changed: Any) -> None:
    """Write fields of `Manifest` into the model, as plain data; what is None or empty is removed."""
    if unknown := sorted(set(changed) - FIELDS):
        raise TypeError(f"The manifest has no fields {unknown}. Legal: {sorted(FIELDS)}.")
    before = getattr(model, MANIFEST, None) or {}
    found = {k: v for k, v in {**before, **changed}.items() if v or k not in changed}
    mark = {} if before.get("schema", 0) > SCHEMA else {"schema": SCHEMA, "version": __version__}
    if found:
        setattr(model, MANIFEST, {**found, **mark})


def hand_on(source: nn.Module, target: nn.Module) -> None:
    """Give a rebuilt model the manifest of the one that it was rebuilt from."""
    if found := getattr(source, MANIFEST, None):
        setattr(target, MANIFEST, deepcopy(found))


def is_pruned(model: nn.Module) -> bool:
    """Tell whether this model was pruned, masked or merged by us, so that it must not be rebuilt from its YAML."""
    found = manifest(model)
    return bool(found.prune or found.masks or found.merged)


def fingerprint(model: nn.Module) -> str:
    """Return a hash of the weights in fp16, which survives saving and loading."""
    digest = hashlib.sha256()
    for name, p in model.named_parameters():
        digest.update(name.encode())
        digest.update(p.detach().cpu().half().contiguous().numpy().tobytes())
    return digest.hexdigest()


def set_tripwire(model: nn.Module) -> None:
    """Make a stock rebuild from `model.yaml` fail with a name that says what to do, instead of un-pruning silently."""
    if not manifest(model).yaml:
        note(model, yaml=deepcopy(model.yaml))
    model.yaml = deepcopy(model.yaml)
    model.yaml["backbone"][0][2] = TRIPWIRE


def serialised(model: nn.Module, **extra: Any) -> bytes:
    """Return the bytes of a final, stock-class checkpoint: fp16 weights, no optimizer, loads with plain ``YOLO``."""
    if foreign := sorted({type(m).__name__ for m in model.modules() if type(m).__module__.startswith("yolo_ext")}):
        raise ValueError(f"Checkpoint would hold classes of yolo_ext: {foreign}.")
    m = deepcopy(model).cpu()
    m.criterion = None
    args = getattr(m, "args", None) or {}
    m.args = dict(args if isinstance(args, dict) else vars(args))
    m = m.half().eval().requires_grad_(False)
    ckpt = {"epoch": -1, **dict.fromkeys(("best_fitness", "ema", "updates", "optimizer")), "model": m,
            "train_args": m.args, "date": datetime.now().isoformat(), "version": ultralytics.__version__,
            "license": "AGPL-3.0 (https://ultralytics.com/license)", MANIFEST: getattr(m, MANIFEST, {})}  # fmt: skip
    return as_bytes({**ckpt, **extra})


def size_mb(model: nn.Module) -> float:
    """Return the size in MB (10^6 bytes) of the ``.pt`` that `save_model` would write."""
    return len(serialised(model)) / 1e6


def save_model(model: nn.Module, path: Path, **extra: Any) -> Path:
    """Write a checkpoint of stock classes, with plain `extra` entries, that plain ``YOLO`` loads; return the path."""
    atomic_write(path, serialised(model, **extra))
    return Path(path)


def file_of(model: Any) -> str | Path:
    """Return the file that a YOLO or its module came from; one of other weights, or of none, is written to a new one.

    That lies in a temporary folder, and stays there for a run that is gone on with.
    """
    net = model.model if hasattr(model, "ckpt_path") else model
    if isinstance(net, (str, Path)):  # a YOLO of an exported file
        return net
    if not hasattr(net, "yaml"):
        raise UsageError(f"A '{type(model).__name__}' is no model. Give a path, a YOLO, or its `.model`.")
    file, fused = Path(getattr(net, "pt_path", None) or net.yaml.get("yaml_file", "model.yaml")), net.is_fused()
    if file.suffix == ".pt" and file.is_file():
        stored: Any = load_model(file)[0]
        ours, theirs = net.state_dict(), (stored.fuse(verbose=False) if fused else stored).state_dict()
        same = net.names == stored.names and ours.keys() == theirs.keys()
        if same and all(torch.equal(v.cpu().half(), theirs[k].half()) for k, v in ours.items()):
            return file
    if fused:
        raise UsageError("The model is fused, as predict() and val() leave it, and not that of a file. Save it before.")
    new = save_model(net, Path(tempfile.mkdtemp(prefix="yolo_ext_")) / f"{file.stem}_in_memory.pt")
    LOGGER.info(f"The weights in memory are not those of a file. They are written to {new}")
    return new


def finalize(path: Path) -> None:
    """Repeat the manifest of a finished checkpoint under its own key, where tools find it without the module."""
    ckpt = raw_checkpoint(path)
    ckpt[MANIFEST] = getattr(ckpt.get("ema") or ckpt["model"], MANIFEST, {})
    atomic_write(path, as_bytes(ckpt))
