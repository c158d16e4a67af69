# Copyright (C) yolo_ext authors. AGPL-3.0 licence.
"""YAML as plain data, which may not stand for much more than is written in the file."""

import math
from typing import Any

import yaml

MOST = 100_000  # values that the aliases of a file may repeat; nested ones stand for billions in a few lines
Loader: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


class PlainLoader(Loader):  # type: ignore[misc]
    """Safe loader of PyYAML that refuses what would take for ever to read, copy or show."""

    def construct_document(self, node: Any) -> Any:
        """Return the content of a file whose aliases are within bounds."""
        sizes: dict[int, float] = {}
        if _size(node, sizes) - len(sizes) > MOST:
            raise yaml.YAMLError(f"its aliases repeat more than {MOST:,} values. Write out what it means")
        return super().construct_document(node)


def _size(node: Any, sizes: dict[int, float]) -> float:
    """Return for how many values a node stands with all that is repeated, and note that by its identity."""
    if id(node) not in sizes:
        sizes[id(node)] = math.inf  # of a node inside itself
        parts = node.value if isinstance(node.value, list) else []
        inner = (n for part in parts for n in (part if isinstance(part, tuple) else (part,)))
        sizes[id(node)] = 1 + sum(_size(n, sizes) for n in inner)
    return sizes[id(node)]


def plain_yaml(text: str) -> Any:
    """Return the content of YAML or JSON as plain data."""
    return yaml.load(text, Loader=PlainLoader)  # nosec B506  # a safe loader
