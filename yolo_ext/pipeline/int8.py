# Copyright (C) yolo_ext authors. AGPL-3.0 licence.
"""The stages of `compress` that quantize: PTQ, mixed precision where PTQ misses its budget, QAT, and the proof."""

import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from copy import deepcopy
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from ultralytics.utils import LOGGER, colorstr

from yolo_ext import runs, stock
from yolo_ext.checkpoint import atomic_write, manifest, note
from yolo_ext.core.errors import CheckFailed
from yolo_ext.core.options import QuantConfig
from yolo_ext.data.check import calibration_images, letterbox_batches
from yolo_ext.deployment import verify as deployed
from yolo_ext.deployment.export import export_onnx
from yolo_ext.deployment.latency import saved_ms
from yolo_ext.deployment.runtime import conv_report
from yolo_ext.pipeline.run import QAT, Run, measure, train
from yolo_ext.quantization import search
from yolo_ext.quantization.calibrate import findings, inspect
from yolo_ext.quantization.fake_quant import insert_state
from yolo_ext.quantization.plan import table
from yolo_ext.quantization.qat import prepare, strip
from yolo_ext.quantization.qdq import write_qdq
from yolo_ext.quantization.spec import Profile, plan_of, resolve_profile
from yolo_ext.runs import Record
from yolo_ext.stock.accuracy import METRICS

LISTED = "quant.config_list gives it"  # start of the reason where that alone keeps a convolution float
PLANNED, BUDGET = "INT8 convolutions as planned", "Accuracy lost by INT8 (quant.max_drop)"
COLLAPSE = 0.05  # accuracy lost, or five budgets if that is more: no tuning of ranges brings this back
SHIFT = 0.1  # of the confidence with the best F1; its curve is flat there, and half as much is noise
LOOKED_AT = 32  # images for sensitivity, detectors and parity
SAYS = colorstr("quantize: ")
SATURATES = (
    "The INT8 kernels of this CPU compute something else than the file says: without VNNI, sums of 8-bit weights "
    "saturate. Take quant.profile=ort-x86, whose weights have 7 bits."
)


def ptq(run: Run) -> Record:
    """Calibrate the newest float model and write it as INT8, with the fewest layers float that hold the budget."""
    cfg, (model, args) = run.quant, deepcopy(run.load())
    assert cfg
    images = calibration_images(cfg.source or run.info, cfg.calib, cfg.seed)[:LOOKED_AT]
    batches = partial(letterbox_batches, images, run.imgsz, **stock.seen_by(model))
    prepare(model.to(run.device), cfg, run.info, run.imgsz)
    notes = told(findings(inspect(model, batches())), strict=False)
    strip(model)
    if cfg.config_list:
        LOGGER.info(table(plan_of(manifest(model).quant["state"]), manifest(model).quant["float"]))
    before, now, place = run.load()[0].state_dict(), model.cpu().state_dict(), ("ptq", "weights", "ptq.pt")
    changed = before.keys() != now.keys() or any(not torch.equal(v.float(), now[k].float()) for k, v in before.items())
    file = run.save(model, args, *place)
    weights = file if changed else run.weights()
    record = _emit(run, "ptq", weights, manifest(model).quant)
    lost = _loss(run, record, record)
    if cfg.mixed and cfg.mode != "qat" and lost > cfg.max_drop:
        mixed, more = _mixed(run, cfg, model.to(run.device), batches, record, lost)
        if mixed:
            run.save(model, args, *place)
            record = _emit(run, "ptq", weights, manifest(model).quant)
        notes.append(more)
    notes += [*(record.notes or []), *_problems(run, cfg, record)]
    return replace(record, notes=notes, weights=run.relative(file) if changed else None)


def _loss(run: Run, record: Record, reference: Record) -> float:
    """Return the largest loss of a metric of the task by the INT8 file of a stage against the FP32 file of another."""
    return run.lost(_measured(reference, "fp32"), _measured(record, "int8"))


def _measured(record: Record, kind: str) -> dict[str, Any]:
    """Return the metrics of the task of the `fp32` or the `int8` file of a stage, and where their evidence lies."""
    return {k.removesuffix("_onnx"): v[kind] for k, v in (record.metrics or {}).items() if k.endswith("_onnx")}


