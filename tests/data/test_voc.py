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

from yolo_ext.data.check import check_data
from yolo_ext.data.voc import Annotation, VocSummary, _to_rows, convert_voc, read_voc, staged_folder
from yolo_ext.errors import UsageError

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
    summary = convert_voc(source, out)
    assert summary.images == {"train": 1, "val": 1}
    assert summary.boxes == {"cat": 2, "dog": 1}
    assert (summary.clipped, summary.degenerate, summary.resized, summary.no_xml) == (1, [], [], [])
    assert (out / "labels/train/a b.txt").read_text() == "0 0.250000 0.500000 0.250000 0.500000\n"
    assert (out / "labels/val/é.txt").read_text().split("\n")[:2] == [
        "1 0.500000 0.500000 1.000000 1.000000",
        "0 0.500000 0.427083 1.000000 0.416667",
    ]
    data = YAML.load(summary.data)
    assert data == {"path": str(out), "train": "images/train", "val": "images/val", "names": {0: "cat", 1: "dog"}}
    assert [p for p in out.rglob("*") if p.is_symlink()] == []
    assert digest(source) == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["my vöc", "out dir"]
    assert len(check_data(summary.data)["images"]["train"]) == 1


@pytest.mark.parametrize(
    ("objects", "classes", "rows", "counts"),
    [
        pytest.param([("a", 5, 5, 5, 5)], None, 0, (0, 1, 0), id="point"),
        pytest.param([("a", 9, 5, 5, 9)], None, 0, (0, 1, 0), id="inverted"),
        pytest.param([("a", 70, 5, 90, 9)], None, 0, (0, 1, 0), id="outside"),
        pytest.param([("a", -5, -5, 90, 90)], None, 1, (1, 0, 0), id="larger than the image"),
        pytest.param([("a", 0, 0, 64, 48)], None, 1, (0, 0, 0), id="the whole image"),
        pytest.param([("b", 0, 0, 9, 9)], ["a"], 0, (0, 0, 1), id="unwanted class"),
    ],
)
def test_boxes(objects, classes, rows, counts):
    summary = VocSummary(Path("data.yaml"), classes or ["a"])
    annotation = Annotation((64, 48), tuple((n, tuple(b)) for n, *b in objects))
    assert len(_to_rows("i", annotation, (64, 48), summary)) == rows
    assert (summary.clipped, len(summary.degenerate), sum(summary.skipped.values())) == counts


@given(st.lists(st.floats(-1e4, 1e4), min_size=4, max_size=4), st.integers(10, 5000), st.integers(10, 5000))
def test_rows_lie_inside_the_image(box, w, h):
    summary = VocSummary(Path("data.yaml"), ["a"])
    rows = _to_rows("i", Annotation((w, h), (("a", tuple(box)),)), (w, h), summary)
    assert len(rows) + len(summary.degenerate) == 1
    for row in rows:
        x, y, bw, bh = map(float, row.split()[1:])
        x0, y0, x1, y1 = (min(max(v, 0), s) for v, s in zip(box, (w, h, w, h)))
        np.testing.assert_allclose(
            [x, y, bw, bh], [(x0 + x1) / 2 / w, (y0 + y1) / 2 / h, (x1 - x0) / w, (y1 - y0) / h], atol=1e-6
        )
        assert bw > 0 and bh > 0


@pytest.mark.parametrize("suffix", [".png", ".JPG", ".bmp"])
def test_size_from_the_image(tmp_path, suffix):
    source = make_voc(tmp_path / "s", 2, folder="images", suffix=suffix)
    for i in range(2):
        (source / f"Annotations/i{i}.xml").write_text(xml(size=(0, 0) if i else None))
    summary = convert_voc(source, tmp_path / "out", ratios={"train": 0.5, "val": 0.5})
    assert {p.read_text() for p in (tmp_path / "out/labels").rglob("*.txt")} == {
        "0 0.250000 0.500000 0.250000 0.500000\n"
    }
    assert summary.resized == []


def test_lists_flags_suffixes_and_backgrounds(tmp_path, warnings):
    lists = {"train": ["i0 -1", "i1  1", "i1", "i2.jpg", ""], "val": ["i3", "i2"], "test": ["bg"]}
    source = make_voc(tmp_path / "s", 5, lists=lists)
    (source / "JPEGImages/bg.jpg").write_bytes((source / "JPEGImages/i0.jpg").read_bytes())
    summary = convert_voc(source, tmp_path / "out", classes=["cat", "dog"])
    assert summary.images == {"train": 3, "val": 2, "test": 1}
    assert (summary.no_xml, summary.unused, summary.overlap) == (["bg"], 1, 1)
    assert summary.boxes == {"cat": 4, "dog": 0}
    assert (tmp_path / "out/labels/test/bg.txt").read_text() == ""
    text = "\n".join(warnings)
    assert all(x in text for x in ("share 1 images", "bg", "without any object: dog", "in no split"))


def test_random_split_is_seeded(tmp_path):
    source = make_voc(tmp_path / "s", 10)
    splits = []
    for k, seed in enumerate((0, 0, 1)):
        summary = convert_voc(source, tmp_path / f"o{k}", seed=seed)
        assert summary.images == {"train": 8, "val": 2}
        splits.append(sorted(p.name for p in (tmp_path / f"o{k}/images/val").iterdir()))
    assert splits[0] == splits[1] != splits[2]
    three = convert_voc(source, tmp_path / "o3", ratios={"train": 0.6, "val": 0.2, "test": 0.2})
    assert three.images == {"train": 6, "val": 2, "test": 2}


