# Copyright (C) yolo_ext authors. AGPL-3.0 licence.
from __future__ import annotations

import json
import math

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from yolo_ext.quantization.search import config_list, fewest_float, write_config_list

ORDER = [[f"model.{i}.conv"] for i in range(9)]


def by_count(drops):
    """Return an evaluator that only looks at the number of float layers, and what it was asked."""
    asked = []

    def evaluate(excluded):
        asked.append(len(excluded))
        return drops[len(excluded)]

    return evaluate, asked


@pytest.mark.parametrize("needed", range(len(ORDER) + 1))
def test_finds_the_smallest_number_in_few_trials(needed):
    evaluate, asked = by_count([0.02 if k < needed else 0.001 for k in range(len(ORDER) + 1)])
    excluded, trace = fewest_float(ORDER, evaluate, 0.003)
    assert excluded == [group[0] for group in ORDER[:needed]]
    assert [t["float"] for t in trace] == asked and len(set(asked)) == len(asked) <= 9


@given(st.lists(st.floats(0, 1), min_size=1, max_size=70), st.floats(0, 1))
def test_budget_of_a_loss_that_falls(values, budget):
    drops = sorted(values, reverse=True)
    order = [[str(i)] for i in range(len(drops) - 1)]
    evaluate, asked = by_count(drops)
    excluded, _ = fewest_float(order, evaluate, budget)
    least = next((k for k, d in enumerate(drops) if d <= budget), None)
    assert len(excluded) == least if least is not None else drops[len(excluded)] == min(drops)
    assert len(asked) <= 2 * math.log2(len(drops) + 1) + 3


@given(st.lists(st.floats(0, 1), min_size=1, max_size=40), st.floats(0, 1))
def test_any_loss_gives_a_trial_that_holds_the_budget_if_one_did(drops, budget):
    order = [[str(i)] for i in range(len(drops) - 1)]
    excluded, trace = fewest_float(order, by_count(drops)[0], budget)
    chosen = drops[len(excluded)]
    assert chosen in [t["drop"] for t in trace]
    assert chosen <= budget or chosen == min(t["drop"] for t in trace)
    assert chosen <= budget or all(t["drop"] > budget for t in trace)


def test_groups_go_together():
    excluded, _ = fewest_float([["a", "b"], ["c"]], lambda x: 0.0 if "b" in x else 1.0, 0.5)
    assert excluded == ["a", "b"]


@pytest.mark.parametrize("excluded", [[], ["model.1.conv", "model.2.cv1.conv"]], ids=["none", "two"])
def test_files_hold_the_list(excluded, tmp_path):
    files = write_config_list(excluded, tmp_path / "new")
    assert yaml.safe_load(files[0].read_text()) == json.loads(files[1].read_text()) == config_list(excluded)
    assert config_list(excluded) == ([{"op_names": excluded, "exclude": True}] if excluded else [])
    own = [{"op_types": ["Conv2d"], "quant_bits": 4}]
    files = write_config_list(excluded, tmp_path / "new", own)
    assert json.loads(files[1].read_text()) == own + config_list(excluded)
