# Copyright (C) yolo_ext authors. AGPL-3.0 licence.
"""The solver of all targets: kept units whose figure meets a goal, found on plans and copies only."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from ultralytics.utils import LOGGER, colorstr

from yolo_ext.core.config import PruneConfig
from yolo_ext.core.errors import UsageError
from yolo_ext.pruning.allocate import Steps
from yolo_ext.pruning.bundles import Bundle


@dataclass(frozen=True)
class Target:
    """One figure that the plan must reach.

    Attributes:
        figure: From the kept units of all bundles to the figure.
        goal: Where it shall be.
        tolerance: Deviation relative to the goal beyond which the user is told; the search ends at half of it.
        rises: Whether it rises with the share of channels that go.
        trials: Largest number of bisection steps.
        slow: Whether each figure takes a copy of the model, so that the user wants to see it happen.
        noisy: Whether it is a measurement, so that single channels do not show in it.
        cap: Whether the goal must not be passed, however near the figure comes.
    """

    figure: Callable[[list[int]], float]
    goal: float
    tolerance: float = 0.01
    rises: bool = True
    trials: int = 24
    slow: bool = False
    noisy: bool = False
    cap: bool = False


def solve(name: str, target: Target, steps: Steps, made: list[Bundle], cfg: PruneConfig) -> list[int]:
    """Find the kept units whose figure is nearest to the goal, by bisection and then bundle by bundle.

    Args:
        name: Name of the target, for messages.
        target: What to reach.
        steps: From the share of channels that go, 0..1, to the kept units of each bundle.
        made: The bundles.
        cfg: Pruning options, for messages.

    Returns:
        Kept units of each bundle; of a capped target the last ones found within it.

    Raises:
        UsageError: If the floors keep the figure away from the goal, it is passed before the pruning begins, or all
            trials pass a cap.
    """
    seen: dict[tuple[int, ...], float] = {}

    def figure(units: list[int]) -> float:
        if (key := tuple(units)) not in seen:
            seen[key] = target.figure(units)
            if target.slow:
                done = f"trial {len(seen)}: {sum(units) / sum(b.units for b in made):.1%} of the channels"
                LOGGER.info(f"{colorstr('prune: ')}{done}, {name} {seen[key]:.4g} (target {target.goal:g})")
        return seen[key]

    def miss(units: list[int]) -> float:
        return abs(figure(units) - target.goal) / (target.goal or 1.0)

    def over(units: list[int]) -> bool:
        return figure(units) > target.goal if target.rises else figure(units) < target.goal

    least, most = steps(0.0), steps(1.0)
    if not over(most):
        if not target.cap and miss(most) > target.tolerance:
            raise UsageError(_unreachable(name, target, figure(most), cfg))
        return most
    if over(least) and miss(least) > target.tolerance:
        raise UsageError(
            f"'prune.{name}={target.goal:g}' is passed before anything is pruned for it: {name} is {figure(least):.4g}"
            f"{' with prune.ratios alone' * bool(cfg.ratios)}. Leave one of them out or change it."
        )
    low, high = 0.0, 1.0
    for _ in range(target.trials):
        if not target.cap and min(miss(steps(low)), miss(steps(high))) <= target.tolerance / 2:
            break
        middle = (low + high) / 2
        low, high = (low, middle) if over(steps(middle)) else (middle, high)
    if target.cap:
        found = steps(low)
        if all(u == b.units for u, b in zip(found, made)):
            mildest = min(f for f in seen.values() if f > target.goal)
            raise UsageError(
                f"'prune.{name}={target.goal:g}' cannot be met: the mildest of {len(seen)} trials loses {mildest:.4f}. "
                f"Raise prune.{name}, or prune to another target and fine-tune."
            )
        return found
    found = min(steps(low), steps(high), key=miss)
    if not target.noisy and miss(found) > target.tolerance / 2:
        found = _polish(steps(low), steps(high), target, made, miss)
    if miss(found) > target.tolerance:
        why = "the measurements spread" if target.noisy else f"prune.round_to={cfg.round_to} leaves nothing nearer"
        LOGGER.warning(f"{colorstr('prune: ')}{name} is {figure(found):.4g} instead of {target.goal:g}: {why}")
    return found


def _unreachable(name: str, target: Target, most: float, cfg: PruneConfig) -> str:
    # Rounded to the side on which it can be reached.
    bound, way = (f"most {most - 0.005:.2f}", "Lower") if target.rises else (f"least {most + 0.005:.2f}", "Raise")
    spared = " and the ratios in prune.sensitivity" * bool(cfg.sensitivity)
    return (
        f"'prune.{name}={target.goal:g}' cannot be reached: the floors{spared} allow at {bound}. {way} prune.{name}, "
        f"lower prune.min_channels={cfg.min_channels} or prune.round_to={cfg.round_to}, "
        f"or raise prune.max_ratio={cfg.max_ratio:g}."
    )


def _polish(
    low: list[int], high: list[int], target: Target, made: list[Bundle], miss: Callable[[list[int]], float]
) -> list[int]:
    """Return the units nearest to the goal: on the way from one side of it to the other, then by single steps."""
    units, best = low, min(low, high, key=miss)
    for i, v in enumerate(high):  # several bundles may jump at the same share: one after the other
        if units[i] != v and miss(best) > target.tolerance / 2:
            units = [*units[:i], v, *units[i + 1 :]]
            best = min(best, units, key=miss)
    while not target.slow and miss(best) > target.tolerance / 2:
        moves = []
        for i, b in enumerate(made):
            place = b.allowed.index(best[i])
            near = b.allowed[max(place - 1, 0) : place + 2] if b.share is None else []
            moves += [[*best[:i], u, *best[i + 1 :]] for u in near if u != best[i]]
        nearest = min(moves, key=miss, default=best)
        if miss(nearest) >= miss(best):
            break
        best = nearest
    return best
