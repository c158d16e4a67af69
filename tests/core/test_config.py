# Copyright (C) yolo_ext authors. AGPL-3.0 licence.
from __future__ import annotations

import inspect
import json
import math
import pickle
from dataclasses import FrozenInstanceError, asdict, fields, replace

import pytest
import yaml

from yolo_ext.core.config import (
    CONFIGS,
    EXT_DEFAULTS,
    TARGETS,
    PruneConfig,
    QuantConfig,
    cfg_dir,
    comma_list,
    default_yaml,
    help_lines,
    parse,
    without_effect,
)
from yolo_ext.core.errors import UsageError
from yolo_ext.core.options import lasting

EVERY = [(t, f) for t, cls in CONFIGS.items() for f in fields(cls)]
IDS = [f"{t}.{f.name}" for t, f in EVERY]
TARGET = {"ratio": 0.5}  # pruning needs one of its targets


def legal(technique: str, name: str, value) -> dict:
    """Return a legal set of options in which one has this value."""
    needs = technique == "prune" and name not in TARGETS and value != "2:4"
    return {technique: {**(TARGET if needs else {}), name: value}}


def kind(f) -> str:
    return str(f.type).split(" |")[0].split("[")[0]


def inside(f) -> list:
    """Return legal values: both ends of the range and the choices."""
    m, whole = f.metadata, kind(f) == "int"
    if "choices" in m:
        return list(m["choices"])
    if f.type == "list[int]":
        return [[], [0, 7], (1, 2)]
    if kind(f) == "Stack":
        return ["cwd", ["cwd", {"name": "pkd", "weight": 0.5}]]
    if kind(f) == "Entries":
        return [[], [{"op_types": ["Conv2d"], "exclude": True}], ({"op_names": "a"},)]
    if kind(f) == "list":
        return [[], ["a"], ("a", "b")]
    if kind(f) == "dict":
        return [{}, {"model.9": 0.5}]
    if kind(f) == "bool":
        return [True, False]
    if kind(f) == "str":
        return ["anything"]
    values = [m[k] for k in ("low", "high") if k in m]
    if "above" in m:
        values.append(m["above"] + 1e-6)
    if "below" in m:
        values.append(m["below"] - 1e-6)
    elif "high" not in m:
        values += [10**6, 1e6]
    return [int(v) if whole else v for v in values]


def outside(f) -> list:
    """Return illegal values: just outside the range, and of other types."""
    m = f.metadata
    if kind(f) == "Stack":
        return [3, 1.5, True, [], [1], [{"weight": 1.0}]]
    if kind(f) == "Entries":
        return [3, 1.5, True, [1], "nowhere.yaml", ["a"], None]
    if f.type == "list[int]":
        return ["a", 1.5, [-1], ["1"], {"a": 1}, [True]]
    if kind(f) == "list":
        return [1.5, [1.5], {"a": 1}, [None]]
    if kind(f) == "dict":
        return ["a", 3, ["a"], {"a": 1.0}, {"a": -0.1}, {"a": "b"}]
    if kind(f) == "bool":
        return [1, "yes", [True]]
    if kind(f) == "str":
        lists = [] if "list" in str(f.type) else [["a"]]
        return [3, 1.5, True, *lists, *(["nonsense"] if "choices" in m else [])]
    values: list = ["8", "two", True, [1], math.nan, math.inf, -math.inf]
    values += [m["low"] - 1] if "low" in m else []
    values += [m["high"] + 1e-6] if "high" in m and kind(f) == "float" else []
    values += [m[k] for k in ("above", "below") if k in m]
    values += [1.5] if kind(f) == "int" else []
    return values


@pytest.mark.parametrize(("technique", "option"), EVERY, ids=IDS)
def test_legal_values(technique, option):
    for value in inside(option):
        got = getattr(parse(legal(technique, option.name, value))[technique], option.name)
        assert got == (list(value) if isinstance(value, tuple) else value)
        assert type(got).__name__ == kind(option) or kind(option) in ("Stack", "Entries")


@pytest.mark.parametrize(("technique", "option"), EVERY, ids=IDS)
def test_illegal_values(technique, option):
    for value in outside(option) + ([] if "None" in str(option.type) else [None]):
        with pytest.raises(UsageError) as e:
            parse({technique: {option.name: value}})
        assert f"'{technique}.{option.name}={value}'" in str(e.value)
        assert "egal" in str(e.value) and "\n" not in str(e.value)


@pytest.mark.parametrize(("technique", "option"), EVERY, ids=IDS)
def test_every_option_has_help_and_a_legal_default(technique, option):
    assert option.metadata["help"] and not option.metadata["help"].endswith(".")
    defaults = asdict(CONFIGS[technique]())
    target = {} if technique != "prune" else TARGET
    assert parse({technique: {**defaults, **target}})[technique] == CONFIGS[technique](**target)


