# Copyright (C) yolo_ext authors. AGPL-3.0 licence.
"""Every order of the techniques, one after another and together: legal ones restore exactly, others say why not."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from ultralytics import YOLO
from ultralytics.nn.tasks import ClassificationModel, DetectionModel
from ultralytics.utils import YAML

import yolo_ext
from yolo_ext import cli, quantization
from yolo_ext.checkpoint import fingerprint, manifest, save_model
from yolo_ext.core.config import PruneConfig, QuantConfig
from yolo_ext.core.errors import UsageError
from yolo_ext.data.check import check_data
from yolo_ext.data.shapes import NAMES
from yolo_ext.pruning import prune_model, zero_weights
from yolo_ext.stock.load import load_model, yaml_model_load
from yolo_ext.training.quant import quantized

IMAGE = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(7))
PTQ = {"mode": "ptq", "calib": 4, "profile": "ort-x86", "max_drop": 1.0}
TOGETHER: dict[str, dict[str, Any]] = {  # options of one training, by step
    "sparsify": {"sparsity": {"method": "slim", "warmup": 0}},
    "prune": {"prune": {"ratio": 0.3, "method": "lamp", "recalibrate": 4}},
    "during": {"prune": {"ratio": 0.3, "method": "lamp", "recalibrate": 4, "at": [1], "images": 4}},
    "unstructured": {"prune": {"kind": "unstructured", "ratio": 0.5}},
    "distil": {"distill": {"teacher": "self", "preflight": False}},
    "qat": {"quant": {"mode": "qat", "calib": 4, "profile": "ort-x86"}},
}


@dataclass
class Tree:
    """The models that chains of steps lead to, each made once, and the message where a step is refused."""

    place: Path
    data: Path
    settings: dict[str, Any]
    made: dict[tuple[str, ...], Path | str] = field(default_factory=dict)
    checked: set[tuple[str, ...]] = field(default_factory=set)

    def base(self, family: str) -> Path:
        """Return a model of the YAML of a family, with half of its channels."""
        content = {k: v for k, v in yaml_model_load(f"{family}.yaml").items() if k not in ("yaml_file", "scale")}
        YAML.save(self.place / f"{family}.yaml", {**content, "scales": {"n": [0.33, 0.125, 512]}})
        torch.manual_seed(0)
        model = DetectionModel(str(self.place / f"{family}.yaml"), nc=len(NAMES), verbose=False)
        for m in model.modules():
            if isinstance(m, nn.BatchNorm2d):
                nn.init.uniform_(m.weight, 0.5, 1.5)
                nn.init.normal_(m.bias, 0, 0.1)
        model.names = dict(enumerate(NAMES))
        return save_model(model, self.place / family / "base.pt")

    def get(self, family: str, *steps: str) -> Path | str:
        """Return the model behind these steps, or why the last one is refused."""
        key = (family, *steps)
        if key not in self.made:
            if not steps:
                self.made[key] = self.base(family)
            else:
                source = self.get(family, *steps[:-1])
                assert isinstance(source, Path), f"{steps[:-1]}: {source}"
                try:
                    self.made[key] = self.step(steps[-1], source, self.place / "-".join(key))
                except UsageError as e:
                    self.made[key] = str(e).replace(str(self.place), "")
        return self.made[key]

    def step(self, names: str, source: Path, folder: Path) -> Path:
        """Do one step, or several that are joined by + in one training; the first of a chain as a user does it."""
        first = source.name == "base.pt"
        if names == "prune":
            cfg = {**TOGETHER["prune"]["prune"]}
            if first:
                yolo_ext.prune(source, epochs=0, imgsz=64, prune=cfg, save_dir=str(folder))
                return folder / "weights/best.pt"
            return save_model(prune_model(load_model(source)[0], PruneConfig(**cfg), 64), folder / "pruned.pt")
        if names == "ptq":
            return self.ptq(source, folder, first)
        options: dict[str, Any] = {}
        for name in names.split("+"):
            options |= TOGETHER[name]
        yolo = YOLO(str(source))
        yolo.train(trainer=yolo_ext.DetectionTrainer, **{**self.settings, "save_dir": str(folder)}, **options,
                   epochs=2 if "during" in names else 1)  # fmt: skip
        return Path(yolo.trainer.best)

    def ptq(self, source: Path, folder: Path, first: bool) -> Path:
        if first:
            yolo_ext.quantize(source, self.data, imgsz=64, quant=PTQ, batch=8, device="cpu", save_dir=str(folder))
            return folder / "ptq/weights/ptq.pt"
        model = load_model(source)[0]
        quantization.prepare(model, QuantConfig(**PTQ), check_data(self.data), 64)
        return save_model(quantization.strip(model), folder / "ptq.pt")


@pytest.fixture(scope="module")
def tree(tmp_path_factory, shapes, settings) -> Iterator[Tree]:
    from yolo_ext.pipeline import stages

    place = tmp_path_factory.mktemp("chains")
    entry = {"median": 1.0, "p10": 1.0, "p90": 1.0, "n": 10, "samples": [1.0] * 10}
    given = {k: v for k, v in settings(shapes, place).items() if k not in ("save_dir", "epochs")}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stages, "bench", lambda files, imgsz, **options: {name: entry for name in files})
        yield Tree(place, shapes, {**given, "batch": 8, "nbs": 8})


# What is compared ----------------------------------------------------------------------------------------------------
@torch.no_grad()
def said(model: nn.Module) -> list[torch.Tensor]:
    """Return all that a model says of two images, in a fixed order."""

    def tensors(found: Any) -> Iterator[torch.Tensor]:
        if isinstance(found, torch.Tensor):
            yield found
        elif isinstance(found, (dict, list, tuple)):
            for item in found.values() if isinstance(found, dict) else found:
                yield from tensors(item)

    return list(tensors(model.float().eval()(IMAGE)))


def assert_same(found: list[torch.Tensor], expected: list[torch.Tensor]) -> None:
    assert len(found) == len(expected) > 0
    assert all(torch.equal(a, b) for a, b in zip(found, expected)), "the output differs"
    assert all(v.isfinite().all() for v in found)


def assert_restored(file: Path, folder: Path) -> None:
    """Read a file by stock code and ours, save it by both and read that again: the bits of the output stay."""
    model = load_model(file)[0]
    expected, notes = said(model), manifest(model)
    assert_same(said(YOLO(str(file)).model), expected)
    ours = save_model(load_model(file)[0], folder / "ours.pt")
    YOLO(str(file)).save(folder / "stock.pt")
    for copy in (ours, folder / "stock.pt"):
        assert_same(said(load_model(copy)[0]), expected)
        assert_same(said(YOLO(str(copy)).model), expected)
        assert manifest(load_model(copy)[0]) == notes
        if notes.quant:
            assert_same(said(quantized(copy)), said(quantized(file)))


def figures(file: Path) -> tuple[int, int, set[str]]:
    """Return parameters, zeros under masks, and what the manifest tells of."""
    model = load_model(file)[0]
    notes = manifest(model)
    zeros = sum(int((model.get_submodule(p).weight == 0).sum()) for p in notes.masks.get("layers", ()))
    return sum(p.numel() for p in model.parameters()), zeros, {k for k in NOTES if getattr(notes, k)}


def assert_done(steps: str, before: Path, after: Path) -> None:
    """Compare a model before and after a step: it did its work, and what was done before is still there."""
    (params, zeros, notes), (left, more, found) = figures(before), figures(after)
    wanted = {NOTE[step] for step in steps.split("+")} - {""}
    cuts = {"prune", "during"} & {*steps.split("+")}
    assert left < params if cuts else left == params
    assert found == (notes - {"quant"}) | wanted  # ranges are forgotten by a float training, which moves away from them
    assert more >= zeros or (cuts and more > 0) or not zeros
    if steps != "ptq":
        assert fingerprint(load_model(after)[0]) != fingerprint(load_model(before)[0])


def assert_exported(tree: Tree, file: Path) -> None:
    """Export a model and compare its files with it: FP32 with torch, INT8 with its simulation, by `verify`."""
    files = yolo_ext.export(file, out=file.with_name("exported.onnx"), imgsz=64, save_dir=str(file.parent / "e"))[
        "files"
    ]
    assert len(files) == 1 + bool(manifest(load_model(file)[0]).quant)
    int8 = {"int8": files[1]} if len(files) > 1 else {}
    yolo_ext.verify(file, files[0], data=tree.data, save_dir=str(file.parent / "v"), device="cpu", **int8)


# Legal ---------------------------------------------------------------------------------------------------------------
NOTE = {"sparsify": "sparsity", "prune": "prune", "during": "prune", "unstructured": "masks", "distil": "",
        "ptq": "quant", "qat": "quant"}  # fmt: skip
NOTES = ("sparsity", "prune", "masks", "quant")
# By family; of one line with + in it, several are done in one training. The last ones of yolov8n are of the matrix.
CHAINS = {
    "yolov8n": """
        sparsify > prune > distil > ptq > export
        sparsify > prune > distil > qat > export
        sparsify > during
        sparsify > unstructured
        prune > sparsify
        prune > distil > unstructured > ptq > export
        prune > during
        prune > unstructured > export
        prune > qat
        distil > prune > export
        distil > unstructured
        during > distil
        during > prune
        during > unstructured > qat > export
        unstructured > prune
        unstructured > during > export
        unstructured > distil
        ptq > during
        ptq > distil
        qat > unstructured
        qat > ptq > export
    """,
    "yolo11n": """
        sparsify+prune+distil > ptq > export
        sparsify+during+distil > qat
        sparsify+unstructured+distil
        prune+distil+qat > export
        unstructured+distil+qat
    """,
    "yolo26n": """
        prune+distil > qat > export
        during > distil > ptq > export
    """,
}
MORE = """
        sparsify > ptq
        sparsify > qat
        sparsify > distil
        prune > distil > qat
        prune > ptq
        distil > sparsify
        distil > during
        distil > ptq
        distil > qat
        during > sparsify
        during > ptq
        during > qat
        unstructured > sparsify
        unstructured > ptq
        unstructured > qat
        ptq > sparsify
        ptq > unstructured
        ptq > qat > export
        qat > sparsify
        qat > distil
        qat > during
