# Copyright (C) yolo_ext authors. AGPL-3.0 licence.
from __future__ import annotations

import pytest

from yolo_ext.core.errors import UsageError, YoloExtError
from yolo_ext.core.registry import Need, Row, Table, suggest


@pytest.fixture
def table() -> Table:
    made = Table("pruning criterion")

    @made.row("lamp", "Relative magnitude", paper="Lee et al., 2021", needs=[Need.WEIGHTS])
    def lamp(x):
        return x

    made.row("random", "Noise")(lambda x: 0)
    return made


def test_rows_in_order_with_their_facts(table):
    assert table.names() == ["lamp", "random"] == [row.name for row in table]
    row = table["lamp"]
    assert isinstance(row, Row) and row.fn(3) == 3
    assert (row.summary, row.paper, row.needs) == ("Relative magnitude", "Lee et al., 2021", (Need.WEIGHTS,))


def test_the_decorator_returns_the_function(table):
    def fn():
        """Nothing."""

    assert table.row("mine", "Mine")(fn) is fn and table["mine"].fn is fn


def test_a_name_is_taken_once(table):
    with pytest.raises(ValueError, match="two of the pruning criterion 'lamp'"):
        table.row("lamp", "Another")(lambda x: 1)
    assert table["lamp"].fn(3) == 3 and table.names() == ["lamp", "random"]


def test_a_wrong_name_is_also_the_error_that_python_expects(table):
    with pytest.raises(ValueError, match="Unknown pruning criterion 'lmap'") as e:
        table["lmap"]
    assert isinstance(e.value, YoloExtError) and e.value.exit_status == 2


@pytest.mark.parametrize(
    ("name", "near"),
    [("lmap", " Did you mean 'lamp'?"), ("LAMP", ""), ("zzz", ""), ("ran", " Did you mean 'random'?"), (None, "")],
)
def test_unknown_name_gets_the_nearest_and_all_legal_ones(table, name, near):
    with pytest.raises(UsageError) as e:
        table[name]
    assert str(e.value) == (
        f"Unknown pruning criterion '{name}'.{near} Legal: lamp, random, or your own as 'package.module:function'."
    )


def test_a_method_that_is_gone_is_told_with_a_better_one(table):
    losses = Table("logit loss")
    losses.row("l1", "Absolute difference")(abs)
    with pytest.raises(UsageError, match=r"Unknown logit loss 'l2'\. It is gone: 'l1' does better\. Legal: l1"):
        losses["l2"]
    with pytest.raises(UsageError, match=r"criterion 'l2'\. Legal"):  # which this table never had
        table["l2"]


def test_user_function(table, tmp_path, monkeypatch):
    (tmp_path / "my_methods.py").write_text("def score(x):\n    return x + 1\n")
    monkeypatch.syspath_prepend(tmp_path)
    row = table["my_methods:score"]
    assert row.fn(1) == 2 and row.name == "my_methods:score"
    assert "my_methods:score" not in table.names()


@pytest.mark.parametrize(
    ("path", "message"),
    [
        pytest.param("no_such_module:fn", "ModuleNotFoundError", id="module"),
        pytest.param("math:no_such_function", "AttributeError", id="function"),
        pytest.param("math:pi", "is not callable", id="not-callable"),
        pytest.param(":fn", "ValueError", id="no-module"),
        pytest.param("math:", "AttributeError", id="no-function"),
        pytest.param(".relative:fn", "TypeError", id="relative"),
        pytest.param("broken_methods:fn", "ZeroDivisionError", id="broken-module"),
    ],
)
def test_user_function_that_cannot_be_had(table, path, message, tmp_path, monkeypatch):
    (tmp_path / "broken_methods.py").write_text("1 / 0\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(UsageError, match=message) as e:
        table[path]
    assert f"pruning criterion '{path}'" in str(e.value) and "\n" not in str(e.value)


@pytest.mark.parametrize(
    ("name", "near"),
    [("alpha", "alphas"), ("alphsa", "alphas"), ("modle", "model"), ("", ""), (3, ""), ("nothing like it", "")],
)
def test_suggest(name, near):
    assert suggest(name, ["alphas", "beta", "modules", "model"]) == (f" Did you mean '{near}'?" if near else "")
