# Copyright (C) yolo_ext authors. AGPL-3.0 licence.
"""Pascal VOC conversion: numbers, splits, refusals, and a source that stays as it was."""

from __future__ import annotations

import hashlib
from pathlib import Path

import cv2
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from ultralytics.utils import LOGGER, YAML

from yolo_ext.core.errors import UsageError
from yolo_ext.data.check import check_data
from yolo_ext.data.convert import convert
from yolo_ext.data.formats import read_voc, to_image, voc_text, yolo_row
from yolo_ext.data.records import Annotation, Object, staged_folder

BCCD = Path(__file__).parents[2].parent / "shared/data/bccd"


def xml(objects=(("cat", 8, 12, 24, 36),), size=(64, 48)) -> str:
    """Return a VOC annotation."""
    box = "<bndbox><xmin>{}</xmin><ymin>{}</ymin><xmax>{}</xmax><ymax>{}</ymax></bndbox>"
    nodes = "".join(f"<object><name>{n}</name>{box.format(*b)}</object>" for n, *b in objects)
    head = f"<size><width>{size[0]}</width><height>{size[1]}</height></size>" if size else ""
    return f"<annotation><filename>stale.jpg</filename>{head}{nodes}</annotation>"


def make_voc(root: Path, count: int = 10, names=None, lists=None, folder="JPEGImages", suffix=".jpg") -> Path:
    """Write a VOC folder of `count` images of 64x48 pixels with one cat each."""
    (root / "Annotations").mkdir(parents=True)
    (root / folder).mkdir()
    (root / "ImageSets/Main").mkdir(parents=True)
    image = np.random.default_rng(0).integers(0, 255, (48, 64, 3), dtype=np.uint8)
    encoded = cv2.imencode(suffix, image)[1].tobytes()
    for name in names or [f"i{k}" for k in range(count)]:
        (root / folder / f"{name}{suffix}").write_bytes(encoded)
        (root / f"Annotations/{name}.xml").write_text(xml(), encoding="utf-8")
    for name, members in (lists or {}).items():
        (root / f"ImageSets/Main/{name}.txt").write_text("\n".join(members), encoding="utf-8")
    return root