# Writing -------------------------------------------------------------------------------------------------------------
def _emit(run: Run, stage: str, weights: Path, quant: Mapping[str, Any]) -> Record:
    """Write FP32 and INT8 ONNX of float weights and their ranges, measure both, and keep what was quantized how."""
    model, int8 = run.load(weights)[0], run.folder / stage / "int8.onnx"
    fp32 = export_onnx(model, run.folder / stage / "fp32.onnx", run.imgsz, **run.graph)
    written = write_qdq(fp32, int8, quant["state"], resolve_profile(quant["profile"]))
    kept = {"fp32": f"{stage}/fp32.npz", "int8": f"{stage}/evidence.npz"}
    found = {kind: run.accuracy(file, kept[kind]) for kind, file in (("fp32", fp32), ("int8", int8))}
    proof = prove(int8, written["convs"], quant)
    m = measure(run, weights)
    m |= {"size_mb": runs.size_mb(int8), **onnx_figures(run, **found)}
    m |= {k: proof[k] for k in ("convs", "int8_convs")}
    f1 = {name: {k: f[k] for k in ("f1", "f1_conf")} for name, f in found.items() if "f1" in f}
    runs.write_json(run.folder / stage / "quant.json", {**quant, "float": {**written["float"], **quant["float"]}})
    notes = []
    if f1:
        old, new = (v["f1_conf"] for v in f1.values())
        if abs(new - old) > SHIFT:  # which mAP does not show
            moved = f"from {old:.2f} to {new:.2f}"
            notes.append(f"INT8 moved the confidence of the best F1 {moved}: change conf= by as much.")
    return Record(
        m, said=f"{stage.upper()} for {quant['profile']}", f1=f1,
        float={p: quant["float"].get(p, r) for p, r in written["float"].items()}, planned=proof["planned"],
        accidents=proof["accidents"], chosen=str(weights), calibration=quant.get("calibration"),
        profile=quant["profile"], notes=notes,
    )  # fmt: skip


def onnx_figures(run: Run, **found: dict[str, Any]) -> dict[str, dict[str, float]]:
    """Return the metrics of the task of ONNX files by kind, as `summary.json` holds them."""
    return {f"{k}_onnx": {kind: f[k] for kind, f in found.items()} for k in (*METRICS[run.task], "evidence")}


def prove(int8: Path, convs: Mapping[str, str], quant: Mapping[str, Any]) -> dict[str, Any]:
    """Count the convolutions, by node in `convs`, that a runtime runs in integers, and say why the others are float."""
    report, profile, state = conv_report(int8), resolve_profile(quant["profile"]), quant["state"]
    shown = profile.output or report["runtime"] == "OpenVINO"  # ONNX Runtime runs none in integers without Q behind it
    planned = [node for node, path in convs.items() if shown and path in state]
    failed = {n: _reason(state[convs[n]], why, profile) for n, why in report["float_convs"].items() if n in planned}
    reasons = {path: reason.partition(":")[0] for path, reason in quant.get("float", {}).items()}
    floats = Counter(reasons.get(path, "without ranges") for path in convs.values() if path not in state)
    floats.update({"planned as INT8": len(failed)} if failed else {})
    left = "; float: " + ", ".join(f"{n} {reason}" for reason, n in floats.most_common()) if floats else ""
    done = f"{report['int8_convs']} of {report['convs']} convolutions run as INT8 in {report['runtime']}"
    LOGGER.info(f"{SAYS}{done}{left}")
    found = {k: report[k] for k in ("runtime", "convs", "int8_convs")} | {"planned": len(planned) if shown else None}
    return {**found, "accidents": {convs[node]: why for node, why in failed.items()}}


def _reason(sites: Mapping[str, Mapping[str, Any]], seen: str, profile: Profile) -> str:
    """Return why a planned layer is float: what its own sites lack, else what was seen in the file."""
    wide, kernel = max(entry["bits"] for entry in sites.values()), seen.startswith("ONNX Runtime has no")
    missing = [site for site in ("weight", "output")[: 1 + bool(profile.output)] if site not in sites]
    missing += ["input"] if sites.keys() <= {"weight"} else []  # elsewhere it may arrive quantized
    lacks = f"no {' and no '.join(missing)}" if missing else f"ranges, but {seen}" if kernel else ""
    lacks = f"{wide} bits, for which ONNX Runtime has no integer convolution" if wide > 8 else lacks
    return f"{LISTED} {lacks}" if lacks else seen


