# Copyright (C) yolo_ext authors. AGPL-3.0 licence.
"""Criteria around the task's own one, which add losses or log figures and never get into a checkpoint."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from typing import Any

import torch


class CriterionProxy:
    """Criterion with the interface of the one that it wraps; a copy of it is the plain criterion."""

    def __init__(self, base: Any, **own: Any) -> None:
        """Wrap the criterion `base`; what is `own` stays with the proxy."""
        self.__dict__.update(base=base, **own)

    def __deepcopy__(self, memo: dict) -> Any:
        """Copy the task's criterion only: nothing of ours gets into EMA or a checkpoint."""
        return deepcopy(self.base, memo)

    def __reduce__(self) -> Any:
        """Pickle as the task's criterion, for the same reason, and without a name of ours."""
        return deepcopy, (self.base,)

    def __getattr__(self, name: str) -> Any:
        """Answer for the task's criterion (gains, update, loss names)."""
        if name.startswith("__"):
            raise AttributeError(name)
        return getattr(self.__dict__["base"], name)

    def __setattr__(self, name: str, value: Any) -> None:
        """Set attributes on the task's criterion."""
        setattr(self.base, name, value)

    def __call__(self, predictions: Any, batch: dict[str, Any]) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Return loss vector and items of the task's criterion."""
        return self.base(predictions, batch)


class LoggedLoss(CriterionProxy):
    """The task's criterion with more items for the progress bar and results.csv; the loss itself stays."""

    def __init__(self, base: Any, items: Callable[[], dict[str, torch.Tensor]]) -> None:
        """Wrap `base`; `items` returns detached scalars with the same names in every batch."""
        super().__init__(base, items=items)

    def __call__(self, predictions: Any, batch: dict[str, Any]) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Return the task's loss vector, and its items with ours behind them."""
        loss, found = self.base(predictions, batch)
        return loss, {**found, **self.items()}