def digest(root: Path) -> dict[str, str]:
    """Return a hash of every file below a folder."""
    files = sorted(p for p in root.rglob("*") if p.is_file())
    return {str(p.relative_to(root)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


@pytest.fixture
def warnings(monkeypatch) -> list[str]:
    """Collect warnings; Ultralytics' logger does not propagate to pytest."""
    seen: list[str] = []
    monkeypatch.setattr(LOGGER, "warning", lambda text, *_: seen.append(str(text)))
    return seen


def test_numbers_and_files(tmp_path):
    source = make_voc(tmp_path / "my vöc", names=["a b", "é"], lists={"train": ["a b"], "val": ["é"]})
    (source / "Annotations/é.xml").write_text(xml((("dog", 0, 0, 64, 48), ("cat", -8, 10.5, 80, 30.5))), "utf-8")
    before = digest(source)
    out = tmp_path / "out dir"
    summary = convert(source, out)
    assert summary["images"] == {"train": 1, "val": 1}
    assert summary["boxes"] == {"cat": 2, "dog": 1}
    assert summary["notes"] == {"clipped": {"é": 1}}
    assert (out / "labels/train/a b.txt").read_text() == "0 0.250000 0.500000 0.250000 0.500000\n"
    assert (out / "labels/val/é.txt").read_text().split("\n")[:2] == [
        "1 0.500000 0.500000 1.000000 1.000000",
        "0 0.500000 0.427083 1.000000 0.416667",
    ]
    data = YAML.load(summary["data"][0])
    assert data == {"path": str(out), "train": "images/train", "val": "images/val", "names": {0: "cat", 1: "dog"}}
    assert [p for p in out.rglob("*") if p.is_symlink()] == []
    assert digest(source) == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["my vöc", "out dir"]
    assert len(check_data(summary["data"][0])["images"]["train"]) == 1


@pytest.mark.parametrize(
    ("box", "size", "orientation", "expected", "kinds"),
    [
        pytest.param((5, 5, 5, 5), (64, 48), 1, None, ["degenerate"], id="point"),
        pytest.param((70, 5, 90, 9), (64, 48), 1, None, ["degenerate"], id="outside"),
        pytest.param((9, 9, 5, 5), (64, 48), 1, (5, 5, 9, 9), ["swapped"], id="swapped"),
        pytest.param((-5, -5, 90, 90), (64, 48), 1, (0, 0, 64, 48), ["clipped"], id="larger than the image"),
        pytest.param((0, 0, 64, 48), (64, 48), 1, (0, 0, 64, 48), [], id="the whole image"),
        pytest.param((2, 4, 10, 20), (128, 96), 1, (1, 2, 5, 10), ["resized"], id="annotated at twice the size"),
        pytest.param((2, 4, 10, 20), (48, 64), 6, (44, 2, 60, 10), ["rotated"], id="turned to the right"),
        pytest.param((2, 4, 10, 20), (48, 64), 8, (4, 38, 20, 46), ["rotated"], id="turned to the left"),
        pytest.param((2, 4, 10, 20), (64, 48), 6, (2, 4, 10, 20), [], id="annotated upright"),
    ],
)
def test_boxes(box, size, orientation, expected, kinds):
    objects, tally = to_image(Annotation(size, (Object("a", box),)), (64, 48), orientation)
    assert [o.box for o in objects] == ([expected] if expected else [])
    assert sorted(k for k, n in tally.items() if n) == kinds


@given(st.lists(st.floats(-1e4, 1e4), min_size=4, max_size=4), st.integers(10, 5000), st.integers(10, 5000))
def test_rows_lie_inside_the_image(box, w, h):
    objects, tally = to_image(Annotation((w, h), (Object("a", tuple(box)),)), (w, h), 1)
    assert len(objects) + tally["degenerate"] == 1
    for o in objects:
        x, y, bw, bh = map(float, yolo_row(o, 0, (w, h), "detect").split()[1:])
        x0, y0, x1, y1 = (min(max(v, 0), s) for v, s in zip(box, (w, h, w, h)))
        x0, x1, y0, y1 = *sorted((x0, x1)), *sorted((y0, y1))
        np.testing.assert_allclose(
            [x, y, bw, bh], [(x0 + x1) / 2 / w, (y0 + y1) / 2 / h, (x1 - x0) / w, (y1 - y0) / h], atol=1e-6
        )
        assert bw > 0 and bh > 0


@given(st.lists(st.floats(0, 1), min_size=4, max_size=4), st.integers(10, 5000), st.integers(10, 5000))
def test_voc_text_rounds_to_pixels(tmp_path_factory, corners, w, h):
    x0, x1, y0, y1 = *(v * w for v in sorted(corners[:2])), *(v * h for v in sorted(corners[2:]))
    file = tmp_path_factory.mktemp("voc") / "a.xml"
    file.write_text(voc_text("a <&>.jpg", (w, h), [Object("x & y", (x0, y0, x1, y1), truncated=True)]))
    annotation = read_voc(file)
    (found,) = annotation.objects
    assert annotation.size == (w, h) and found[0] == "x & y" and found.truncated and not found.difficult
    np.testing.assert_allclose(found.box, (x0, y0, x1, y1), atol=1)
    assert 0 <= found.box[0] < found.box[2] <= w and 0 <= found.box[1] < found.box[3] <= h


@pytest.mark.parametrize("suffix", [".png", ".JPG", ".bmp"])
def test_size_from_the_image(tmp_path, suffix):
    source = make_voc(tmp_path / "s", 2, folder="images", suffix=suffix)
    for i in range(2):
        (source / f"Annotations/i{i}.xml").write_text(xml(size=(0, 0) if i else None))
    summary = convert(source, tmp_path / "out", ratios={"train": 0.5, "val": 0.5})
    assert {p.read_text() for p in (tmp_path / "out/labels").rglob("*.txt")} == {
        "0 0.250000 0.500000 0.250000 0.500000\n"
    }
    assert summary["notes"] == {}


def test_lists_flags_suffixes_and_backgrounds(tmp_path, warnings):
    lists = {"train": ["i0 -1", "i1  1", "i1", "i2.jpg", ""], "val": ["i3", "i2"], "test": ["bg"]}
    source = make_voc(tmp_path / "s", 5, lists=lists)
    (source / "JPEGImages/bg.jpg").write_bytes((source / "JPEGImages/i0.jpg").read_bytes())
    summary = convert(source, tmp_path / "out", classes=["cat", "dog"])
    assert summary["images"] == {"train": 3, "val": 2, "test": 1}
    assert summary["notes"] == {"background": {"bg": 1}, "unused": {"i4": 1}}
    assert summary["boxes"] == {"cat": 4, "dog": 0}
    assert (tmp_path / "out/labels/test/bg.txt").read_text() == ""
    text = "\n".join(warnings)
    assert all(x in text for x in ("share 1 images", "bg", "without any object: dog", "in no split"))


def test_nested_folders_difficult_and_other_classes(tmp_path):
    source = make_voc(tmp_path / "s", names=["a", "b", "c"], lists={"train": ["x/a", "b"], "val": ["deep/c"]})
    for name, image, label in (("a", "x/a", "x/a"), ("b", "deep/b", "b"), ("c", "deep/c", "other/c")):
        for folder, suffix, at in (("JPEGImages", "jpg", image), ("Annotations", "xml", label)):
            target = source / folder / f"{at}.{suffix}"
            target.parent.mkdir(exist_ok=True)
            (source / folder / f"{name}.{suffix}").rename(target)
    flagged = xml((("cat", 1, 2, 9, 9), ("dog", 1, 2, 9, 9))).replace("</name>", "</name><difficult>1</difficult>", 1)
    (source / "Annotations/x/a.xml").write_text(flagged)
    kept = convert(source, tmp_path / "kept", classes=["cat"])
    assert kept["images"] == {"train": 2, "val": 1} and kept["boxes"] == {"cat": 3}
    assert kept["notes"] == {"class": {"dog": 1}}
    assert sorted(p.stem for p in (tmp_path / "kept/labels/train").rglob("*.txt")) == ["a", "b"]
    skipped = convert(source, tmp_path / "skipped", classes=["cat"], difficult="skip")
    assert skipped["notes"] == {"class": {"dog": 1}, "difficult": {"x/a": 1}} and skipped["boxes"] == {"cat": 2}
    voc = convert(source, tmp_path / "voc", to="voc")
    assert voc["boxes"] == {"cat": 3, "dog": 1}
    assert [o.difficult for o in read_voc(tmp_path / "voc/Annotations/x/a.xml").objects] == [True, False]


def test_random_split_is_seeded(tmp_path):
    source = make_voc(tmp_path / "s", 10)
    splits = []
    for k, seed in enumerate((0, 0, 1)):
        summary = convert(source, tmp_path / f"o{k}", seed=seed)
        assert summary["images"] == {"train": 8, "val": 2}
        splits.append(sorted(p.name for p in (tmp_path / f"o{k}/images/val").iterdir()))
    assert splits[0] == splits[1] != splits[2]
    three = convert(source, tmp_path / "o3", ratios={"train": 0.6, "val": 0.2, "test": 0.2})
    assert three["images"] == {"train": 6, "val": 2, "test": 2}


LISTS = {"trainval": ["i0", "i1"], "again": ["i1", "i0"], "test": ["i2"], "none": [], "ghost": ["i9", "i8"]}


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        pytest.param({}, "lists present: again", id="lists without train and val"),
        pytest.param({"splits": {"train": "trainvl", "val": "test"}}, "train=trainvl", id="unknown list"),
        pytest.param({"splits": {"train": "trainval", "dev": "test"}}, "dev=test", id="unknown split"),
        pytest.param({"splits": {"train": "trainval"}}, "Needed: train and val", id="no val"),
        pytest.param({"splits": {"train": "trainval", "val": "again"}}, "same 2 images", id="identical lists"),
        pytest.param({"splits": {"train": "trainval", "val": "none"}}, "List none is empty", id="empty list"),
        pytest.param({"splits": {"train": "trainval", "val": "ghost"}}, "i9 has no image", id="image missing"),
        pytest.param(
            {"splits": {"train": "trainval", "val": "test"}, "stratify": True}, "random splits", id="stratify"
        ),
        pytest.param({"folds": 9, "splits": {"train": "trainval"}}, "2 to 2", id="too many folds"),
        pytest.param({"folds": 2, "ratios": {"train": 0.5, "val": 0.5}}, "neither ratio", id="folds and ratio"),
        pytest.param({"difficult": "drop"}, "Legal: keep, skip", id="difficult"),
        pytest.param({"to": "yol"}, "Did you mean 'yolo'", id="format to write"),
        pytest.param({"files": "list"}, "needs a YOLO source", id="lists of a VOC source"),
        pytest.param({"splits": {"train": "test"}, "ratios": {"train": 1}}, "Both lists and ratios", id="both"),
        pytest.param({"ratios": {"train": 0.8, "val": 0.3}}, "sum to 1", id="ratio sum"),
        pytest.param({"ratios": {"train": 1.2, "val": -0.2}}, "not legal", id="negative ratio"),
        pytest.param({"ratios": {"train": 0.99, "val": 0.01}}, "leave val empty", id="ratio too small"),
        pytest.param({"ratios": {"train": 0.5, "val": 0.5}, "classes": ["bird"]}, "present: cat", id="no such class"),
        pytest.param({"ratios": {"train": 0.5, "val": 0.5}, "classes": ["cat", "cat"]}, "each once", id="class twice"),
    ],
)
def test_illegal_arguments(tmp_path, options, expected):
    source = make_voc(tmp_path / "s", 4, lists=LISTS)
    with pytest.raises(UsageError, match=expected):
        convert(source, tmp_path / "out", **options)
    assert [p.name for p in tmp_path.iterdir()] == ["s"]


