# Copyright (C) yolo_ext authors. AGPL-3.0 licence.
"""Pruning through the command line: targets, scope, analyze, sensitivity, masks, tasks, and what is refused."""

from __future__ import annotations

import json
import shutil
from copy import deepcopy
from pathlib import Path

import pytest
import torch
from ultralytics import YOLO
from ultralytics.nn.tasks import ClassificationModel, DetectionModel, RTDETRDetectionModel, SegmentationModel
from ultralytics.utils import SETTINGS, YAML

from yolo_ext import cli, stock
from yolo_ext.checkpoint import note, save_model
from yolo_ext.pruning import analyze as curves
from yolo_ext.pruning.masks import sparsity
from yolo_ext.stock.load import load_model

D = "data=shapes/data.yaml"
NO_DATA = "prune model=tiny.pt imgsz=64 epochs=0 "
FEW = "prune.images=4 prune.recalibrate=4 "
TRAINED = f"prune model=tiny.pt {D} imgsz=64 device=cpu workers=0 plots=False {FEW}"
SENSITIVITY = f"sensitivity model=tiny.pt {D} imgsz=64 ratios=0.5 prune.include=neck {FEW}"


@pytest.fixture
def prune(run):
    """Return a function that runs a command and returns its run folder."""

    def succeed(words: str, name: str = "run") -> Path:
        status, folder, said = run(words, name)
        assert status == 0, said
        return folder

    return succeed


def layers(folder: Path, stage: str = "prune") -> dict[str, dict]:
    return {r["name"]: r for r in json.loads((folder / stage / "stage.json").read_text())["layers"]}


def cut(folder: Path, stage: str = "prune") -> set[str]:
    """Return the layers that lost channels."""
    return {name for name, r in layers(folder, stage).items() if r["after"] < r["before"]}


# How far -------------------------------------------------------------------------------------------------------------
@pytest.mark.slow
@pytest.mark.parametrize(
    ("words", "figure", "value"),
    [("prune.speedup=1.5", "gflops", 1.5), ("prune.params=2", "params", 2.0), ("prune.size_mb=0.4", "size_mb", None)],
)
def test_targets_of_the_structure_are_met_within_one_percent(prune, words, figure, value):
    summary = json.loads((prune(NO_DATA + words) / "summary.json").read_text())
    before, after = summary["before"][figure], summary["after"][figure]
    assert (before / after if value else after) == pytest.approx(value or 0.4, rel=0.01)


@pytest.mark.slow
@pytest.mark.parametrize("runtime", ["ort", "torch"])
def test_latency_is_what_the_chosen_runtime_measures(run, monkeypatch, runtime):
    """The clock of a busy machine is replaced by FLOPs."""
    seen = []

    def clock(dense, pruned, imgsz, runtime):
        seen.append((imgsz, runtime))
        return stock.gflops(dense, imgsz) / stock.gflops(pruned, imgsz)

    monkeypatch.setattr("yolo_ext.training.prune._speed", clock)
    status, folder, said = run(NO_DATA + f"prune.latency=1.5 prune.runtime={runtime}")
    assert status < 2, said  # 1 where ONNX Runtime, timed at the end, is not as fast as FLOPs say
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["before"]["gflops"] / summary["after"]["gflops"] == pytest.approx(1.5, rel=0.05)
    assert set(seen) == {(64, runtime)}


def may_go(row: dict) -> bool:
    """Tell whether channels of a layer can be pruned, whether or not some were."""
    return row["before"] > 3 and not any(w in row["reason"] for w in ("output of the model", "prune.include"))


@pytest.mark.slow
def test_the_share_of_channels_is_that_of_all_that_may_go(prune):
    rows = layers(prune(NO_DATA + "prune.ratio=0.25 prune.round_to=1 prune.min_channels=1"))
    free = [r for r in rows.values() if may_go(r)]
    gone = sum(r["before"] - r["after"] for r in free) / sum(r["before"] for r in free)
    assert gone == pytest.approx(0.25, abs=0.03)  # coupled layers count once for the target


