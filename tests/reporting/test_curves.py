# Copyright (C) yolo_ext authors. AGPL-3.0 licence.
from __future__ import annotations

import matplotlib.pyplot as plt
import numpy as np
import pytest

from yolo_ext.reporting import figures as drawing
from yolo_ext.reporting.figures import plot_layers, plot_ridge

EDGES = [0.0, *(10 ** (k / 20) for k in range(-80, 21))]


def record(epoch: int, zero: int = 0, scores: str = "|gamma|", **more) -> dict:
    histogram = [zero, *[0] * 75, *[10] * 10, *[0] * 15]
    layers = {"model.0.conv": 0.1, "model.1.conv": zero / (zero + 100)}
    return {"epoch": epoch, "method": "slim", "scores": scores, "threshold": 0.01, "share": zero / (zero + 100),
            "speedup": 1 + epoch / 10, "layers": layers, "collapsed": [], "histogram": histogram, **more}  # fmt: skip


def history(*records: dict) -> dict:
    return {"edges": EDGES, "epochs": list(records)}


@pytest.fixture
def figures(monkeypatch):
    """Keep what is drawn, to look into it."""
    made = []
    save = drawing.save
    monkeypatch.setattr(drawing, "save", lambda figure, path: (made.append(figure), save(figure, path))[1])
    return made


CASES = [
    pytest.param(history(record(0)), id="one-epoch"),
    pytest.param(history(*(record(e, e * 10) for e in range(100))), id="many-epochs"),
    pytest.param(history(record(0, histogram=[50, *[0] * 100])), id="all-zero"),
    pytest.param(history(record(0, histogram=[0] * 101)), id="no-channels"),
    pytest.param(history(record(5, 3), record(9, 8, collapsed=["model.1.conv"])), id="collapsed"),
    pytest.param(history(record(0, layers={f"model.{i}.conv": 0.5 for i in range(130)})), id="many-layers"),
    pytest.param(history(record(0, layers={"model.0.$x_1$": 0.5, "model.1.conv": 1.0}), record(1)), id="layers-change"),
]


@pytest.mark.parametrize("plot", [plot_ridge, plot_layers])
@pytest.mark.parametrize("found", CASES)
@pytest.mark.filterwarnings("error")
def test_draws(plot, found, tmp_path):
    path = tmp_path / "new" / "picture.png"
    assert plot(found, path) == path
    assert path.stat().st_size > 5_000 and plt.imread(path).std() > 0.01
    assert not plt.get_fignums()


def test_first_and_last_epoch_are_among_at_most_15_ridges(figures, tmp_path):
    plot_ridge(history(*(record(e, e) for e in range(100))), tmp_path / "ridge.png")
    labels = [t.get_text() for t in figures[0].axes[0].get_yticklabels()]
    assert len(labels) == 15 and labels[0] == "1" and labels[-1] == "100"


def test_zeros_have_bars_of_their_own(figures, tmp_path):
    plot_ridge(history(record(0), record(1, 300)), tmp_path / "ridge.png")
    zero = figures[0].axes[0]
    assert [b.get_width() for b in zero.patches] == pytest.approx([0.0, 0.75])
    assert [t.get_text().strip() for t in zero.texts] == ["0%", "75%"]


def test_few_small_scores_do_not_stretch_the_axis(figures, tmp_path):
    few, many = record(0), record(0)
    few["histogram"][1], many["histogram"][1] = 0, 10
    for i, r in enumerate((few, many)):
        plot_ridge(history(r), tmp_path / f"{i}.png")
    lefts = [f.axes[1].get_xlim()[0] for f in figures]
    assert lefts == pytest.approx([5e-3, 1e-4], rel=0.2)


@pytest.mark.parametrize(("scores", "lines"), [("|gamma|", 0), ("relative norm", 1)])
def test_the_threshold_is_drawn_where_it_is_one_line(figures, tmp_path, scores, lines):
    plot_ridge(history(record(0, scores=scores)), tmp_path / "ridge.png")
    found = [line for line in figures[0].axes[1].lines if set(line.get_xdata()) == {0.01}]
    assert len(found) == lines


def test_heat_map_is_grey_where_a_layer_was_not_prunable(figures, tmp_path):
    plot_layers(history(record(0, layers={"a": 0.2, "b": 0.4}), record(1, layers={"b": 0.6})), tmp_path / "layers.png")
    table = figures[0].axes[0].images[0].get_array()
    np.testing.assert_allclose(np.ma.filled(table, np.nan), [[0.2, np.nan], [0.4, 0.6]])


def test_scores_are_written_as_numbers(figures, tmp_path):
    """A logarithmic axis writes formulas, which are not drawn as such, as names may hold a $."""
    plot_ridge(history(record(0)), tmp_path / "ridge.png")
    figures[0].canvas.draw()
    labels = [t.get_text() for t in figures[0].axes[1].get_xticklabels(which="both") if t.get_text()]
    assert len(labels) > 1 and all(float(label) > 0 for label in labels)