def shortfall(found: Mapping[str, Any], profile: str) -> str:
    """Return how many convolutions are no integer ones against the plan, and why; "" where all are."""
    if found["planned"] is None:
        return (
            f"Profile '{profile}' is for another runtime, which alone can show how many convolutions it runs as INT8: "
            f"in ONNX Runtime {found['int8_convs']} of {found['convs']} are. For ONNX Runtime: quant.profile=auto."
        )
    reasons: dict[str, list[str]] = {}
    for path, reason in found["accidents"].items():
        reasons.setdefault(reason, []).append(path)
    told = "; ".join(f"{len(paths)} such as '{paths[0]}': {reason}" for reason, paths in reasons.items())
    count = f"{len(found['accidents'])} of {found['planned']} convolutions that should run as INT8 are float"
    where = f"in {found.get('runtime', 'ONNX Runtime')}"
    return f"{count} {where} ({told}). See quant.config_list and quant.profile." if told else ""


def told(problems: Iterable[str], strict: bool) -> list[str]:
    """Warn of problems, or fail with `quant.strict`, and return them."""
    problems = [problem for problem in problems if problem]
    if problems and strict:
        raise CheckFailed(" ".join(problems))
    for problem in problems:
        LOGGER.warning(f"quantize: {problem}")
    return problems


def _problems(run: Run, cfg: QuantConfig, record: Record) -> list[str]:
    """Warn of convolutions that are float against the plan and of a collapse; with `quant.strict` they fail."""
    found = {**(record.metrics or {}), "planned": record.planned, "accidents": record.accidents}
    problems = [shortfall(found, record.profile or "")]
    lost, limit = _loss(run, record, record), max(5 * cfg.max_drop, COLLAPSE)
    if lost > limit:
        problems.append(
            f"INT8 loses {lost:.4f} {run.metrics} (limit {limit:g}). Calibrate on more images like those of the val "
            "split, or find the layer with `yolo-ext sensitivity kind=quant`."
        )
    return told(problems, cfg.strict)


# Mixed precision -----------------------------------------------------------------------------------------------------
def _mixed(
    run: Run, cfg: QuantConfig, model: nn.Module, batches: Callable[[], Iterator[torch.Tensor]], plain: Record,
    lost: float,
) -> tuple[bool, str]:  # fmt: skip
    """Leave layers float until the budget holds, write which, and put the state into the manifest if it is better."""
    quant, folder, reference = manifest(model).quant, run.folder / "ptq", _measured(plain, "fp32")
    profile, budget = resolve_profile(quant["profile"]), f"quant.max_drop={cfg.max_drop:g}"
    LOGGER.info(f"{SAYS}PTQ loses {lost:.4f} {run.metrics}, more than {budget}: which layers are best left float?")
    ranked, states = _ranked(run, model, quant, batches()), {0: quant["state"]}

    def evaluate(excluded: list[str]) -> float:
        if not excluded:
            return lost
        states[len(excluded)] = search.leave_float(model, quant["state"], excluded, profile, cfg, batches)
        trial, kept = folder / "trial.onnx", folder / "trial.npz"
        write_qdq(folder / "fp32.onnx", trial, states[len(excluded)], profile)
        drop = run.lost(reference, run.accuracy(trial, run.relative(kept)))
        trial.unlink()
        kept.unlink()
        LOGGER.info(f"{SAYS}layers left float: {len(excluded)}, loss {drop:.4f} {run.metrics}")
        return drop

    most = len(ranked) if cfg.mode == "ptq" else len(ranked) // 2  # more would give away the speed; QAT comes next
    excluded, trace = search.fewest_float(ranked[:most], evaluate, cfg.max_drop)
    drop = next(t["drop"] for t in trace if t["float"] == len(excluded))
    runs.write_json(folder / "mixed.json", {"excluded": excluded, "drop": drop, "trace": trace})
    if drop > cfg.max_drop and cfg.mode != "ptq":
        return False, f"No {most} layers left float bring PTQ within {budget}."
    file = search.write_config_list(excluded, folder, cfg.config_list)[0]
    floats = {**quant["float"], **dict.fromkeys(excluded, f"float to hold {budget}")}
    note(model, quant={**quant, "state": states[len(excluded)], "float": floats})
    layers = sum("weight" in sites for sites in quant["state"].values())
    said = f"{len(excluded)} of {layers} layers stay float: the loss falls from {lost:.4f} to {drop:.4f} {run.metrics}"
    LOGGER.info(f"{SAYS}{said}; use them again with quant.config_list={file}")
    return bool(excluded), f"{said} (config_list.yaml)."


