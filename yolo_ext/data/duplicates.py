# Copyright (C) yolo_ext authors. AGPL-3.0 licence.
"""Find images that are the same, byte by byte or to the eye."""

from __future__ import annotations

import hashlib
from collections.abc import Hashable, Iterable, Mapping
from io import BytesIO
from itertools import combinations
from pathlib import Path

import numpy as np
from PIL import Image

from yolo_ext.data.check import open_image

BITS = 256
NEAR = 10  # bits of the fingerprint that may differ


def fingerprint(file: Path) -> tuple[bytes, int]:
    """Return a hash of a file's bytes, and 256 bits that say where its picture gets brighter to the right (dHash).

    Args:
        file: Image, which is decoded whole.

    Raises:
        ValueError: The picture cannot be decoded.
    """
    raw = file.read_bytes()
    try:
        with open_image(BytesIO(raw)) as im:
            im.draft("L", (64, 64))  # JPEG: decode to an eighth
            deep = im.mode.startswith("I") or im.mode == "F"
            gray = im.convert("I").convert("F") if deep else im.convert("L")
            small = np.asarray(gray.resize((17, 16), Image.Resampling.BOX))
    except Exception as e:  # PIL raises many kinds
        raise ValueError(f"cannot be decoded ({e})") from e
    bits = np.packbits(small[:, 1:] > small[:, :-1])
    return hashlib.blake2b(raw, digest_size=16).digest(), int.from_bytes(bits.tobytes(), "big")


def same(keys: Mapping[str, Hashable]) -> list[list[str]]:
    """Return the groups of names with the same key."""
    groups: dict[Hashable, list[str]] = {}
    for name, key in keys.items():
        groups.setdefault(key, []).append(name)
    return [names for names in groups.values() if len(names) > 1]


def near_pairs(prints: Iterable[int], limit: int = NEAR) -> list[tuple[int, int]]:
    """Return the pairs of different fingerprints of which at most `limit` bits differ.

    The bits are cut into `limit` + 1 bands; a pair within the limit has at least one band in common, so that only
    those are compared.

    Args:
        prints: Fingerprints of 256 bits.
        limit: How many bits may differ.
    """
    distinct = sorted(set(prints))
    width = -(-BITS // (limit + 1))
    found: set[tuple[int, int]] = set()
    for start in range(0, BITS, width):
        bands: dict[int, list[int]] = {}
        for p in distinct:
            bands.setdefault(p >> start & (1 << width) - 1, []).append(p)
        for members in bands.values():
            found.update((a, b) for a, b in combinations(members, 2) if (a ^ b).bit_count() <= limit)
    return sorted(found)