# Which ---------------------------------------------------------------------------------------------------------------
@pytest.mark.slow
def test_one_conv_loses_80_percent_and_nothing_else_changes(prune, tiny):
    folder = prune(NO_DATA + "prune.ratios={'model.13.cv2.0.0':0.8} prune.round_to=1 prune.min_channels=1")
    assert cut(folder) == {"model.13.cv2.0.0.conv"}
    assert layers(folder)["model.13.cv2.0.0.conv"]["after"] == 13  # of 64
    before, after = (load_model(f)[0].state_dict() for f in (tiny, folder / "weights/best.pt"))
    kept = json.loads((folder / "prune/plan.json").read_text())["kept"]["model.13.cv2.0.0.conv"]["out"]
    assert before.keys() == after.keys()
    for key, old in before.items():
        if key.startswith("model.13.cv2.0.0.") and old.ndim:
            old = old[kept]
        elif key == "model.13.cv2.0.1.conv.weight":
            old = old[:, kept]
        assert torch.equal(old, after[key]), key


@pytest.mark.slow
@pytest.mark.parametrize(
    ("words", "inside"),
    [
        ("prune.include=head", lambda p: p.startswith("model.13.")),
        ("prune.include=[5,'model.13.cv2.*']", lambda p: p.startswith(("model.5.", "model.13.cv2."))),
        ("prune.exclude=[head,SPPF]", lambda p: not p.startswith(("model.13.", "model.6."))),
    ],
    ids=["a section", "index and expression", "section and type stay"],
)
def test_only_the_chosen_layers_lose_channels(prune, words, inside):
    found = cut(prune(NO_DATA + "prune.ratio=0.3 " + words))
    assert found and all(inside(p) for p in found)


@pytest.mark.slow
def test_what_a_choice_is_coupled_with_is_reported(prune):
    folder = prune(NO_DATA + "prune.ratio=0.3 prune.include=model.2.m.0.cv2 prune.round_to=1 prune.min_channels=1")
    assert layers(folder)["model.2.m.0.cv2.conv"]["coupled"] == ["model.2.cv1.conv"]
    assert {"model.2.m.0.cv2.conv", "model.2.cv1.conv"} == cut(folder)
    report = json.loads((folder / "report.json").read_text())
    assert any(r["coupled"] for r in report["layers"]) and "model.2.cv1.conv" in (folder / "report.html").read_text()


@pytest.mark.slow
def test_local_takes_the_same_share_everywhere(prune):
    rows = layers(prune(NO_DATA + "prune.ratio=0.5 prune.scope=local prune.round_to=1 prune.min_channels=1"))
    shares = {r["after"] / r["before"] for r in rows.values() if may_go(r)}
    assert shares == {0.5}


@pytest.mark.slow
def test_isomorphic_meets_the_target(prune):
    summary = json.loads((prune(NO_DATA + "prune.speedup=1.5 prune.scope=isomorphic") / "summary.json").read_text())
    assert summary["before"]["gflops"] / summary["after"]["gflops"] == pytest.approx(1.5, rel=0.01)


# Analyze and sensitivity ---------------------------------------------------------------------------------------------
def test_analyze_lists_every_group(prune, caplog):
    folder = prune("analyze model=tiny.pt imgsz=64")
    rows = json.loads((folder / "groups.json").read_text())
    assert set(rows[0]) == {"name", "part", "layers", "readers", "channels", "flops_share", "latency_share",
                            "prunable", "reason"}  # fmt: skip
    assert all(r["prunable"] != bool(r["reason"]) for r in rows)
    convs = {p for p, m in load_model("tiny.pt")[0].named_modules() if isinstance(m, torch.nn.Conv2d)}
    assert {p for r in rows for p in r["layers"]} == convs
    assert 0.9 < sum(r["flops_share"] for r in rows) <= 1.001
    first = next(r for r in rows if r["name"] == "model.2.cv2.conv")
    assert first["readers"] == ["model.3.conv"] and first["channels"] == 16
    assert all(r["name"] in caplog.text for r in rows) and "it is an output of the model" in caplog.text


