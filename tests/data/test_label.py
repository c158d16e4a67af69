# Copyright (C) yolo_ext authors. AGPL-3.0 licence.
"""Auto-labelling without a model: what is written, what is kept, and that a stopped run goes on to the same bytes."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path

import cv2
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from ultralytics.utils import YAML

from yolo_ext.core.errors import UsageError
from yolo_ext.core.log import LOGGER
from yolo_ext.data.check import check_label
from yolo_ext.data.coco import coco_entry, coco_store
from yolo_ext.data.formats import FORMATS, read_voc, voc_annotation, yolo_text
from yolo_ext.data.label import JOURNAL, find_images, label_images

NAMES = {0: "cell", 1: "näme & <x>"}
SETTINGS = {"model": "m", "conf": 0.25, "names": list(NAMES.values())}
IMAGE = np.random.default_rng(0).integers(0, 255, (48, 64, 3), dtype=np.uint8)
LABEL = {"yolo": "labels/a.txt", "voc": "Annotations/a.xml", "coco": "annotations.json"}


def predict(image: np.ndarray) -> list[dict]:
    """Find something that depends on the image; nothing in a black one."""
    if not image.any():
        return []
    shift = int(image[0, 0, 0]) % 8
    return [
        {"class": 1, "confidence": 0.91, "box": [1.5 + shift, 2.0, 30.25, 40.0]},
        {"class": 0, "confidence": 0.3, "box": [10.0, 5.0 + shift, 20.0, 25.5]},
    ]


def fail(image: np.ndarray) -> list[dict]:
    raise AssertionError("the model must not run again")


class Killed(BaseException):
    pass


@pytest.fixture
def source(tmp_path) -> Path:
    """Write four images in nested folders, one of them black, with a space and an umlaut."""
    folder = tmp_path / "söurce dir"
    for i, name in enumerate(["a.jpg", "b c.png", "sub/a.jpg", "sub/images/ü.jpg"]):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        picture = IMAGE * 0 if name == "b c.png" else np.full_like(IMAGE, 20 + i)
        (folder / name).write_bytes(cv2.imencode(Path(name).suffix, picture)[1].tobytes())
    return folder


@pytest.fixture
def run(source, tmp_path):
    """Return a function that labels the source into a folder."""

    def start(out: str | Path = "out", model=predict, settings=SETTINGS, **options):
        folder = tmp_path / out
        _, images = find_images(options.pop("source", source), folder)
        return label_images(images, folder, model, NAMES, settings, **options)

    return start


def tree(folder: Path) -> dict[str, str]:
    """Return every file below a folder, hidden ones too, with the hash of its bytes."""
    files = sorted(f for f in folder.rglob("*") if f.is_file())
    return {f.relative_to(folder).as_posix(): hashlib.sha256(f.read_bytes()).hexdigest() for f in files}


@pytest.mark.parametrize("format", FORMATS)
def test_a_second_run_predicts_and_changes_nothing(run, source, tmp_path, format):
    before = tree(source)
    first = run(format=format)
    assert (first.written, first.predicted, len(first.records), first.kept, first.skipped) == (4, 4, 4, [], {})
    found = tree(tmp_path / "out")
    assert LABEL[format] in found
    assert {f"{FORMATS[format].images}/{n}" for n in before} <= found.keys()
    second = run(format=format, model=fail)
    assert (second.written, second.predicted) == (0, 0) and second.records == first.records
    assert tree(tmp_path / "out") == found
    assert tree(source) == before


def test_the_result_is_a_dataset_that_training_reads(run, tmp_path):
    from ultralytics.data.utils import img2label_paths

    run()
    content = YAML.load(tmp_path / "out/data.yaml")
    assert content["names"] == NAMES and content["path"] == str(tmp_path / "out")
    images = [f for f in (tmp_path / "out/images").rglob("*") if f.suffix in {".jpg", ".png"}]
    assert len(images) == 4
    counts = {f.name: len(check_label(Path(p), 2)) for f, p in zip(images, img2label_paths([*map(str, images)]))}
    assert counts == {"a.jpg": 2, "b c.png": 0, "ü.jpg": 2}


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("after", [1, 3])
def test_a_killed_run_goes_on_to_the_same_bytes(run, tmp_path, format, after):
    run("whole", format=format, files="none")
    calls = []

    def killed(image: np.ndarray) -> list[dict]:
        calls.append(1)
        if len(calls) > after:
            raise Killed
        return predict(image)

    with pytest.raises(Killed):
        run("out", model=killed, format=format, files="none")
    with (tmp_path / "out" / JOURNAL).open("a") as f:
        f.write('{"image": "sub/a.jpg", "stamp": [1')  # what a kill in the middle of a write leaves
    done = run("out", format=format, files="none")
    assert done.predicted == 4 - after
    assert tree(tmp_path / "out") == tree(tmp_path / "whole")
    assert not [f for f in tree(tmp_path / "out") if f.rpartition("/")[2].startswith(".")]


DAMAGE = {
    "a row without what it needs": (lambda lines: [lines[0], '{"image": "a.jpg"}', *lines[2:]], 1),
    "no JSON": (lambda lines: [lines[0], "x" * 9, *lines[2:]], 1),
    "a number": (lambda lines: [lines[0], "7", *lines[2:]], 1),
    "no text": (lambda lines: [lines[0], "\x00\udcff", *lines[2:]], 1),
    "empty": (lambda lines: [], 0),
}


@pytest.mark.parametrize(("damage", "told"), DAMAGE.values(), ids=DAMAGE)
def test_a_damaged_journal_costs_only_its_damaged_lines(run, tmp_path, caplog, monkeypatch, damage, told):
    monkeypatch.setattr(LOGGER, "propagate", True)
    run(files="none")
    expected, file = tree(tmp_path / "out"), tmp_path / "out" / JOURNAL
    lines = file.read_text().splitlines()
    file.write_bytes("\n".join(damage(lines)).encode("utf-8", "surrogateescape"))
    done = run(files="none", overwrite=True)
    assert done.predicted == (1 if told else 4) and not done.skipped
    assert tree(tmp_path / "out") == expected
    assert ("1 lines are damaged" in caplog.text) is bool(told)


def test_images_added_later_leave_no_trace_of_the_order(run, source, tmp_path):
    run("whole", files="none")
    (source / "a.jpg").rename(tmp_path / "later.jpg")
    run("out", files="none")
    (tmp_path / "later.jpg").rename(source / "a.jpg")
    assert run("out", files="none").predicted == 1
    assert tree(tmp_path / "out") == tree(tmp_path / "whole")


@pytest.mark.parametrize(("files", "linked"), [("link", True), ("copy", False)])
def test_images_are_linked_unless_training_would_rewrite_them(run, source, tmp_path, files, linked):
    with (source / "sub/a.jpg").open("ab") as f:
        f.write(b"tail")  # readable, but Ultralytics mends a JPEG that does not end with its marker, in place
    assert not run(files=files).skipped
    assert (tmp_path / "out/images/a.jpg").samefile(source / "a.jpg") is linked
    assert not (tmp_path / "out/images/sub/a.jpg").samefile(source / "sub/a.jpg")


@pytest.mark.parametrize("format", ["yolo", "voc"])
def test_labels_that_are_there_are_kept_unless_overwritten(run, tmp_path, format):
    file = tmp_path / "out" / LABEL[format]
    file.parent.mkdir(parents=True)
    file.write_text("mine")
    done = run(format=format)
    assert done.kept == ["a.jpg"] and done.predicted == 3 and file.read_text() == "mine"
    assert run(format=format, model=fail).kept == ["a.jpg"]
    assert run(format=format, overwrite=True).written == 1 and file.read_text() != "mine"


def test_an_edited_label_is_kept_and_no_longer_the_model_s(run, tmp_path):
    run()
    file = tmp_path / "out" / LABEL["yolo"]
    file.write_text("0 0.5 0.5 0.1 0.1\n")
    done = run(model=fail)
    assert done.kept == ["a.jpg"] and "a.jpg" not in done.records
    assert file.read_text() == "0 0.5 0.5 0.1 0.1\n"
    file.unlink()
    assert run(model=fail).written == 1  # from the journal


def test_coco_keeps_entries_numbers_and_further_keys(run, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    mine = {
        "info": {"year": 2026},
        "images": [{"id": 7, "file_name": "a.jpg", "width": 64, "height": 48, "licence": 3}],
        "annotations": [{"id": 40, "image_id": 7, "category_id": 2, "bbox": [1, 1, 5, 5], "area": 25, "iscrowd": 0}],
        "categories": [{"id": 2, "name": "dog"}],
    }
    (out / "annotations.json").write_text(json.dumps(mine))
    assert run(format="coco").kept == ["a.jpg"]
    data = json.loads((out / "annotations.json").read_text())
    assert data["info"] == mine["info"] and data["images"][0] == mine["images"][0]
    assert data["annotations"][0] == mine["annotations"][0]
    assert {c["name"]: c["id"] for c in data["categories"]} == {"dog": 2, "cell": 1, NAMES[1]: 3}
    assert [i["file_name"] for i in data["images"][1:]] == ["b c.png", "sub/a.jpg", "sub/images/ü.jpg"]
    ids = [a["id"] for a in data["annotations"]]
    assert len(ids) == len(set(ids)) == 5
    run(format="coco", overwrite=True)
    data = json.loads((out / "annotations.json").read_text())
    assert sum(a["image_id"] == 7 for a in data["annotations"]) == 2 and len(data["annotations"]) == 6
    assert run(format="coco", model=fail).written == 0


@pytest.mark.parametrize(
    "text",
    ["", "[]", "{", '{"images": [], "annotations": []}', '{"images": [{}], "annotations": [], "categories": []}'],
)
def test_a_broken_coco_file_is_refused(tmp_path, text):
    (tmp_path / "x.json").write_text(text)
    with pytest.raises(UsageError, match="not a COCO file"):
        coco_store(tmp_path / "x.json", NAMES)


def test_other_settings_are_refused_until_overwritten(run, tmp_path):
    run()
    found = tree(tmp_path / "out")
    with pytest.raises(UsageError, match=r"other settings \(conf=0.25\)"):
        run(settings={**SETTINGS, "conf": 0.5})
    assert tree(tmp_path / "out") == found
    assert run(settings={**SETTINGS, "conf": 0.5}, overwrite=True).predicted == 4


def test_other_classes_are_not_mixed(run, tmp_path):
    (tmp_path / "out").mkdir()
    YAML.save(tmp_path / "out/data.yaml", {"path": ".", "names": ["dog", "cat"]})
    with pytest.raises(UsageError, match=r"\['dog', 'cat'\].*must not be mixed"):
        run()


def test_broken_images_are_skipped_and_named(run, source, tmp_path):
    whole = (source / "a.jpg").read_bytes()
    (source / "cut.jpg").write_bytes(whole[: len(whole) // 3])
    (source / "empty.png").write_bytes(b"")
    (source / "text.jpg").write_text("no image")
    (source / "tiny.png").write_bytes(cv2.imencode(".png", IMAGE[:1, :1])[1].tobytes())
    (source / "gone.jpg").symlink_to(source / "nowhere.jpg")
    before = tree(source)
    done = run()
    assert set(done.skipped) == {"cut.jpg", "empty.png", "text.jpg", "tiny.png", "gone.jpg"}
    assert all(done.skipped.values()) and len(done.records) == 4
    assert tree(source) == before
    assert not (tmp_path / "out/images/cut.jpg").exists()


def test_grey_16_bit_and_cmyk_images_are_labelled(run, source):
    from PIL import Image

    (source / "grey.png").write_bytes(cv2.imencode(".png", IMAGE[..., 0])[1].tobytes())
    (source / "deep.png").write_bytes(cv2.imencode(".png", IMAGE.astype(np.uint16) * 257)[1].tobytes())
    Image.fromarray(IMAGE).convert("CMYK").save(source / "cmyk.jpg")
    seen = []
    done = run(model=lambda image: seen.append((image.shape, image.dtype)) or predict(image), previews=True)
    assert not done.skipped and len(done.records) == 7
    assert {d for _, d in seen} == {np.dtype("uint8")}


def test_a_rotated_image_is_labelled_upright(run, source):
    from PIL import Image

    exif = Image.Exif()
    exif[274] = 6
    Image.fromarray(IMAGE).save(source / "turned.jpg", exif=exif)
    assert run().records["turned.jpg"]["size"] == [48, 64]


def test_a_new_picture_under_an_old_name_is_predicted_again(run, source, tmp_path):
    run()
    preview = tmp_path / "out/previews/a.jpg"
    before = preview.read_bytes()
    (source / "a.jpg").write_bytes(cv2.imencode(".jpg", np.full((60, 80, 3), 7, np.uint8))[1].tobytes())
    assert run(model=fail).kept == ["a.jpg"]  # its label is no longer sure to be the model's
    shutil.rmtree(tmp_path / "out/labels")
    done = run()
    assert done.predicted == 1 and done.records["a.jpg"]["size"] == [80, 60]
    assert preview.read_bytes() != before


def test_beside_writes_where_training_looks(run, source, tmp_path):
    run(beside=True)
    assert (source / "a.txt").is_file() and (source / "sub/labels/ü.txt").is_file()
    assert not (tmp_path / "out/labels").exists() and not (tmp_path / "out/images").exists()
    run("voc", beside=True, format="voc")
    assert (source / "sub/a.xml").is_file()


def test_two_images_never_share_a_label(run, source):
    shutil.copy(source / "a.jpg", source / "a.jpeg")
    with pytest.raises(UsageError, match=r"'a.jpeg' and 'a.jpg' would share the label"):
        run()


def test_labels_mirror_the_folders_of_a_dataset(tmp_path):
    (tmp_path / "ds/images/train").mkdir(parents=True)
    file = tmp_path / "ds/images/train/1.jpg"
    file.write_bytes(cv2.imencode(".jpg", IMAGE)[1].tobytes())
    root, images = find_images(file.parent, tmp_path / "ds")
    assert root == tmp_path / "ds/images" and images == {"train/1.jpg": file}
    label_images(images, tmp_path / "ds", predict, NAMES, SETTINGS)
    assert (tmp_path / "ds/labels/train/1.txt").is_file()
    assert [f.name for f in (tmp_path / "ds/images").rglob("*.*")] == ["1.jpg"]


@pytest.mark.parametrize(
    ("given", "found"),
    [
        pytest.param("{s}", {"a.jpg", "b c.png", "sub/a.jpg", "sub/images/ü.jpg"}, id="folder"),
        pytest.param("{s}/**/*.jpg", {"a.jpg", "sub/a.jpg", "sub/images/ü.jpg"}, id="glob"),
        pytest.param("{s}/sub/?.jpg", {"a.jpg"}, id="glob in a folder"),
        pytest.param("{s}/b c.png", {"b c.png"}, id="image"),
        pytest.param("{s}/list.txt", {"a.jpg", "sub/a.jpg"}, id="text file"),
        pytest.param(["{s}/a.jpg", "{s}/sub"], {"a.jpg", "sub/a.jpg", "sub/images/ü.jpg"}, id="list"),
    ],
)
def test_sources(source, tmp_path, given, found):
    (source / "list.txt").write_text("./a.jpg\n./sub/a.jpg\n", encoding="utf-8-sig")
    given = given.format(s=source) if isinstance(given, str) else [g.format(s=source) for g in given]
    assert set(find_images(given, tmp_path / "out")[1]) == found


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        pytest.param("nowhere", "does not exist", id="missing"),
        pytest.param("{s}/*.gif", "does not exist", id="glob of nothing"),
        pytest.param("{s}/empty", "No images", id="empty folder"),
        pytest.param("{s}/x.mp4", "No images", id="video"),
        pytest.param("{s}/bytes.txt", "cannot be read", id="list that is no text"),
    ],
)
def test_illegal_sources(source, tmp_path, given, expected):
    (source / "empty").mkdir()
    (source / "x.mp4").write_bytes(b"0")
    (source / "bytes.txt").write_bytes(b"\xff\xfe\x00\xd8")
    with pytest.raises(UsageError, match=expected):
        find_images(given.format(s=source), tmp_path / "out")


def test_the_source_folder_is_only_written_when_asked(source):
    with pytest.raises(UsageError, match="lies inside the source"):
        find_images(source, source / "out")
    (source / "previews").mkdir()
    shutil.copy(source / "a.jpg", source / "previews/a.jpg")
    assert len(find_images(source, source)[1]) == 4  # what an earlier run drew is no source


@given(
    st.integers(10, 4000),
    st.integers(10, 4000),
    st.lists(st.tuples(*[st.floats(0, 1)] * 4, st.integers(0, 1)), max_size=6),
)
def test_boxes_survive_every_format(w, h, drawn):
    objects = []
    for a, b, c, d, cls in drawn:
        x0, x1 = sorted((round(a * w, 2), round(b * w, 2)))
        y0, y1 = sorted((round(c * h, 2), round(d * h, 2)))
        if x1 > x0 and y1 > y0:
            objects.append({"class": cls, "confidence": 0.5, "box": [x0, y0, x1, y1]})
    record = {"image": "x/ü.jpg", "size": [w, h], "objects": objects}
    wanted = np.array([o["box"] for o in objects]).reshape(-1, 4)

    rows = [list(map(float, r.split())) for r in yolo_text(record, NAMES, False).splitlines()]
    centre, size = np.array([r[1:3] for r in rows]).reshape(-1, 2), np.array([r[3:5] for r in rows]).reshape(-1, 2)
    corners = np.hstack([centre - size / 2, centre + size / 2]) * [w, h, w, h]
    assert np.allclose(corners, wanted, atol=0.01)

    shown = [a["bbox"] for a in coco_entry(record, NAMES, False)["annotations"]]
    shown = np.array(shown).reshape(-1, 4)
    assert np.allclose(np.hstack([shown[:, :2], shown[:, :2] + shown[:, 2:]]), wanted, atol=0.01)

    text = voc_annotation(record, NAMES, False)
    assert text.count("<confidence>0.5000</confidence>") == len(objects)


def test_voc_is_read_back_within_a_pixel(run, tmp_path):
    done = run(format="voc")
    annotation = read_voc(tmp_path / "out" / LABEL["voc"])
    record = done.records["a.jpg"]
    assert annotation.size == tuple(record["size"])
    assert [o.name for o in annotation.objects] == [NAMES[1], NAMES[0]]
    for o, wanted in zip(annotation.objects, record["objects"]):
        assert np.allclose(o.box, wanted["box"], atol=1)
    text = (tmp_path / "out" / LABEL["voc"]).read_text()
    assert "<confidence>0.9100</confidence>" in text and "&amp; &lt;x&gt;" in text


@pytest.mark.parametrize("polygon", [True, False])
def test_yolo_confidence_is_the_last_column(polygon):
    o = {"class": 1, "confidence": 0.25, "box": [0, 0, 32, 24]}
    o |= {"polygon": [0, 0, 32, 0, 32, 24]} if polygon else {}
    record = {"image": "a.jpg", "size": [64, 48], "objects": [o]}
    plain, more = (yolo_text(record, NAMES, save_conf) for save_conf in (False, True))
    numbers = (
        "0.000000 0.000000 0.500000 0.000000 0.500000 0.500000" if polygon else "0.250000 0.250000 0.500000 0.500000"
    )
    assert plain == f"1 {numbers}\n" and more == f"1 {numbers} 0.2500\n"