@pytest.mark.parametrize(
    ("given_", "near"),
    [
        ({"prune": {"spedup": 2}}, "Unknown option 'prune.spedup'. Did you mean 'prune.speedup'?"),
        ({"prune": {}}, "Pruning needs a target: give 'prune.speedup=2'"),
        ({"distill": {"teecher": "a"}}, "Unknown option 'distill.teecher'. Did you mean 'distill.teacher'?"),
        ({"quant": {"observr": "a"}}, "Unknown option 'quant.observr'. Did you mean 'quant.observer'?"),
        ({"prun": {}}, "Unknown technique 'prun'. Did you mean 'prune'?"),
        ({"prune": {"scope": "globl"}}, "'prune.scope=globl' is illegal. Did you mean 'global'? Legal: global, local"),
        ({"prune": {1: 2}}, "Unknown option 'prune.1'."),
        ({"prune": 2}, "'prune=2' is illegal: give options such as 'prune.method=...'."),
        ({"quant": {"mode": "PTQ"}}, "'quant.mode=PTQ' is illegal."),
        ({"prune": {"max_ratio": 1}}, "'prune.max_ratio=1' is out of range. Legal: at least 0.0 and below 1.0."),
        ({"prune": {"speedup": 1}}, "'prune.speedup=1' is out of range. Legal: above 1.0."),
        ({"prune": {"speedup": 2, "ratio": 0.5}}, "prune.speedup, prune.ratio are all targets: give one"),
        ({"prune": {"ratio": 1.0}}, "'prune.ratio=1.0' is out of range. Legal: at least 0.0 and below 1.0."),
        ({"prune": {"kind": "unstructured", "speedup": 2}}, "'prune.kind=unstructured' needs 'prune.ratio'"),
        ({"prune": {"kind": "2:4", "ratio": 0.5}}, "'prune.kind=2:4' always zeroes half"),
        ({"prune": {"kind": "2:4", "scope": "isomorphic"}}, "'prune.kind=2:4' knows no prune.scope. Leave them out"),
        ({"prune": {"kind": "unstructured", "ratio": 0.5, "scope": "isomorphic"}}, "Legal: global, local."),
        ({"prune": {"config_list": []}}, "Unknown option 'prune.config_list'. Did you mean 'quant.config_list'?"),
        ({"prune": {"ratio": 0.5, "at": [1], "every": 2}}, "'prune.at' lists the epochs: leave 'prune.every'"),
        ({"prune": {"ratio": 0.5, "at": [5, 1]}}, "'prune.at=[5, 1]' is illegal: give each epoch once, in order"),
        ({"prune": {"ratio": 0.5, "steps": 2, "start": 5, "end": 2}}, "'prune.end=2' is before 'prune.start=5'"),
        ({"distill": {"features": None, "logits": None}}, "both off"),
        ({"sparsity": {"start": 5, "end": 5}}, "'sparsity.end=5' is not after 'sparsity.start=5'"),
        ({"sparsity": {"coefficient": -1}}, "'sparsity.coefficient=-1' is out of range. Legal: above 0.0."),
    ],
)
def test_messages(given_, near):
    with pytest.raises(UsageError) as e:
        parse(given_)
    assert str(e.value).startswith(near) or near in str(e.value)


@pytest.mark.parametrize("name", ["c.yaml", "c.json"])
def test_entries_come_from_a_file(tmp_path, name):
    entries = [{"op_types": ["Conv2d"], "quant_bits": {"weight": 4}}]
    file = tmp_path / name
    file.write_text(json.dumps(entries if name == "c.json" else {"config_list": entries}))
    assert parse({"quant": {"config_list": str(file)}})["quant"].config_list == entries


def test_all_problems_in_one_message():
    with pytest.raises(UsageError) as e:
        parse({"prune": {"speedup": 0.5, "metod": "l1"}, "quant": {"calib": 0}, "distil": True})
    message = str(e.value)
    assert message.startswith("4 problems with the options:\n")
    for part in ("prune.speedup=0.5", "'prune.method'?", "quant.calib=0", "'distill'?"):
        assert part in message


@pytest.mark.parametrize(
    ("given_", "stages", "idle"),
    [
        ({"prune": {"speedup": 2, "runtime": "torch"}}, True, ["prune.runtime (only with prune.latency)"]),
        (
            {"prune": {"speedup": 2, "schedule": "linear"}},
            True,
            ["prune.schedule (only with prune.at or every or steps)"],
        ),
        ({"prune": {"speedup": 2, "schedule": "linear", "every": 2}}, True, []),
        ({"prune": {"speedup": 2, "compare": True}}, True, []),
        ({"prune": {"speedup": 2, "compare": True}}, False, ["prune.compare (only in compress, prune and quantize)"]),
        ({"sparsity": {"target": 0.3}}, True, ["sparsity.target (only with sparsity.auto)"]),
        ({"sparsity": {"target": 0.3, "auto": True}}, True, []),
        ({"distill": {"share": 0.5}}, True, ["distill.share (only with distill.balance=auto)"]),
        ({"quant": {"mode": "ptq", "lr0": 1.0, "epochs": 10}}, True, ["quant.lr0 (only with quant.mode=auto/qat)"]),
        ({"quant": {"mode": "qat", "mixed": False}}, True, ["quant.mixed (only with quant.mode=auto/ptq)"]),
    ],
)
def test_what_has_no_effect_beside_the_other_options(given_, stages, idle):
    assert without_effect(parse(given_), stages=stages) == idle