@pytest.mark.slow
def test_sensitivity_writes_curves_that_pruning_takes(prune):
    floors = "prune.round_to=1 prune.min_channels=1 "
    folder = prune(SENSITIVITY.replace("ratios=0.5", "ratios=0.5,0.25") + floors, "curves")
    found = json.loads((folder / "sensitivity.json").read_text())
    assert found["complete"] and found["ratios"] == [0.25, 0.5] and found["metric"] == "mAP50-95"
    losses = {"box_loss", "cls_loss", "dfl_loss"}
    assert losses <= set(found["base"]) and all(losses <= set(p) for g in found["groups"] for p in g["curve"])
    rows = (folder / "sensitivity.csv").read_text().splitlines()
    assert len(rows) == 1 + sum(len(g["curve"]) for g in found["groups"]) > 10
    assert (folder / "sensitivity.png").read_bytes().startswith(b"\x89PNG")

    # The drops of a model without training say nothing: curves are made up, in which one layer is precious.
    base = found["base"]["map"]
    for g in found["groups"]:
        for p in g["curve"]:
            p["map"] = base - (0.5 if g["name"] == "model.10.conv" else 0.01) * p["ratio"]
    (folder / "made_up.json").write_text(json.dumps(found))
    rows = layers(
        prune(NO_DATA + floors + f"prune.include=neck prune.ratio=0.3 prune.sensitivity={folder / 'made_up.json'}")
    )
    share = {p: r["after"] / r["before"] for p, r in rows.items() if may_go(r)}
    assert share["model.10.conv"] > 0.95 and sorted(share.values())[len(share) // 2] < 0.9


@pytest.mark.slow
def test_sensitivity_goes_on_where_it_was_killed(place, prune, monkeypatch):
    whole = json.loads((prune(SENSITIVITY, "whole") / "sensitivity.json").read_text())
    measure, calls = curves._measure, []

    def killed(*args):
        calls.append(1)
        if len(calls) == 6:
            raise KeyboardInterrupt
        return measure(*args)

    again = [*SENSITIVITY.split(), f"project={place}", "name=part", "exist_ok=True"]
    with monkeypatch.context() as m:
        m.setattr(curves, "_measure", killed)
        assert cli.main(again) == 130
    part = json.loads((place / "part/sensitivity.json").read_text())
    assert len(part["groups"]) == 4 and not part["complete"]
    calls.clear()
    monkeypatch.setattr(curves, "_measure", lambda *args: calls.append(1) or measure(*args))
    assert cli.main(["sensitivity", f"resume={place / 'part'}"]) == 0
    assert len(calls) == 1 + len(whole["groups"]) - 4
    assert json.loads((place / "part/sensitivity.json").read_text()) == whole


@pytest.mark.slow
def test_sensitivity_of_other_options_is_not_mixed_in(prune, capsys):
    folder = prune(SENSITIVITY + "prune.include=5", "a")
    before = (folder / "sensitivity.json").read_text()
    words = [*SENSITIVITY.split(), "prune.include=3", f"project={folder.parent}", "name=a", "exist_ok=True"]
    assert cli.main(words) == 2
    assert "belongs to another model, other options or other data" in capsys.readouterr().err
    assert (folder / "sensitivity.json").read_text() == before


# Masks, tasks --------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("words", "share"), [("prune.kind=unstructured prune.ratio=0.7", 0.7), ("prune.kind=2:4", 0.5)], ids=["70 %", "2:4"]
)
def test_masks_without_training(prune, words, share):
    folder = prune(NO_DATA + words)
    assert sparsity(load_model(folder / "weights/best.pt")[0])["masked"] == pytest.approx(share, abs=0.002)
    masks = json.loads((folder / "prune/masks.json").read_text())
    assert masks["masked"] == pytest.approx(share, abs=0.002) and len(masks["eligible"]) > 30
    assert "not time" in (folder / "report.html").read_text()
    assert not (folder / "compare").exists()  # no smaller structure to compare


def by_ultralytics(file: Path, task: str):
    return YOLO(str(file), task=task).predict(torch.rand(1, 3, 64, 64), imgsz=64, device="cpu", verbose=False)[0]