BOMB = '<!DOCTYPE a [<!ENTITY x "yyyy"><!ENTITY z "&x;&x;">]><annotation><object>&z;</object></annotation>'


@pytest.mark.parametrize(
    ("file", "content", "expected"),
    [
        pytest.param("Annotations/i1.xml", "<annotation><obj", "i1.xml: is not valid XML", id="broken xml"),
        pytest.param("Annotations/i1.xml", "", "i1.xml: is not valid XML", id="empty xml"),
        pytest.param("Annotations/i1.xml", BOMB, "i1.xml: holds a document type", id="entity bomb"),
        pytest.param("Annotations/i1.xml", BOMB.encode("utf-16"), "i1.xml: holds a document type", id="utf-16 bomb"),
        pytest.param("Annotations/i1.xml", xml([("cat", "x", 1, 2, 3)]), "complete box in object 1", id="word"),
        pytest.param("Annotations/i1.xml", xml([("cat", "nan", 1, 2, 3)]), "complete box in object 1", id="nan"),
        pytest.param("Annotations/i1.xml", xml([("", 0, 1, 2, 3)]), "no name", id="no name"),
        pytest.param("JPEGImages/i1.jpg", "", "i1.jpg: cannot be read", id="empty image"),
        pytest.param("JPEGImages/i1.jpg", "no picture", "i1.jpg: cannot be read", id="text as image"),
        pytest.param("JPEGImages/i1.png", "x", "i1.jpg and i1.png have the same id", id="same id twice"),
    ],
)
def test_broken_source(tmp_path, file, content, expected):
    source = make_voc(tmp_path / "s", 3)
    (source / file).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UsageError, match=expected):
        convert(source, tmp_path / "out")
    assert [p.name for p in tmp_path.iterdir()] == ["s"]