"""


def chains(text: str) -> list[tuple[str, ...]]:
    return [tuple(line.strip().split(" > ")) for line in text.strip().splitlines()]


LEGAL = [(family, steps) for family, text in CHAINS.items() for steps in chains(text)]
ALL = [pytest.param(f, s, id=f"{f}: {' > '.join(s)}", marks=pytest.mark.slow) for f, s in LEGAL]
ALL += [pytest.param("yolov8n", s, id=f"yolov8n: {' > '.join(s)}", marks=pytest.mark.matrix) for s in chains(MORE)]


@pytest.mark.parametrize(("family", "steps"), ALL)
def test_legal_chains_restore_exactly(tree, tmp_path, record_property, family, steps):
    record_property("reliability", f"{len(LEGAL)} legal chains, saved and restored with identical output")
    for k, step in enumerate(steps):
        before = tree.get(family, *steps[:k])
        if step == "export":
            assert_exported(tree, before)
        elif (key := (family, *steps[: k + 1])) not in tree.checked:
            after = tree.get(*key)
            assert isinstance(after, Path), f"{step}: {after}"
            assert_done(step, before, after)
            assert_restored(after, tmp_path)
            tree.checked.add(key)


# Illegal -------------------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def files(tree) -> dict[str, str]:
    """Return a model as it can be of no more use for some steps, by what was done to it."""
    base, place = tree.get("yolov8n"), tree.place / "illegal"
    assert isinstance(base, Path)
    fused = save_model(load_model(base)[0].fuse(verbose=False), place / "fused.pt")
    pattern = load_model(base)[0]
    zero_weights(pattern, PruneConfig(kind="2:4"))
    classifier = ClassificationModel("yolov8n-cls.yaml", nc=len(NAMES), verbose=False)
    classifier.task, classifier.names = "classify", dict(enumerate(NAMES))
    made = {"pattern": save_model(pattern, place / "pattern.pt"), "classifier": save_model(classifier, place / "c.pt")}
    found = {"base": base, "fused": fused, "data": tree.data, "yaml": tree.place / "yolov8n.yaml", **made}
    return {k: str(v) for k, v in found.items()}


@pytest.fixture(scope="module")
def exported(tree, files) -> dict[str, str]:
    """Return the same with a quantized model, its ONNX files, and a checkpoint with its fake quantizers inside."""
    ptq = tree.ptq(Path(files["base"]), tree.place / "illegal", first=False)
    fp32, int8 = yolo_ext.export(ptq, imgsz=64, save_dir=str(tree.place / "illegal/run"))["files"]
    fake = ptq.with_name("fake.pt")
    torch.save({**load_model(ptq)[1], "model": quantized(ptq)}, fake)
    return {**files, "ptq": str(ptq), "onnx": str(fp32), "int8": str(int8), "fake": str(fake)}


PRUNE = "imgsz=64 epochs=0 prune.ratio=0.3 prune.method=lamp"
CANNOT = (
    "Cannot load model '{}'. Legal: a trained YOLO '.pt' or a model '.yaml'; for an exported file, the .pt that it "
    "was written from."
)
QUANTIZED = "The model is quantized: its ranges belong to the channels that it has. Prune the float .pt, then quantize."
PATTERN = "The weights have a 2:4 pattern, which channels that go would break. Prune first."
OURS = (
    "'{}' is not loaded: it holds yolo_ext.quantization.layers.QuantConv2d, which is no part of a YOLO and could do "
    "anything. If you know who wrote it, add trust=True; name layers of your own by modules=package.module."
)
COMMANDS = {
    "2:4 > prune": (f"prune model={{pattern}} {PRUNE}", PATTERN),
    "fused > prune": (
        f"prune model={{fused}} {PRUNE}",
        "The model is fused (BatchNorm folded into the convs). Prune the unfused .pt.",
    ),
    "during without epochs": (
        f"prune model={{base}} {PRUNE} prune.every=1",
        "'epochs=0' trains nothing, so there are no epochs to prune in. Leave prune.at or every out.",
    ),
    "prune by slim without sparsify": (
        f"prune model={{base}} {PRUNE.replace('lamp', 'slim')}",
        "'prune.ratio=0.3' by 'slim' removes 624 channels, of which 100% are still in use. The model was trained "
        "without sparsity.method=slim: 0% of its channels are near zero. Train with sparsity.method=slim first, take "
        "prune.method=taylor or lamp, or prune all the same with prune.force=True.",
    ),
    "float > export with ranges": (
        "export model={base} quant.profile=ort-x86",
        "'quant' options are for an INT8 file. Add int8=True, and data=data.yaml to calibrate on.",
    ),
    "float > INT8 without images": (
        "export model={base} int8=True",
        "int8=True needs images to calibrate on. Give data=data.yaml.",
    ),
}
OF_EXPORTED = {
    "ptq > prune": (f"prune model={{ptq}} {PRUNE}", QUANTIZED),
    "ptq > analyze": ("analyze model={ptq}", QUANTIZED),
    "export > prune": (f"prune model={{onnx}} {PRUNE}", CANNOT.format("{onnx}")),
    "export > ptq": ("quantize model={onnx} data={data}", CANNOT.format("{onnx}")),
    "INT8 > ptq": ("quantize model={int8} data={data}", CANNOT.format("{int8}")),
    "INT8 > sparsify": ("train model={int8} data={data} epochs=1 sparsity=True", CANNOT.format("{int8}")),
    "INT8 > export": ("export model={int8}", CANNOT.format("{int8}")),
    "fake quantizers > qat": ("train model={fake} data={data} epochs=1 quant.mode=qat", OURS.format("{fake}")),
    "fake quantizers > ptq": ("quantize model={fake} data={data}", OURS.format("{fake}")),
    "float > INT8 and FP16": (
        "export model={ptq} int8=True half=True",
        "half=True and int8=True exclude each other: give one of them.",
    ),
    "INT8 as the float file": (
        "verify model={base} onnx={int8} data={data}",
        "'{int8}' is quantized. Give the FP32 file it was made from as onnx= and it as int8=.",
    ),
}
CUT = {**TOGETHER["during"], "epochs": 2}
TRAININGS: dict[str, tuple[str, dict[str, Any], str]] = {
    "during + qat": (
        "base", {**CUT, **TOGETHER["qat"]},
        "Pruning while training and QAT are both on: ranges belong to the channels that are there. Prune first, then "
        "train with quant.*; `yolo-ext compress` does both in this order.",
    ),
    "sparsify + qat": (
        "base", {**TOGETHER["sparsify"], **TOGETHER["qat"]},
        "Sparsity training and QAT are both on: ranges are made for a model that nothing pulls to zero. Make it "
        "sparse first, then train with quant.*.",
    ),
    "ptq in a training": (
        "base", {"quant": {"mode": "ptq"}},
        "'quant.mode=ptq' does not train. Use `yolo-ext quantize`, or quant.mode=qat to train.",
    ),
    "during behind the end": (
        "base", {**CUT, "epochs": 1},
        "'prune.at=[1]' lies outside a run of 1 epochs. Legal: 0 to 0. Lower it or raise epochs.",
    ),
    "sparsify + during at once": (
        "base", {**TOGETHER["sparsify"], "prune": {"ratio": 0.3, "at": [0]}},
        "'sparsity.start=0' leaves no epoch for sparsity training: the first pruning is at epoch 0. Lower it, raise "
        "epochs, or prune later.",
    ),
    "2:4 > during": ("pattern", CUT, PATTERN),
    "distil from another task": (
        "base", {"distill": {"teacher": "{classifier}"}},
        "Teacher '{classifier}' has the task classify, the student detect. Give one with the same.",
    ),
    "distil from itself without weights": (
        "yaml", TOGETHER["distil"],
        "'distill.teacher=self' needs a trained model, but 'model={yaml}' has no weights. Give model=best.pt, or "
        "distill.teacher=bigger.pt.",
    ),
    "qat from features + distil from labels": (
        "base", {**TOGETHER["distil"], "quant": {"mode": "qat", "supervision": "features"}},
        "'quant.supervision=features' trains without labels, but 'distill.alpha=1' weighs them. Set distill.alpha=0, "
        "or leave quant.supervision out.",
    ),
}  # fmt: skip
FIGURE = f"{len(COMMANDS) + len(OF_EXPORTED) + len(TRAININGS)} illegal chains, each refused with its exact reason"


def assert_refused(words: str, message: str, files: dict[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(words.format(**files).split()) == 2
    assert capsys.readouterr().err == f"yolo-ext: {message.format(**files)}\n"


@pytest.mark.parametrize(("words", "message"), COMMANDS.values(), ids=COMMANDS)
def test_illegal_commands_say_why_not(files, capsys, record_property, words, message):
    record_property("reliability", FIGURE)
    assert_refused(words, message, files, capsys)


@pytest.mark.slow
@pytest.mark.parametrize(("words", "message"), OF_EXPORTED.values(), ids=OF_EXPORTED)
def test_what_is_exported_or_quantized_says_why_not(exported, capsys, words, message):
    assert_refused(words, message, exported, capsys)


@pytest.mark.parametrize(("model", "options", "message"), TRAININGS.values(), ids=TRAININGS)
def test_illegal_trainings_say_why_not(tree, files, tmp_path, model, options, message):
    given = {k: {n: files.get(str(v).strip("{}"), v) for n, v in o.items()} if isinstance(o, dict) else o
             for k, o in {"epochs": 1, **options}.items()}  # fmt: skip
    with pytest.raises(UsageError) as refused:
        YOLO(files[model]).train(
            trainer=yolo_ext.DetectionTrainer, **{**tree.settings, "save_dir": str(tmp_path), **given}
        )
    assert str(refused.value) == message.format(**files)
