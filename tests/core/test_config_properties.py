# Copyright (C) yolo_ext authors. AGPL-3.0 licence.
"""Options of any legal values, of every technique, come back as they were from each kind of file."""

from __future__ import annotations

import json
from dataclasses import asdict, fields
from typing import Any

import pytest
import torch
import yaml
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from test_config import inside, kind
from torch import nn
from ultralytics.utils import YAML

from yolo_ext.checkpoint import manifest, note
from yolo_ext.core.config import CONFIGS, as_plain, changed, load_recipe, parse
from yolo_ext.core.errors import UsageError

names = st.text(st.characters(codec="utf-8", exclude_categories=["C"]), min_size=1, max_size=6)


def values(f: Any) -> st.SearchStrategy[Any]:
    """Return legal values of an option, by its type and limits."""
    m = f.metadata
    low, high = m.get("low", m.get("above", 0)), m.get("high", m.get("below", 1000))
    if "choices" in m:
        found = st.sampled_from(m["choices"])
    elif kind(f) == "float":
        found = st.floats(low, high, exclude_min="above" in m, exclude_max="below" in m, allow_subnormal=False)
    elif kind(f) == "int":
        found = st.integers(int(low), int(high))
    elif str(f.type) == "list[str]":
        found = st.lists(names, max_size=3)
    else:
        found = st.sampled_from([v for v in inside(f) if not isinstance(v, tuple)])
    return st.none() | found if "None" in str(f.type) else found


def config(technique: str) -> st.SearchStrategy[dict[str, Any]]:
    return st.fixed_dictionaries({}, optional={f.name: values(f) for f in fields(CONFIGS[technique])})


@pytest.mark.parametrize("technique", CONFIGS)
@given(data=st.data())
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_there_and_back(technique, tmp_path, data):
    cfg = CONFIGS[technique](**data.draw(config(technique)))
    assert CONFIGS[technique](**asdict(cfg)) == cfg
    plain = as_plain({technique: cfg})
    for loaded in (json.loads(json.dumps(plain)), yaml.safe_load(yaml.safe_dump(plain, allow_unicode=True))):
        assert CONFIGS[technique](**loaded[technique]) == cfg
    model = nn.Sequential()
    note(model, quant={"options": plain[technique]})
    torch.save(model, tmp_path / "model.pt")
    kept = manifest(torch.load(tmp_path / "model.pt", weights_only=False)).quant["options"]
    assert CONFIGS[technique](**kept) == cfg
    if options := changed(cfg):
        YAML.save(tmp_path / "recipe.yaml", {technique: options})
        flat = load_recipe(str(tmp_path / "recipe.yaml"))
        assert CONFIGS[technique](**{k.partition(".")[2]: v for k, v in flat.items()}) == cfg


@given(data=st.data())
@settings(max_examples=60, deadline=None)
def test_what_parses_parses_again(data):
    given_ = {t: data.draw(st.none() | config(t)) for t in CONFIGS}
    try:
        parsed = parse(given_)
    except UsageError:  # options that contradict each other
        assume(False)
    assert parse(as_plain(parsed)) == parsed
