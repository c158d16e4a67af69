# Copyright (C) yolo_ext authors. AGPL-3.0 licence.
"""Stock-class checkpoints with a plain-dict manifest, atomic writes, and the tripwire against silent un-pruning.

The manifest is a plain dict, kept as the attribute `yolo_ext` of the model (so that it follows the module through EMA,
`deepcopy` and every stock save) and repeated under the key `yolo_ext` of the checkpoints that we write.
"""

from __future__ import annotations

import hashlib
import io
import os
import tempfile
from copy import deepcopy
from datetime import datetime
from pathlib import Path
from typing import Any

import torch
from torch import nn

from yolo_ext.stock.load import foreign_classes

MANIFEST = "yolo_ext"
TRIPWIRE = "PRUNED_MODEL_train_with_yolo_ext"


def atomic_write(path: Path, data: bytes | str) -> None:
    """Write a whole file or none: temporary file in the same folder, fsync, rename.

    Args:
        path: Target file; its folder is made when missing.
        data: Bytes, or text that is written as UTF-8.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    fd, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(fd, "wb") as f:
            f.write(data.encode() if isinstance(data, str) else data)
            f.flush()
            os.fsync(f.fileno())
        umask = os.umask(0)
        os.umask(umask)
        Path(name).chmod(0o666 & ~umask)  # mkstemp makes private files; a result is an ordinary file
        Path(name).replace(path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def manifest(model: nn.Module) -> dict[str, Any]:
    """Return the model's manifest, an empty dict for a stock model. The dict is live: changes stay with the model."""
    found = getattr(model, MANIFEST, None)
    if found is None:
        found = {}
        setattr(model, MANIFEST, found)
    return found


def is_pruned(model: nn.Module) -> bool:
    """Tell whether this model was pruned, masked or merged by us, so that it must not be rebuilt from its YAML."""
    found = getattr(model, MANIFEST, None) or {}
    return bool(found.get("prune") or found.get("masks") or found.get("merged"))


def fingerprint(model: nn.Module) -> str:
    """Return a hash of the weights in fp16, which survives saving and loading."""
    digest = hashlib.sha256()
    for name, p in model.named_parameters():
        digest.update(name.encode())
        digest.update(p.detach().cpu().half().contiguous().numpy().tobytes())
    return digest.hexdigest()


def set_tripwire(model: nn.Module) -> None:
    """Make a stock rebuild from `model.yaml` fail with a name that says what to do, instead of un-pruning silently."""
    manifest(model).setdefault("yaml", deepcopy(model.yaml))
    model.yaml = deepcopy(model.yaml)
    model.yaml["backbone"][0][2] = TRIPWIRE


def serialised(model: nn.Module, **extra: Any) -> bytes:
    """Return the bytes of a final, stock-class checkpoint: fp16 weights, no optimizer, loads with plain ``YOLO``.

    Args:
        model: Float model of stock classes only; it is not changed.
        extra: More plain entries for the checkpoint dict, such as ``train_metrics``.

    Raises:
        ValueError: If a module of ours is still inside, which plain Ultralytics could not load.
    """
    from ultralytics import __version__

    if foreign := foreign_classes(model):
        raise ValueError(f"Checkpoint would hold classes of yolo_ext: {foreign}.")
    m = deepcopy(model).cpu()
    m.criterion = None
    args = getattr(m, "args", None)
    m.args = dict(args) if isinstance(args, dict) else dict(vars(args)) if args is not None else {}
    m = m.half().eval().requires_grad_(False)
    ckpt = {
        "epoch": -1,
        "best_fitness": None,
        "model": m,
        "ema": None,
        "updates": None,
        "optimizer": None,
        "train_args": m.args,
        "date": datetime.now().isoformat(),
        "version": __version__,
        "license": "AGPL-3.0 (https://ultralytics.com/license)",
        MANIFEST: getattr(m, MANIFEST, {}),
        **extra,
    }
    buffer = io.BytesIO()
    torch.save(ckpt, buffer)
    return buffer.getvalue()


def size_mb(model: nn.Module) -> float:
    """Return the size in MB (10^6 bytes) of the ``.pt`` that `save_model` would write."""
    return len(serialised(model)) / 1e6


def save_model(model: nn.Module, path: Path, **extra: Any) -> Path:
    """Write what `serialised` returns, whole or not at all.

    Args:
        model: Float model of stock classes only; it is not changed.
        path: Where to write the ``.pt``.
        extra: More plain entries for the checkpoint dict.

    Returns:
        The path.
    """
    atomic_write(path, serialised(model, **extra))
    return Path(path)


def finalize(path: Path) -> None:
    """Repeat the manifest of a finished checkpoint under its own key, where tools find it without the module."""
    ckpt = torch.load(path, map_location="cpu", weights_only=False)
    ckpt[MANIFEST] = getattr(ckpt.get("ema") or ckpt["model"], MANIFEST, {})
    buffer = io.BytesIO()
    torch.save(ckpt, buffer)
    atomic_write(path, buffer.getvalue())
