# Copyright (C) yolo_ext authors. AGPL-3.0 licence.
"""`yolo-ext compare`: two models, or what was kept of them, over the same images."""

import json
from dataclasses import replace

import numpy as np
import pytest

from yolo_ext.cli import main
from yolo_ext.stock.evidence import Evidence


@pytest.fixture
def files(tmp_path) -> str:
    """Return the words that compare a base with one that has lost most of class b."""
    rng = np.random.default_rng(0)
    image, cls = np.repeat(np.arange(80, dtype=np.int32), 5), rng.integers(0, 2, 400, dtype=np.int32)
    area, conf = np.full(400, 5000, np.float32), rng.random(400).astype(np.float32)
    about = {"task": "detect", "names": {0: "a", 1: "b"}, "images_hash": "i", "labels_hash": "l"}
    names = [f"{i}.jpg" for i in range(80)]
    hits = np.repeat(rng.random((400, 1)) < 0.9, 10, axis=1)
    base = Evidence(about, names, image, cls, conf, area, image, cls, area, {"box": hits})
    gone = hits & ~((cls == 1) & (rng.random(400) < 0.8))[:, None]
    (tmp_path / "base.npz").write_bytes(base.data())
    (tmp_path / "new.npz").write_bytes(replace(base, hits={"box": gone}).data())
    (tmp_path / "other.npz").write_bytes(replace(base, about={**about, "labels_hash": "m"}).data())
    return f"compare model={tmp_path}/base.npz other={tmp_path}/new.npz save_dir={tmp_path}/run resamples=100"


@pytest.mark.parametrize(
    ("more", "status", "says"),
    [("", 1, "contract recall.b"), ("contract.map.a=-0.05", 0, "worse"), ("contract.map.b=-0.05", 1, "contract map.b"),
     ("contract.map=-0.9 confidence=0.95", 0, "worse"), ("contract.recall.c=-0.1", 2, "Legal: map, recall"),
     ("contract.map.a=0.1", 2, "such as -0.01"), ("contract=none.yaml", 2, "does not exist"),
     ("contract={}/limits.yaml contract.map.a=-0.9", 1, "contract map.b"),
     ("contract.map.b=-0.9 contract={}/limits.yaml", 0, "worse"), ("contract.map=-1 contract=no", 2, "not a YAML file"),
     ("other={}/other.npz", 2, "different labels"), ("other=best.pt", 2, "'data' is missing")],
    ids=["default contract", "held", "broken", "held surely", "unknown class", "wrong sign", "no file", "file and key",
         "key over file", "key and no file", "other labels", "no data"],
)  # fmt: skip
def test_contracts(files, tmp_path, capsys, caplog, more, status, says):
    (tmp_path / "limits.yaml").write_text("map: {b: -0.05}\n")
    assert main([*files.split(), *more.format(tmp_path).split()]) == status
    out = capsys.readouterr()
    assert says in out.out + out.err + caplog.text
    assert (tmp_path / "run" / "compare.json").exists() == (status < 2)


def test_what_is_kept_is_enough_to_compare_again(files, tmp_path):
    main(files.split())
    found = json.loads((tmp_path / "run" / "compare.json").read_text())
    again = f"compare model={tmp_path}/run/base.npz other={tmp_path}/run/other.npz save_dir={tmp_path}/2 resamples=100"
    main(again.split())
    assert json.loads((tmp_path / "2" / "compare.json").read_text()) == found
    assert found["changes"][0]["name"] == "map" and found["changes"][0]["verdict"] == "worse"
    assert found["same_recall"] is None or 0 <= found["same_recall"] <= 1
