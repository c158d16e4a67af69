# Copyright (C) yolo_ext authors. AGPL-3.0 licence.
"""A data.yaml means here what it means to Ultralytics: splits, paths, class names and their numbers."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
import pytest
from ultralytics.data.utils import check_det_dataset
from ultralytics.utils import LOGGER, YAML

from yolo_ext.core.errors import UsageError
from yolo_ext.data import check as reading
from yolo_ext.data.check import calibration_images, check_calibration, check_data
from yolo_ext.data.convert import convert
from yolo_ext.data.formats import scan_yolo
from yolo_ext.data.records import list_images
from yolo_ext.data.summary import summarise

PARTS = {"train": 8, "valid": 2, "test": 2}
ROWS = "0 0.5 0.5 0.25 0.5\n1 0.25 0.25 0.25 0.25\n"


@pytest.fixture
def root(tmp_path, monkeypatch) -> Path:
    """Write images and labels as Roboflow does, all of them different, and go to the folder above."""
    rng = np.random.default_rng(0)
    for part, count in PARTS.items():
        for kind in ("images", "labels"):
            (tmp_path / "d" / part / kind).mkdir(parents=True)
        for k in range(count):
            picture = cv2.imencode(".jpg", rng.integers(0, 255, (32, 48, 3), dtype=np.uint8))[1].tobytes()
            (tmp_path / f"d/{part}/images/{part}{k}.jpg").write_bytes(picture)
            (tmp_path / f"d/{part}/labels/{part}{k}.txt").write_text(ROWS)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("ultralytics.data.utils.check_font", lambda _: None)  # of Ultralytics' own reading below
    return tmp_path / "d"


def written(root: Path, text: str) -> Path:
    (root / "data.yaml").write_text(text.replace("ROOT", str(root)))
    return root / "data.yaml"


HERE = "train: train/images\nval: valid/images\n"
YAMLS = {
    "plain": HERE + "names: [a, b]\n",
    "validation": "train: train/images\nvalidation: valid/images\nnames: [a, b]\n",
    "Roboflow": "train: ../train/images\nval: ../valid/images\ntest: ../test/images\nnc: 2\nnames: ['a', 'b']\n",
    "number of classes only": HERE + "nc: 2\n",
    "number of classes as text": HERE + "nc: '2'\n",
    "quoted keys": HERE + "names: {'0': a, '1': b}\n",
    "keys in another order": HERE + "names: {1: b, 0: a}\n",
    "names that are no text": HERE + "names: [1, 2.5]\n",
    "yes and no": HERE + "names: [yes, no]\n",
    "the same name twice": HERE + "names: [a, a]\n",
    "codes of ImageNet": HERE + "names: [n01440764, n01443537]\n",
    "a dollar": HERE + "names: [$a, b$_$]\n",
    "absolute path": "path: ROOT\n" + HERE + "names: [a, b]\n",
    "path from the current folder": "path: d\n" + HERE + "names: [a, b]\n",
    "path: . in the current folder": "path: .\ntrain: d/train/images\nval: d/valid/images\nnames: [a, b]\n",
    "empty path": "path:\n" + HERE + "names: [a, b]\n",
    "absolute splits": "train: ROOT/train/images\nval: ROOT/valid/images\nnames: [a, b]\n",
    "several folders": "train: [train/images, test/images]\nval: valid/images\nnames: [a, b]\n",
    "empty test": HERE + "test:\nnames: [a, b]\n",
    "gray": HERE + "channels: 1\nnames: [a, b]\n",
}


@pytest.mark.parametrize("text", YAMLS.values(), ids=YAMLS)
def test_one_reading(root, text):
    file = written(root, text)
    stock = check_det_dataset(str(file), autodownload=False)
    expected = {s: sorted(list_images(stock[s])) for s in ("train", "val", "test") if stock.get(s)}
    ours, source = check_data(file), scan_yolo(file)
    assert (ours["names"], ours["nc"], ours["channels"]) == (stock["names"], stock["nc"], stock["channels"])
    assert ours["images"] == {s: expected[s] for s in ("train", "val")}
    assert {s: sorted(source.images[i] for i in ids) for s, ids in source.lists.items()} == expected
    assert sum(summarise(file)["classes"][n]["train"] for n in source.names) == 2 * len(expected["train"])


@pytest.mark.parametrize("text", YAMLS.values(), ids=YAMLS)
@pytest.mark.parametrize("files", ["link", "list"])
def test_numbers_of_classes_stay(root, text, files):
    stock = check_det_dataset(str(written(root, text)), autodownload=False)
    images = sum(len(list_images(stock[s])) for s in ("train", "val", "test") if stock.get(s))
    ratios = {"train": 0.5, "val": 0.5}
    summary = convert(root / "data.yaml", root.parent / "out", format="yolo", files=files, ratios=ratios)
    again = check_data(summary["data"][0])
    assert again["names"] == stock["names"] and again["channels"] == stock["channels"]
    assert sum(map(len, again["images"].values())) == images == sum(summary["images"].values())
    labels = (root.parent / "out/labels").rglob("*.txt") if files == "link" else root.rglob("*.txt")
    assert {p.read_text() for p in labels if p.name[0] in "tv" and p.parent.name != "out"} == {ROWS}


def test_a_leak_into_validation(root):
    (root / "valid/images/copy.jpg").write_bytes((root / "train/images/train0.jpg").read_bytes())
    found = summarise(written(root, YAMLS["validation"]))
    assert not found["passed"] and len(found["leaks"]["train/val"]) == 1


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        pytest.param("path: .\n" + HERE + "names: [a, b]\n", "'path: .' counts from '.*without path", id="path: ."),
        pytest.param(HERE + "names: [a, b, c]\nnc: 2\n", "length 3 and 'nc: 2' must match", id="nc"),
        pytest.param(HERE + "names: {0: a, 5: b}\n", "not usable", id="gap"),
        pytest.param("names: [a]\n", "lacks train, val", id="no splits"),
        pytest.param(HERE, "lacks names", id="no names"),
    ],
)
def test_refused_everywhere(root, text, expected):
    file = written(root, text)
    for work in (check_data, summarise, lambda f: convert(f, root.parent / "out")):
        with pytest.raises(UsageError, match=expected):
            work(file)


def test_no_font_is_fetched(root, monkeypatch):
    monkeypatch.setattr("ultralytics.data.utils.check_font", lambda _: pytest.fail("a font was asked for"))
    for work in (check_data, scan_yolo):
        work(written(root, HERE + "names: [红细胞, b]\n"))


@pytest.mark.parametrize("codec", ["gbk", "utf-16"])
def test_other_text(root, codec):
    """Ultralytics reads UTF-8 only, and drops what it cannot decode: of names in data.yaml, of list files all."""
    file = written(root, "")
    file.write_bytes((HERE + "names: [红细胞, b]\n").encode(codec))
    with pytest.raises(UsageError, match=r"data\.yaml' is not in UTF-8"):
        check_data(file)
    written(root, HERE.replace("train/images", "train.txt") + "names: [a, b]\n")
    (root / "train.txt").write_bytes("\n".join(map(str, [*list_images(root / "train"), "红细胞"])).encode(codec))
    with pytest.raises(UsageError, match=r"List '.*train\.txt' of split 'train' is not in UTF-8"):
        check_data(file)
    assert len(list_images(root / "train.txt")) == 8, "elsewhere it is read"


def test_folder_of_images_that_is_a_link(root):
    """Ultralytics looks for labels where the link leads."""
    (root / "train/images").rename(root.parent / "store")
    (root / "train/images").symlink_to(root.parent / "store")
    file = written(root, YAMLS["plain"])
    with pytest.raises(UsageError, match=f"no label file found, looked in '{root.parent / 'store'}'"):
        check_data(file)
    summary = convert(root, root.parent / "out", format="yolo")  # by name
    assert summary["images"] == {"train": 8, "val": 2} and summary["boxes"] == {"a": 10, "b": 10}
    assert len(check_data(summary["data"][0])["images"]["train"]) == 8


@pytest.mark.parametrize("labels", [None, ""], ids=["none", "empty"])
def test_no_labels(root, labels):
    for file in [*root.rglob("labels/*.txt")]:
        file.unlink() if labels is None else file.write_text(labels)
    file = written(root, YAMLS["plain"])
    looked = f"no label file found, looked in '{root}/train/labels' for 'train0.txt'"
    with pytest.raises(UsageError, match=looked if labels is None else "there and empty"):
        check_data(file)
    with pytest.raises(UsageError, match="no label file found" if labels is None else "No box"):
        convert(file, root.parent / "out")


def test_train_and_val_are_the_same_folder(root, monkeypatch):
    """As in coco128, and in what `label` writes: a warning, and a refusal for INT8 only."""
    said: list[str] = []
    monkeypatch.setattr(LOGGER, "warning", lambda text, *_: said.append(str(text)))
    info = check_data(written(root, "train: train/images\nval: train/images\nnames: [a, b]\n"))
    assert len(said) == 1 and "train and val share 8 images, so accuracy is overstated" in said[0]
    for choose in (calibration_images, check_calibration):
        with pytest.raises(UsageError, match=r"quant\.source=FOLDER, or split the set: yolo-ext split"):
            choose(info)
    assert len(calibration_images(info["train"])) == 8


@pytest.mark.parametrize(
    ("extra", "expected"),
    [
        pytest.param("flip_idx: [0]", r"flip_idx \[0\]. Legal: each number below 2 once", id="too short"),
        pytest.param("flip_idx: [1, 0, 2]", "flip_idx", id="too long"),
        pytest.param("flip_idx: [0, 2]", "flip_idx", id="index too high"),
        pytest.param("flip_idx: [0, 0]", "flip_idx", id="twice"),
        pytest.param("flip_idx: [0, -1]", "flip_idx", id="negative"),
        pytest.param("flip_idx: [a, b]", "flip_idx", id="names"),
        pytest.param("flip_idx: [1, 0]", "", id="legal"),
        pytest.param("flip_idx: []", "", id="empty"),
    ],
)
def test_flip_idx(root, extra, expected):
    for file in [*root.rglob("labels/*.txt")]:
        file.write_text("0 .5 .5 .2 .2 .4 .4 2 .6 .6 0\n")
    file = written(root, YAMLS["plain"] + f"kpt_shape: [2, 3]\n{extra}\n")
    for work in (lambda: reading.check_data(file, task="pose"), lambda: scan_yolo(file)):
        if expected:
            with pytest.raises(UsageError, match=expected):
                work()
        else:
            work()


@pytest.mark.parametrize("shape", ["[0, 3]", "[2, 4]", "[2, 1]", "[2.0, 3]", "[true, 3]", "17"])
def test_kpt_shape(root, shape):
    with pytest.raises(UsageError, match="kpt_shape"):
        check_data(written(root, YAMLS["plain"] + f"kpt_shape: {shape}\n"), task="pose")


@pytest.mark.parametrize("task", ["segment", "obb"])
def test_boxes_where_polygons_are_needed(root, task):
    with pytest.raises(UsageError, match=f"8 label files .* hold boxes.*task '{task}' needs polygons"):
        check_data(written(root, YAMLS["plain"]), task=task)


def test_yaml_is_kept(root):
    """What is read of a YAML is written again, names as Ultralytics reads them."""
    file = written(root, HERE + "names: [yes, yes]\nkpt_shape: [2, 3]\nflip_idx: [1, 0]\n")
    for label in root.rglob("labels/*.txt"):
        label.write_text("1 .5 .5 .2 .2 .4 .4 2 .6 .6 0\n")
    content = YAML.load(convert(file, root.parent / "out")["data"][0])
    assert content["names"] == {0: "True", 1: "True"} and content["flip_idx"] == [1, 0] and "channels" not in content