@pytest.mark.parametrize(("technique", "option"), [(t, f) for t, f in EVERY if "only" in f.metadata])
def test_conditions_name_options_and_values_that_there_are(technique, option):
    known = {f.name: f for f in fields(CONFIGS[technique])}
    for part in option.metadata["only"].split(" or "):
        name, _, values = part.partition("=")
        assert set(values.split("/")) - {""} <= set(known[name].metadata.get("choices", ()))


@pytest.mark.parametrize("off", [None, False])
def test_off(off):
    assert parse({"prune": off}) == dict.fromkeys(CONFIGS)


@pytest.mark.parametrize("on", [True, {}, QuantConfig()])
def test_on_with_defaults(on):
    assert parse({"quant": on})["quant"] == QuantConfig()


@pytest.mark.parametrize("on", [{"speedup": 2}, PruneConfig(speedup=2.0)])
def test_dicts_and_dataclasses_are_alike(on):
    assert parse({"prune": on})["prune"] == PruneConfig(speedup=2.0)


@pytest.mark.parametrize(
    "given_",
    [
        {"prune": {"speedup": 0.5}},
        {"prune": {"metod": "l1"}},
        {"prune": {"spedup": 2, "scope": "globl", "seed": None}},
        {"quant": {"mode": "x"}},
        {"quant": {"config_list": "nowhere.yaml"}},
        {"distill": {"teacher": 3}},
        {"sparsity": {"final": 2}},
    ],
    ids=str,
)
def test_a_dataclass_says_what_the_command_line_says(given_):
    (technique, options) = next(iter(given_.items()))
    with pytest.raises(UsageError) as made:
        CONFIGS[technique](**options)
    with pytest.raises(UsageError) as read:
        parse(given_)
    assert str(made.value) == str(read.value)


def test_a_dataclass_holds_values_in_their_type():
    cfg = PruneConfig("l1", speedup=2, exclude=3, include=("a",))
    assert (cfg.method, cfg.speedup, cfg.exclude, cfg.include) == ("l1", 2.0, ["3"], ["a"])
    assert isinstance(cfg.speedup, float) and parse({"prune": cfg})["prune"] is cfg
    assert replace(cfg, ratio=0.5, speedup=None).ratio == 0.5 and pickle.loads(pickle.dumps(cfg)) == cfg
    with pytest.raises(UsageError, match=r"'prune\.speedup=1' is out of range"):
        replace(cfg, speedup=1)
    for wrong in (PruneConfig, QuantConfig):
        assert list(inspect.signature(wrong).parameters) == [f.name for f in fields(wrong)]


def test_configs_cannot_be_changed():
    with pytest.raises(FrozenInstanceError):
        PruneConfig().method = "l1"
    assert PruneConfig().exclude is not PruneConfig().exclude


def test_default_yaml_is_the_defaults():
    assert yaml.safe_load(default_yaml()) == {t: asdict(cls()) for t, cls in CONFIGS.items()}
    assert set(EXT_DEFAULTS) == set(CONFIGS)


def test_default_yaml_in_the_repository_is_fresh():
    assert (cfg_dir() / "default.yaml").read_text().rstrip() == default_yaml().rstrip(), "run: yolo-ext cfg"


@pytest.mark.parametrize("technique", CONFIGS)
def test_help_lines_name_every_option(technique):
    rows = help_lines(technique)
    assert [key for key, _, _ in rows] == [f"{technique}.{f.name}" for f in fields(CONFIGS[technique])]
    for (_, _, text), f in zip(rows, fields(CONFIGS[technique])):
        assert all(c in text for c in f.metadata.get("choices", ()))


@pytest.mark.parametrize("name", ["prune", "distill", "quant"])
def test_our_keys_shadow_none_of_ultralytics(name):
    from ultralytics.utils import DEFAULT_CFG_DICT

    assert name not in DEFAULT_CFG_DICT


def test_options_that_are_gone_may_say_what_happens_anyway():
    saved = {"learned": False, "bn": True, "calib": 8}  # as runs of 0.1 saved it
    assert parse(lasting({"quant": saved, "prune": None}))["quant"].calib == 8
    for options, instead in ({"learned": True}, "Leave it out"), (saved, "quant.adaround=200"):
        with pytest.raises(UsageError, match=f"is gone: .*{instead}"):
            parse({"quant": options})


@pytest.mark.parametrize(
    ("given_", "kind", "expected"),
    [
        ("a.pt,b.onnx", str, ["a.pt", "b.onnx"]),
        (" a , b,", str, ["a", "b"]),
        (["a ", 3], str, ["a", "3"]),
        (("0.8", 0.2), float, [0.8, 0.2]),
        ("1,2", int, [1, 2]),
        (4, int, [4]),
        ("", str, []),
        ([], float, []),
    ],
)
def test_lists_with_commas(given_, kind, expected):
    assert comma_list(given_, kind) == expected


def test_a_list_of_other_things_is_an_error():
    for given_ in ("1,x", 1.5, ["1.5"], True):
        with pytest.raises(ValueError):
            comma_list(given_, int)