def _ranked(run: Run, model: nn.Module, quant: Mapping[str, Any], batches: Iterator[torch.Tensor]) -> list[list[str]]:
    """Return groups of layer paths, those first that are best left float, and write what each costs and gains."""
    folder, layers = run.folder / "ptq", [path for path, sites in quant["state"].items() if "weight" in sites]
    on_ort = resolve_profile(quant["profile"]).output
    costs = saved_ms(folder / "fp32.onnx", folder / "int8.onnx", layers, run.imgsz) if on_ort else None
    found = search.sensitivity(model, quant["state"], batches, costs=costs)
    search.write(found, folder)
    LOGGER.info(search.table(found, 5))
    return search.order(found)


# QAT and proof -------------------------------------------------------------------------------------------------------
def qat(run: Run) -> Record:
    """Train with fake-quant if PTQ misses the budget or QAT was asked for, and keep the better of both."""
    cfg, after_ptq = run.quant, run.done["ptq"]
    assert cfg
    lost = _loss(run, after_ptq, after_ptq)
    if cfg.mode == "auto" and lost <= cfg.max_drop:
        change = f"{'loses' if lost > 0 else 'gains'} {abs(lost):.4f} {run.metrics}"
        return Record(skipped=f"PTQ {change}, within quant.max_drop={cfg.max_drop:g}: no QAT")
    options: dict[str, Any] = {"quant": cfg}
    # Distillation belongs to the fine-tuning, where there is one; QAT learns from its float self then.
    if run.teaching and (cfg.supervision == "labels" or (cfg.supervision == "auto" and not run.epochs)):
        options["distill"] = run.teaching
    best = train(run, "qat", options, {**QAT, **run.native, "epochs": cfg.epochs, "lr0": cfg.lr0})
    record = _emit(run, "qat", best, manifest(run.load(best)[0]).quant)
    better = _loss(run, record, after_ptq) < lost
    if better:
        notes = [*(record.notes or []), *_problems(run, cfg, record)]
        record = replace(record, weights=run.relative(best), notes=notes)
    said = f"{record.said}, {cfg.epochs} epochs, {'better than PTQ' if better else 'no better than PTQ, which is kept'}"
    return replace(record, better=better, said=said)


def verify(run: Run) -> Record:
    """Put the delivered ONNX files into onnx/ and check them."""
    cfg, (stage, record) = run.quant, run.quantized()
    assert cfg and record.chosen
    files = {k: run.folder / "onnx" / f"{k}.onnx" for k in ("fp32", "int8")}
    for kind, file in files.items():
        atomic_write(file, (run.folder / stage / f"{kind}.onnx").read_bytes())
    model = run.load(Path(record.chosen))[0]
    fake, state = deepcopy(model), json.loads((run.folder / stage / "quant.json").read_text(encoding="utf-8"))["state"]
    insert_state(fake, state)  # the quantizers that the INT8 file was written from
    found = deployed.verify(
        model, files["fp32"], run.info["images"]["val"][:LOOKED_AT], run.imgsz, int8_onnx=files["int8"], data=run.data,
        fake_quant=fake, device=run.device,
    )  # fmt: skip
    lost, planned = _loss(run, record, run.done["ptq"]), record.planned or 0
    convs = (record.metrics or {})["int8_convs"]
    asked = sum(reason.startswith(LISTED) for reason in (record.accidents or {}).values())  # a warning has told
    least = max(planned - asked, 1) if planned else 0
    checks = [*found["checks"], {"name": PLANNED, "value": convs, "limit": least, "passed": convs >= least}]
    checks.append({"name": BUDGET, "value": lost, "limit": cfg.max_drop, "passed": lost <= cfg.max_drop})
    runs.write_json(run.folder / "verify" / "verify.json", {**found, "checks": checks})
    parity = {k: found["int8"][k] for k in ("torch", "rounding", "simulation", "float") if k in found["int8"]}
    unsound = any(not c["passed"] for c in found["checks"] if c["key"].startswith("int8_"))
    saturates = unsound and resolve_profile(record.profile or "").weight_bits >= 8
    return Record(checks=checks, parity=parity, notes=told([SATURATES] if saturates else [], strict=False))