@pytest.mark.slow
@pytest.mark.parametrize("epochs", [0, 1])
@pytest.mark.parametrize("kind", ["segment", "classify"])
def test_other_tasks(place, prune, randomise, kind, epochs):
    torch.manual_seed(0)
    if kind == "classify":
        for i, image in enumerate(sorted(place.joinpath("shapes").rglob("*.jpg"))):
            for split in ("train", "val"):
                folder = Path("classes", split, f"c{i % 3}")
                folder.mkdir(parents=True, exist_ok=True)
                shutil.copy(image, folder)
        model, data = ClassificationModel("yolov8n-cls.yaml", nc=3, verbose=False), "classes"
    else:
        for f in Path("shapes/labels").rglob("*.txt"):
            rows = [[float(v) for v in line.split()] for line in f.read_text().splitlines()]
            f.write_text("\n".join(f"{int(c)} {x - w / 2} {y - h / 2} {x + w / 2} {y - h / 2} {x + w / 2} {y + h / 2}"
                                   for c, x, y, w, h in rows))  # fmt: skip
        model, data = SegmentationModel("yolo11n-seg.yaml", nc=3, verbose=False), "shapes/data.yaml"
    model.task = kind
    save_model(randomise(model), Path("model.pt"))
    words = TRAINED.replace("tiny.pt", "model.pt").replace(D, f"data={data}")
    folder = prune(words + f"epochs={epochs} prune.speedup=1.5")
    assert by_ultralytics(folder / "weights/best.pt", kind) is not None
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["before"]["gflops"] / summary["after"]["gflops"] == pytest.approx(1.5, rel=0.01)
    assert list(summary["stages"]) == ["base", "prune", *["finetune"] * epochs]
    judged, other = ("top1", "map") if kind == "classify" else ("map", "top1")
    assert all(m[judged] is not None and m[other] is None for m in (summary["before"], summary["after"]))


# Wrong input ---------------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def folder(tiny, shapes, tmp_path_factory) -> Path:
    """Return a folder with models and files that must be refused; no test leaves anything in it."""
    place = tmp_path_factory.mktemp("wrong")
    shutil.copy(tiny, place / "tiny.pt")
    shutil.copytree(shapes.parent, place / "shapes")
    YAML.save(place / "shapes/data.yaml", {**YAML.load(shapes), "path": str(place / "shapes")})
    model = load_model(tiny)[0]
    fused = deepcopy(model).eval()
    fused.fuse(verbose=False)
    torch.save({"model": fused, "epoch": -1, "train_args": {"imgsz": 64}}, place / "fused.pt")
    note(model, quant={"ranges": {}, "profile": "ort-x86"})
    save_model(model, place / "quant.pt")
    group = {"name": "model.99.conv", "channels": 8, "curve": [{"ratio": 0.5, "map": 0.1}]}
    (place / "other.json").write_text(json.dumps({"base": {"map": 0.1}, "groups": [group]}))
    (place / "junk.json").write_text("[1]")
    return place


@pytest.fixture
def broken(folder, monkeypatch) -> Path:
    monkeypatch.chdir(folder)
    monkeypatch.setitem(SETTINGS, "runs_dir", str(folder / "runs"))
    return folder


