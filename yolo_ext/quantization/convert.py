# Copyright (C) yolo_ext authors. AGPL-3.0 licence.
"""Give what was quantized for one runtime to another, where that runtime then computes the same."""

from __future__ import annotations

from ultralytics.utils import LOGGER, colorstr

from yolo_ext.core.errors import UsageError
from yolo_ext.quantization.profiles import Profile
from yolo_ext.quantization.spec import State

IMAGE = ((0.0, 1.0), (-1.0, 1.0))  # ranges of the layer that reads the image


def convert(state: State, source: Profile, target: Profile) -> State:
    """Return the state for another profile than that it was made for.

    Scales and codes stay what they are: ranges need no change between signed and unsigned storage, a symmetric range is
    an asymmetric one whose zero has the middle code, and weights keep their bits where the target can run them. What
    the target does not execute is dropped, which means fewer roundings. What it could quantize besides stays float.

    Args:
        state: Specs and ranges.
        source: Profile that they were calibrated or trained for.
        target: Profile to write.

    Returns:
        A new state.

    Raises:
        UsageError: If the target would compute something else: it quantizes tensors that have no range here, has no
            zero points, or saturates with weights that wide.
    """
    if source.name == target.name:
        return state
    if problems := _problems(state, source, target):
        raise UsageError(
            f"What was quantized for {source.name} is not exact for {target.name}: {'; '.join(problems)}. "
            f"Give data= to calibrate again for quant.profile={target.name}, or train for it."
        )
    converted, dropped = {}, 0
    for path, sites in state.items():
        # Without a quantized activation behind it, readers may rely on the output's codes.
        drop = {"output"} if not target.output and ("activation" in sites or not source.functional) else set()
        dropped += len(drop & set(sites))
        if not _reads_image_too_wide(sites, target):
            converted[path] = {site: dict(entry) for site, entry in sites.items() if site not in drop}
    stem = len(state) - len(converted)
    if dropped or stem:
        said = [f"{dropped} roundings before activations are dropped"] if dropped else []
        said += [f"the layer that reads the image stays float (its weights have over {target.stem_bits} bits)"] * stem
        LOGGER.info(f"{colorstr('quantize: ')}{source.name} -> {target.name}: {', '.join(said)}; the rest is exact")
    return converted


def _problems(state: State, source: Profile, target: Profile) -> list[str]:
    """Return what keeps a state from being exact for the target, as parts of a sentence."""
    problems = []
    if target.output and not source.output:
        problems.append("no range for the sites 'output' (before the activations)")
    if target.functional and not source.functional:
        problems.append("no range for the sites 'activation' and 'add'")
    ranges = {f"{p} ({s})": entry for p, sites in state.items() for s, entry in sites.items() if s != "weight"}
    asymmetric = [name for name, entry in ranges.items() if not entry.get("symmetric")]
    if target.symmetric and asymmetric:
        problems.append(f"{len(asymmetric)} asymmetric ranges, such as that of {asymmetric[0]}")
    wide = [p for p, sites in state.items() if target.weight_bits < sites.get("weight", {}).get("bits", 0) <= 8]
    if wide:  # wider ones run in float and cannot saturate
        problems.append(f"{len(wide)} layers with weights of over {target.weight_bits} bits, such as {wide[0]}")
    return problems


def _reads_image_too_wide(sites: dict[str, dict], target: Profile) -> bool:
    reads_image = tuple(sites.get("input", {}).get(end) for end in ("lo", "hi")) in IMAGE
    return reads_image and (target.stem_bits or 16) < sites.get("weight", {}).get("bits", 0)
