# Copyright (C) yolo_ext authors. AGPL-3.0 licence.
"""How one tensor is quantized, and the plain data that say it of a whole model.

A plan says which tensors of which layers are quantized and how; a state adds the calibrated ranges. Both are keyed by
layer path and site:

- `input`, `weight`, `output` (behind BatchNorm, before the activation) and `activation` (behind it; inside SiLU the
  sigmoid's result too) belong to a convolution or linear layer;
- `residual` (what its first convolution and its addition both read) and `add` (the sum) belong to a bottleneck.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from yolo_ext.core.errors import UsageError

SITES = ("input", "weight", "output", "activation", "residual", "add")
BITS = (2, 16)


@dataclass(frozen=True)
class Spec:
    """How one tensor is quantized.

    Attributes:
        bits: 2 to 16.
        symmetric: Zero is the middle code and both ends are equally far; in narrow range, so that a negative BatchNorm
            gain flips weight codes exactly. Otherwise codes run from 0 and zero has any of them.
        per_channel: One scale for each output channel; weights only.
        observer: Range observer of this tensor, None for that of the run.

    Raises:
        UsageError: If the number of bits is out of range.
    """

    bits: int = 8
    symmetric: bool = False
    per_channel: bool = False
    observer: str | None = None

    def __post_init__(self) -> None:
        """Refuse bits that cannot be simulated."""
        if isinstance(self.bits, bool) or not isinstance(self.bits, int) or not BITS[0] <= self.bits <= BITS[1]:
            raise UsageError(f"quant_bits={self.bits!r} is illegal. Legal: a whole number, {BITS[0]} to {BITS[1]}.")

    @property
    def qmax(self) -> int:
        """Return the largest code."""
        return 2 ** (self.bits - 1) - 1 if self.symmetric else 2**self.bits - 1

    @property
    def qmin(self) -> int:
        """Return the smallest code."""
        return -self.qmax if self.symmetric else 0

    def as_dict(self) -> dict[str, Any]:
        """Return the fields, without an observer that is not set."""
        return {k: v for k, v in asdict(self).items() if v is not None}

    @classmethod
    def of(cls, entry: dict[str, Any]) -> Spec:
        """Return the spec of an entry of a state or a plan in JSON, whose other keys are left alone."""
        return cls(**{k: entry[k] for k in cls.__dataclass_fields__ if k in entry})


Plan = dict[str, dict[str, Spec]]
State = dict[str, dict[str, dict[str, Any]]]


def plan_of(state: State) -> Plan:
    """Return the plan that a state was made from."""
    return {path: {site: Spec.of(entry) for site, entry in sites.items()} for path, sites in state.items()}