S = NO_DATA + "prune.speedup=1.5 "
T = f"train model=tiny.pt {D} imgsz=64 device=cpu epochs=2 prune.speedup=1.5 "
CASES = {
    # values
    "ratio 1": (NO_DATA + "prune.ratio=1.0", ["prune.ratio=1.0", "below 1"]),
    "ratio negative": (NO_DATA + "prune.ratio=-0.1", ["prune.ratio=-0.1", "at least 0"]),
    "share 1": (NO_DATA + "prune.ratios={'9':1.0}", ["prune.ratios", "below 1"]),
    "share beyond the floor": (NO_DATA + "prune.ratios={'model.9.cv1':0.95}", ["0.95", "at most 0.5", "min_channels"]),
    "unknown scope": (S + "prune.scope=globl", ["globl", "'global'"]),
    "unknown kind": (S + "prune.kind=unstructred", ["unstructred", "'unstructured'"]),
    "unknown runtime": (NO_DATA + "prune.latency=1.5 prune.runtime=onnx", ["onnx", "ort, torch"]),
    "2:4 with a share": (NO_DATA + "prune.kind=2:4 prune.ratio=0.5", ["2:4", "prune.ratio"]),
    "masks for speed": (NO_DATA + "prune.kind=unstructured prune.speedup=2", ["unstructured", "prune.ratio"]),
    # targets
    "speedup": (NO_DATA + "prune.speedup=50", ["prune.speedup=50", "at most", "prune.max_ratio"]),
    "params": (NO_DATA + "prune.params=50", ["prune.params=50", "at most", "prune.max_ratio"]),
    "size": (NO_DATA + "prune.size_mb=0.01", ["prune.size_mb=0.01", "at least"]),
    "size passed": (NO_DATA + "prune.size_mb=100", ["prune.size_mb=100", "before anything is pruned"]),
    "speedup for one layer": (S + "prune.include=5", ["prune.speedup=1.5", "at most"]),
    "drop of an untrained model": (TRAINED + "epochs=0 prune.max_drop=0.01", ["prune.max_drop=0.01", "Train it first"]),
    # selectors
    "nothing left": (S + "prune.include=backbone prune.exclude=backbone", ["Nothing can be pruned", "excluded"]),
    "no such type": (S + "prune.include=C3k3", ["prune.include=C3k3", "matches no layer"]),
    "no such layer": (NO_DATA + "prune.ratios={'model.99':0.5}", ["model.99", "matches no layer"]),
    "broken expression": (S + "prune.exclude=['model.(']", ["prune.exclude=model.(", "regular expression"]),
    "masks on no layer": (NO_DATA + "prune.kind=2:4 prune.include=zzz", ["prune.include=zzz", "matches no layer"]),
    # models
    "fused": (S.replace("tiny", "fused"), ["fused"]),
    "fused for masks": (NO_DATA.replace("tiny", "fused") + "prune.kind=2:4", ["fused"]),
    "fused for analyze": ("analyze model=fused.pt imgsz=64", ["fused"]),
    "quantized": (S.replace("tiny", "quant"), ["quantized", "float .pt"]),
    "quantized for sensitivity": (SENSITIVITY.replace("tiny", "quant"), ["quantized"]),
    "RT-DETR with data": (f"prune model=yolov8n-rtdetr.yaml {D} imgsz=64 epochs=0 prune.speedup=1.2", ["RT-DETR"]),
    "RT-DETR sensitivity": (f"sensitivity model=yolov8n-rtdetr.yaml {D} imgsz=64", ["RT-DETR", "epochs=0"]),
    "RT-DETR in training": (T.replace("tiny.pt", "yolov8n-rtdetr.yaml"), ["RT-DETR", "epochs=0"]),
    # while training
    "frozen": (TRAINED + "epochs=2 freeze=2 prune.speedup=1.5", ["frozen layers", "prune.exclude=[1]"]),
    "frozen later": (TRAINED + "epochs=3 freeze=2 prune.speedup=1.5 prune.at=[1]", ["frozen layers"]),
    "frozen masks": (TRAINED.replace(FEW, "") + "epochs=1 freeze=2 prune.kind=2:4", ["frozen layers"]),
    "masks by a criterion": (NO_DATA + "prune.kind=2:4 prune.method=random", ["prune.kind=2:4", "prune.method"]),
    "masks with floors": (
        NO_DATA + "prune.kind=unstructured prune.ratio=0.5 prune.round_to=4 prune.min_channels=2 prune.compare=True",
        ["prune.kind=unstructured", "prune.round_to, prune.min_channels, prune.compare"],
    ),
    "frozen in train": (T + "freeze=2", ["frozen layers"]),
    "at beyond": (TRAINED + "epochs=2 prune.speedup=1.5 prune.at=[1,2]", ["prune.at=[1, 2]", "0 to 1"]),
    "at beyond in train": (T + "prune.at=[1,2]", ["prune.at=[1, 2]", "0 to 1"]),
    "at out of order": (T + "prune.at=[1,0]", ["prune.at=[1, 0]", "in order"]),
    "start beyond": (T + "prune.start=5 prune.every=1", ["prune.start=5"]),
    "at without epochs": (S + "prune.at=[0]", ["epochs=0", "prune.at"]),
    "every without epochs": (S + "prune.every=1", ["epochs=0"]),
    "start without epochs": (S + "prune.start=1", ["epochs=0"]),
    "compile": (TRAINED + "epochs=2 compile=True prune.speedup=1.5 prune.at=[1]", ["compile=True"]),
    "compile in train": (T + "compile=True prune.at=[1]", ["compile=True"]),
    "QAT at once": (T + "quant.calib=4 prune.at=[1]", ["QAT", "Prune first"]),
    # files
    "no curves": (S + "prune.sensitivity=gone.json", ["gone.json", "yolo-ext sensitivity"]),
    "no curves in train": (T + "prune.sensitivity=gone.json", ["gone.json"]),
    "curves of another model": (S + "prune.sensitivity=other.json", ["does not know model.1.conv", "another model"]),
    "no file of ours": (S + "prune.sensitivity=junk.json", ["junk.json", "sensitivity.json"]),
    # data
    "taylor without data": (S + "prune.method=taylor", ["prune.method=taylor", "data=path"]),
    "drop without data": (NO_DATA + "prune.max_drop=0.01", ["prune.max_drop", "data=path"]),
    "random weights": (f"prune model=tiny.yaml {D} epochs=1 imgsz=64 prune.speedup=1.5", ["tiny.yaml"]),
    # tools
    "shares of sensitivity": (SENSITIVITY.replace("ratios=0.5", "ratios=0.5,1.0"), ["ratios=", "below 1"]),
    "shares no numbers": (SENSITIVITY.replace("ratios=0.5", "ratios=some"), ["ratios=some"]),
    "sensitivity of nothing": (SENSITIVITY + "prune.include=zzz", ["prune.include=zzz"]),
    "sensitivity all excluded": (SENSITIVITY + "prune.exclude=neck", ["Nothing can be pruned"]),
    "sensitivity off the grid": (SENSITIVITY.replace("imgsz=64", "imgsz=65"), ["imgsz=65", "64"]),
    "analyze off the grid": ("analyze model=tiny.pt imgsz=65", ["imgsz=65", "64"]),
    "sensitivity option": (SENSITIVITY + "prune.metod=l1", ["prune.metod", "prune.method"]),
}


