# Copyright (C) yolo_ext authors. AGPL-3.0 licence.
"""Which layers a selector means, and what include, exclude and ratios do to the groups of a model."""

from __future__ import annotations

import re

from torch import nn

from yolo_ext.checkpoint import manifest
from yolo_ext.core.config import PruneConfig
from yolo_ext.core.errors import UsageError
from yolo_ext.core.registry import suggest
from yolo_ext.pruning.graph import Graph, Group
from yolo_ext.stock.model import natural_key

SECTIONS = ("backbone", "neck", "head")


def matches(model: nn.Module, selector: str, option: str = "selector") -> set[str]:
    """Return the paths of all modules that a selector means, with everything inside them.

    Args:
        model: A YOLO model.
        selector: Layer index (``9``), module path (``model.9.cv2``), module type (``C2f``, ``Conv2d``), ``backbone``,
            ``neck`` or ``head``, or a regular expression for whole paths; the first of these that fits.
        option: Where the selector was given, for the error message.

    Raises:
        UsageError: If nothing fits, or the regular expression is broken.
    """
    modules = {path: m for path, m in model.named_modules() if path}
    roots = _roots(model, modules, selector, option)
    found = {path for path in modules if not roots.isdisjoint(_ancestors(path))}
    if not found:
        names = [*SECTIONS, *sorted({type(m).__name__ for m in modules.values()}), *modules]
        raise UsageError(
            f"'{option}={selector}' matches no layer.{suggest(selector, names)} Legal: a layer index such as 9, a name "
            "such as model.9.cv2, a type such as C2f, backbone, neck, head, or a regular expression for whole names."
        )
    return found


def _ancestors(path: str) -> set[str]:
    """Return a path and those of all modules around it."""
    parts = path.split(".")
    return {".".join(parts[: i + 1]) for i in range(len(parts))}


def _roots(model: nn.Module, modules: dict[str, nn.Module], selector: str, option: str) -> set[str]:
    if selector in SECTIONS:
        return _section(model, selector, option)
    path = f"model.{selector}" if selector.isdecimal() else selector
    if path in modules:
        return {path}
    if typed := {p for p, m in modules.items() if type(m).__name__ == selector}:
        return typed
    try:
        pattern = re.compile(selector)
    except re.error as e:
        raise UsageError(f"'{option}={selector}' is no layer and is not a regular expression: {e}.") from e
    return {p for p in modules if pattern.fullmatch(p)}


def _section(model: nn.Module, name: str, option: str) -> set[str]:
    """Return the layers of the backbone, the neck or the head, as the model's YAML parts them."""
    yaml = manifest(model).yaml or getattr(model, "yaml", None)  # that of a pruned model holds the tripwire
    if not yaml or "backbone" not in yaml:
        raise UsageError(f"'{option}={name}' means nothing here: the model has no YAML. Give layer names.")
    neck, head = len(yaml["backbone"]), len(model.model) - 1
    return {f"model.{i}" for i in {"backbone": range(neck), "neck": range(neck, head), "head": [head]}[name]}


def producers(group: Group) -> list[str]:
    """Return the paths of the layers and norms that produce the channels of a group."""
    return [m.module for m in group.members if m.dim == "out"]


def _chosen(model: nn.Module, graph: Graph, selector: str, option: str) -> set[str]:
    """Return those producing layers of the graph that a selector means."""
    found = matches(model, selector, option) & {p for g in graph.groups for p in producers(g)}
    if not found:
        raise UsageError(f"'{option}={selector}' matches only modules that produce no channels of their own.")
    return found


def restrict(model: nn.Module, graph: Graph, cfg: PruneConfig) -> None:
    """Freeze the groups that `cfg.exclude` names or that `cfg.include` does not, and what must keep up with them.

    Args:
        model: The model that the graph was built from.
        graph: Its couplings; groups become frozen in it, with the reason.
        cfg: Pruning options.

    Raises:
        UsageError: If a selector is broken or matches nothing.
    """
    included: set[str] = set().union(*(_chosen(model, graph, s, "prune.include") for s in cfg.include))
    excluded: set[str] = set().union(*(_chosen(model, graph, s, "prune.exclude") for s in cfg.exclude))
    for bundle in graph.bundles:
        groups = [graph.groups[i] for i in bundle]
        layers = [p for g in groups for p in producers(g)]
        stays = next((p for p in layers if p in excluded), "")
        outside = bool(cfg.include) and included.isdisjoint(layers)
        for g in groups:
            if stays:
                own = excluded.issuperset(producers(g))
                reason = (
                    "is excluded by prune.exclude" if own else f"is coupled with {stays}, which prune.exclude keeps"
                )
                g.frozen = g.frozen or reason
            elif outside:
                g.frozen = g.frozen or "is not in prune.include"


def shares(model: nn.Module, graph: Graph, cfg: PruneConfig) -> dict[int, float]:
    """Return the share of channels that `cfg.ratios` removes, by place in `graph.bundles`.

    Args:
        model: The model that the graph was built from.
        graph: Its couplings, with all reasons for frozen groups.
        cfg: Pruning options.

    Raises:
        UsageError: If a selector is broken, matches nothing that can be pruned, or contradicts another one.
    """
    found: dict[int, tuple[float, str]] = {}
    for selector, share in cfg.ratios.items():
        layers = _chosen(model, graph, selector, "prune.ratios")
        hits = [i for i, b in enumerate(graph.bundles) if any(layers & set(producers(graph.groups[g])) for g in b)]
        free = [i for i in hits if not any(graph.groups[g].frozen for g in graph.bundles[i])]
        if not free:
            group = next(g for i in hits for j in graph.bundles[i] if (g := graph.groups[j]).frozen)
            raise UsageError(f"'prune.ratios={selector}' cannot be pruned: {group.name} {group.frozen}.")
        for i in free:
            other, by = found.setdefault(i, (share, selector))
            if other != share:
                name = graph.groups[graph.bundles[i][0]].name
                raise UsageError(
                    f"'prune.ratios' gives {name} two shares: {other:g} by '{by}' and {share:g} by '{selector}' "
                    "(coupled layers lose the same channels). Give one of them, or the same share in both."
                )
    return {i: share for i, (share, _) in found.items()}


def refuse_frozen(model: nn.Module, layers: list[str]) -> None:
    """Refuse to prune layers whose weights are frozen while others learn.

    Args:
        model: The model.
        layers: Paths of the layers and norms that would lose channels.

    Raises:
        UsageError: If some, but not all, of them have parameters without gradient.
    """
    modules = dict(model.named_modules())
    stuck = [p for p in layers if any(not w.requires_grad for w in modules[p].parameters(recurse=False))]
    if not stuck or len(stuck) == len(layers):  # a model loaded for inference has no gradients anywhere
        return
    top = sorted({".".join(p.split(".")[:2]) for p in stuck}, key=natural_key)
    keep = ", ".join(p.rpartition(".")[2] if p.startswith("model.") else p for p in top)
    raise UsageError(
        f"The model has frozen layers ({', '.join(top)}): they cannot recover from pruning. "
        f"Unfreeze them, or keep them whole with prune.exclude=[{keep}]."
    )
