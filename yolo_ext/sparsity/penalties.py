# Copyright (C) yolo_ext authors. AGPL-3.0 licence.
"""Sparsity penalties: how far a step shrinks each channel. Each is one function of all prunable channels and one row.

A penalty acts on the parameters directly, after the optimizer step, so that loss scale, clipping and the optimizer's
own normalisation have no part in it (decoupled, as in Parikh & Boyd, Proximal Algorithms, 2014). It returns factors:
1 leaves a channel alone, 0 removes it.
"""

from dataclasses import dataclass

import torch

from yolo_ext.core.registry import Need, Table

penalties = Table("sparsity penalty")
TINY = 1e-12
# Without a coefficient; measured on BCCD (docs/sparsity.md). Scale factors of trained YOLOs are about 1.
DEFAULTS = {"slim": 2.0, "group_slim": 2.0, "group_sl": 8.0}


@dataclass
class Channels:
    """All C channels of all prunable groups, numbered through, as they are at this step."""

    group: torch.Tensor  # (C,) number of the group of each channel
    groups: int  # their number
    gammas: torch.Tensor  # (m,) BatchNorm scales over them
    owner: torch.Tensor  # (m,) channel of each scale
    norms: torch.Tensor  # (C,) RMS of the scales of each, or norm of all coupled weights with BatchNorm folded in
    ease: torch.Tensor | float = 1.0  # (C,) how easily each moves, 1 for the median; 1.0 where nothing is known

    def drawn(self, pull: float) -> torch.Tensor:
        """Return (C,) how far each channel is drawn where the median one is drawn by `pull`."""
        return torch.ones_like(self.norms) * pull * self.ease


def segment(values: torch.Tensor, group: torch.Tensor, groups: int, op: str) -> torch.Tensor:
    """Reduce (C,) values by the (C,) numbers of their groups, none of them empty, to (groups,); `op` amin or amax."""
    return values.new_zeros(groups).scatter_reduce_(0, group, values, op, include_self=False)


@penalties.row("slim", "L1 on the scale of BatchNorm, each one by itself", needs=[Need.SCALES],
               paper="Liu et al., Network Slimming, 2017, arXiv:1708.06519")  # fmt: skip
def slim(channels: Channels, pull: float) -> torch.Tensor:
    """Return (m,) factors of the soft threshold: |gamma| shrinks by `pull` times its ease, down to exactly zero."""
    size = channels.gammas.abs()
    return (size - channels.drawn(pull)[channels.owner]).clamp(min=0) / size.clamp(min=TINY)


@penalties.row("group_slim", "Group lasso on the coupled scales of a channel, which vanish together",
               needs=[Need.SCALES],
               paper="Liu et al., 2017, arXiv:1708.06519; Fang et al., 2023, arXiv:2301.12900")  # fmt: skip
def group_slim(channels: Channels, pull: float) -> torch.Tensor:
    """Return (m,) factors of the block soft threshold: the root mean square of a channel's gammas shrinks likewise."""
    return ((channels.norms - channels.drawn(pull)).clamp(min=0) / channels.norms.clamp(min=TINY))[channels.owner]


@penalties.row("group_sl", "Decay of all coupled weights, up to 16 times stronger for the weakest channel of a group",
               needs=[Need.WEIGHTS], paper="Fang et al., DepGraph, 2023, arXiv:2301.12900")  # fmt: skip
def group_sl(channels: Channels, pull: float) -> torch.Tensor:
    """Return (C,) factors exp(-pull * 2^(4 * weakness) / 16), which come to the same in any number of steps."""
    strength, group = channels.norms / channels.ease, channels.group
    low, high = (segment(strength, group, channels.groups, op)[group] for op in ("amin", "amax"))
    weakness = (high - strength) / (high - low).clamp(min=TINY)  # 0 for the strongest of a group or if all are equal
    return (-channels.drawn(pull) * (4 * weakness - 4).exp2()).exp()