def test_every_problem_is_counted(tmp_path):
    source = make_voc(tmp_path / "s", 14)
    for file in (source / "JPEGImages").iterdir():
        file.write_bytes(file.read_bytes()[:-400])
    with pytest.raises(UsageError, match=r"14 problems.*and 4 more"):
        convert(source, tmp_path / "out")


@pytest.mark.parametrize(
    ("out", "expected"),
    [
        pytest.param("s/out", "inside the source", id="inside the source"),
        pytest.param("s", "inside the source", id="the source itself"),
        pytest.param("full", "not empty", id="not empty"),
        pytest.param("file", "not empty", id="a file"),
    ],
)
def test_output_folder(tmp_path, out, expected):
    source = make_voc(tmp_path / "s", 2)
    (tmp_path / "full").mkdir()
    (tmp_path / "full/mine.txt").write_text("keep")
    (tmp_path / "file").write_text("keep")
    before = digest(tmp_path)
    with pytest.raises(UsageError, match=expected):
        convert(source, tmp_path / out)
    assert digest(tmp_path) == before


def test_not_a_voc_folder(tmp_path):
    (tmp_path / "s").mkdir()
    for name, expected in (("s", "No VOC annotations.* in .*annotations=FOLDER"), ("none", "does not exist")):
        with pytest.raises(UsageError, match=expected):
            convert(tmp_path / name, tmp_path / "out", format="voc")


