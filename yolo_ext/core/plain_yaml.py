# Copyright (C) yolo_ext authors. AGPL-3.0 licence.
"""YAML as plain data, which may not stand for much more than is written in the file."""

import math
from typing import Any

import yaml

MOST = 100_000  # values that the aliases of a file may repeat; nested ones stand for billions in a few lines


class PlainLoader(getattr(yaml, "CSafeLoader", yaml.SafeLoader)):  # type: ignore[misc]
    """Safe loader of PyYAML that refuses what would take for ever to read, copy or show."""

    def construct_document(self, node: Any) -> Any:
        """Return the content of a file whose aliases are within bounds."""
        sizes: dict[int, float] = {}

        def size(n: Any) -> float:
            if id(n) not in sizes:
                sizes[id(n)] = math.inf  # of a node inside itself
                parts = n.value if isinstance(n.value, list) else []
                sizes[id(n)] = 1 + sum(size(p) for part in parts for p in (part if isinstance(part, tuple) else [part]))
            return sizes[id(n)]

        if size(node) - len(sizes) > MOST:
            raise yaml.YAMLError(f"its aliases repeat more than {MOST:,} values. Write out what it means")
        return super().construct_document(node)


def plain_yaml(text: str) -> Any:
    """Return the content of YAML or JSON as plain data."""
    return yaml.load(text, Loader=PlainLoader)  # nosec B506  # a safe loader