LISTS = {"trainval": ["i0", "i1"], "again": ["i1", "i0"], "test": ["i2"], "none": [], "ghost": ["i9", "i8"]}


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        pytest.param({}, "lists present: again", id="lists without train and val"),
        pytest.param({"splits": {"train": "trainvl", "val": "test"}}, "train=trainvl", id="unknown list"),
        pytest.param({"splits": {"train": "trainval", "dev": "test"}}, "dev=test", id="unknown split"),
        pytest.param({"splits": {"train": "trainval"}}, "Needed: train and val", id="no val"),
        pytest.param({"splits": {"train": "trainval", "val": "again"}}, "same 2 images", id="identical lists"),
        pytest.param({"splits": {"train": "trainval", "val": "none"}}, "List none of", id="empty list"),
        pytest.param({"splits": {"train": "trainval", "val": "ghost"}}, "i9 has no image", id="image missing"),
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
        convert_voc(source, tmp_path / "out", **options)
    assert [p.name for p in tmp_path.iterdir()] == ["s"]


BOMB = '<!DOCTYPE a [<!ENTITY x "yyyy"><!ENTITY z "&x;&x;">]><annotation><object>&z;</object></annotation>'


@pytest.mark.parametrize(
    ("file", "content", "expected"),
    [
        pytest.param("Annotations/i1.xml", "<annotation><obj", "i1.xml is not valid XML", id="broken xml"),
        pytest.param("Annotations/i1.xml", "", "i1.xml is not valid XML", id="empty xml"),
        pytest.param("Annotations/i1.xml", BOMB, "i1.xml holds a document type", id="entity bomb"),
        pytest.param("Annotations/i1.xml", BOMB.encode("utf-16"), "i1.xml holds a document type", id="utf-16 bomb"),
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
        convert_voc(source, tmp_path / "out")
    assert [p.name for p in tmp_path.iterdir()] == ["s"]


def test_every_problem_is_counted(tmp_path):
    source = make_voc(tmp_path / "s", 14)
    for file in (source / "JPEGImages").iterdir():
        file.write_bytes(file.read_bytes()[:-400])
    with pytest.raises(UsageError, match=r"14 problems.*and 4 more"):
        convert_voc(source, tmp_path / "out")


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
        convert_voc(source, tmp_path / out)
    assert digest(tmp_path) == before


def test_not_a_voc_folder(tmp_path):
    with pytest.raises(UsageError, match="has no 'Annotations'"):
        convert_voc(tmp_path / "nothing", tmp_path / "out")


def test_jpeg_with_trailing_bytes_is_copied(tmp_path):
    """Ultralytics repairs such files at training, older releases in place: a hard link would change the source."""
    source = make_voc(tmp_path / "s", 2)
    padded = source / "JPEGImages/i1.jpg"
    padded.write_bytes(padded.read_bytes() + bytes(4))
    convert_voc(source, tmp_path / "out", ratios={"train": 0.5, "val": 0.5})
    shared = {p.stem: p.samefile(source / "JPEGImages" / p.name) for p in (tmp_path / "out/images").rglob("*.jpg")}
    assert shared == {"i0": True, "i1": False}


def test_failure_while_writing_leaves_nothing(tmp_path, monkeypatch):
    source = make_voc(tmp_path / "s", 5)

    def fail(*_, **__):
        raise OSError("disk full")

    monkeypatch.setattr("yolo_ext.data.voc.YAML.save", fail)
    with pytest.raises(OSError, match="disk full"):
        convert_voc(source, tmp_path / "out")
    assert [p.name for p in tmp_path.iterdir()] == ["s"]


def test_staged_folder_replaces(tmp_path):
    out = tmp_path / "out"
    for text in ("old", "new"):
        with staged_folder(out) as stage:
            (stage / text).write_text(text)
    assert [p.name for p in tmp_path.rglob("*")] == ["out", "new"]


def test_read_voc_keeps_difficult_and_ignores_parts(tmp_path):
    part = "<part><name>head</name><bndbox><xmin>1</xmin></bndbox></part>"
    text = xml([("cat", 1.5, 2, 3, 4)], None).replace("</object>", f"<difficult>1</difficult>{part}</object>")
    (tmp_path / "a.xml").write_text(text)
    assert read_voc(tmp_path / "a.xml") == Annotation(None, (("cat", (1.5, 2.0, 3.0, 4.0)),))


@pytest.mark.bccd
@pytest.mark.skipif(not BCCD.is_dir(), reason="BCCD data is not beside the checkout")
def test_bccd(tmp_path):
    summary = convert_voc(BCCD, tmp_path / "bccd", splits={"train": "trainval", "val": "test"})
    assert summary.images == {"train": 292, "val": 72}
    assert summary.names == ["Platelets", "RBC", "WBC"]
    assert summary.boxes == {"Platelets": 361, "RBC": 4153, "WBC": 372}
    assert summary.degenerate == ["BloodImage_00338", "BloodImage_00343"]
    assert (summary.overlap, summary.unused, summary.no_xml, summary.resized) == (0, 0, [], [])