def test_jpeg_with_trailing_bytes_is_copied(tmp_path):
    """Ultralytics repairs such files at training, older releases in place: a hard link would change the source."""
    source = make_voc(tmp_path / "s", 2)
    padded = source / "JPEGImages/i1.jpg"
    padded.write_bytes(padded.read_bytes() + bytes(4))
    convert(source, tmp_path / "out", ratios={"train": 0.5, "val": 0.5})
    shared = {p.stem: p.samefile(source / "JPEGImages" / p.name) for p in (tmp_path / "out/images").rglob("*.jpg")}
    assert shared == {"i0": True, "i1": False}


def test_failure_while_writing_leaves_nothing(tmp_path, monkeypatch):
    source = make_voc(tmp_path / "s", 5)

    def fail(*_, **__):
        raise OSError("disk full")

    monkeypatch.setattr(YAML, "save", fail)
    with pytest.raises(OSError, match="disk full"):
        convert(source, tmp_path / "out")
    assert [p.name for p in tmp_path.iterdir()] == ["s"]


def test_staged_folder_replaces(tmp_path):
    out = tmp_path / "out"
    for text in ("old", "new"):
        with staged_folder(out, "old|new") as stage:
            (stage / text).write_text(text)
    assert [p.name for p in tmp_path.rglob("*")] == ["out", "new"]
    (out / "theirs.txt").touch()
    with pytest.raises(UsageError, match=r"theirs\.txt"), staged_folder(out, "old|new") as stage:
        (stage / "new").touch()
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["new", "out", "theirs.txt"]


def test_read_voc_keeps_difficult_and_ignores_parts(tmp_path):
    part = "<part><name>head</name><bndbox><xmin>1</xmin></bndbox></part>"
    text = xml([("cat", 1.5, 2, 3, 4)], None).replace("</object>", f"<difficult>1</difficult>{part}</object>")
    (tmp_path / "a.xml").write_text(text)
    assert read_voc(tmp_path / "a.xml") == Annotation(None, (Object("cat", (1.5, 2.0, 3.0, 4.0), difficult=True),))


@pytest.mark.bccd
@pytest.mark.skipif(not BCCD.is_dir(), reason="BCCD data is not beside the checkout")
def test_bccd(tmp_path):
    summary = convert(BCCD, tmp_path / "bccd", splits={"train": "trainval", "val": "test"})
    assert summary["images"] == {"train": 292, "val": 72}
    assert summary["names"] == ["Platelets", "RBC", "WBC"]
    assert summary["boxes"] == {"Platelets": 361, "RBC": 4153, "WBC": 372}
    assert summary["notes"] == {"degenerate": {"BloodImage_00338": 1, "BloodImage_00343": 1}}
    back = convert(tmp_path / "bccd", tmp_path / "voc", format="yolo", to="voc")
    assert back["boxes"] == summary["boxes"] and back["notes"] == {}
    for file in (BCCD / "Annotations").iterdir():
        before, after = (read_voc(f).objects for f in (file, tmp_path / "voc/Annotations" / file.name))
        before = [o for o in before if o.box[2] > o.box[0] and o.box[3] > o.box[1]]
        assert [o.name for o in before] == [o.name for o in after]
        np.testing.assert_allclose([o.box for o in after], [o.box for o in before], atol=1, err_msg=file.name)