@pytest.mark.parametrize(("words", "fragments"), CASES.values(), ids=CASES)
def test_wrong_pruning(broken, capsys, words, fragments):
    before = set(broken.rglob("*"))
    if words.startswith(("prune", "analyze", "sensitivity")):
        words += f" project={broken}"
    assert cli.main(words.split()) == 2
    err = capsys.readouterr().err
    assert err.startswith("yolo-ext: ") and err.count("yolo-ext: ") == 1 and "Traceback" not in err
    missing = [f for f in fragments if f not in err]
    assert not missing, f"{missing} not in: {err}"
    assert len(err) < 800
    left = {p for p in broken.rglob("*") if p.suffix != ".cache"} - before  # Ultralytics' cache of the labels
    assert not left, "wrong input must not leave anything behind"


def test_a_refusal_leaves_the_users_own_folder_alone(place):
    Path("mine").mkdir()
    Path("mine/notes.txt").write_text("keep")
    words = NO_DATA + f"prune.size_mb=0.01 project={place} name=mine exist_ok=True"
    assert cli.main(words.split()) == 2
    assert Path("mine/notes.txt").read_text() == "keep"


@pytest.mark.slow
def test_rtdetr_is_pruned_without_data(prune, place):
    """It has its own way of training, but its convs are convs."""
    folder = prune("prune model=yolov8n-rtdetr.yaml imgsz=64 epochs=0 prune.ratio=0.2")
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["after"]["params"] < summary["before"]["params"]
    assert type(load_model(folder / "weights/best.pt")[0]) is RTDETRDetectionModel


@pytest.mark.slow
def test_the_check_before_the_run_says_nothing_that_the_run_says_again(prune, caplog):
    folder = prune(NO_DATA + "prune.size_mb=0.4")
    assert "prune.round_to=8 leaves nothing nearer" not in caplog.text
    assert isinstance(load_model(folder / "weights/best.pt")[0], DetectionModel)
