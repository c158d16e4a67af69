# Copyright (C) yolo_ext authors. AGPL-3.0 licence.
from __future__ import annotations

import pytest
from torch import nn
from ultralytics.nn.tasks import DetectionModel, SegmentationModel

from yolo_ext.core.errors import UsageError
from yolo_ext.quantization.plan import UNLISTED, listed_sites, make_plan, table
from yolo_ext.quantization.spec import PROFILES, SITES, Spec
from yolo_ext.stock import matches

X86 = PROFILES["ort-x86"]
A, B, HEAD, DFL = "model.1.conv", "model.2.cv1.conv", "model.22.cv2.0.2", "model.22.dfl.conv"
PROTO, LINEAR = "model.22.proto.upsample", "model.9.linear"


@pytest.fixture(scope="module")
def net() -> DetectionModel:
    return DetectionModel("yolov8n.yaml", nc=3, verbose=False)


@pytest.fixture(scope="module")
def seg() -> SegmentationModel:
    return SegmentationModel("yolov8n-seg.yaml", nc=3, verbose=False)


def bits(plan, site="weight"):
    return {path: sites[site].bits for path, sites in plan.items() if site in sites}


@pytest.mark.parametrize(
    ("name", "counts", "weights", "activations"),
    [
        ("ort-x86", {"input": 56, "weight": 56, "output": 56}, {7}, Spec(8)),
        ("ort-x86-vnni", {"input": 56, "weight": 56, "output": 56}, {8}, Spec(8)),
        ("ort-x86-full", {"input": 14, "weight": 56, "output": 56, "activation": 50, "add": 6}, {7}, Spec(8)),
        ("ort-arm", {"input": 56, "weight": 56, "output": 56}, {8}, Spec(8)),
        ("openvino", {"input": 50, "weight": 56, "residual": 6}, {8}, Spec(8)),
        ("tensorrt", {"input": 51, "weight": 57, "residual": 6}, {8}, Spec(8, True)),
    ],
)
def test_profiles(net, name, counts, weights, activations):
    plan, reasons = make_plan(net, PROFILES[name])
    if "activation" in counts and isinstance(net.model[9].cv1.act, nn.Identity):  # SPPF of Ultralytics 8.4.140
        counts = {**counts, "activation": counts["activation"] - 1}
    assert {site: n for site in SITES if (n := sum(site in s for s in plan.values()))} == counts
    assert set(bits(plan).values()) == weights
    assert {spec for s in plan.values() for site, spec in s.items() if site != "weight"} == {activations}
    assert all(s["weight"].symmetric and s["weight"].per_channel for s in plan.values() if "weight" in s)
    layers = [p for p, m in net.named_modules() if isinstance(m, (nn.Conv2d, nn.Linear))]
    assert sorted([*bits(plan), *reasons]) == sorted(layers)
    order = [p for p, _ in net.named_modules() if p in plan]
    assert list(plan) == order


def test_layers_that_only_train_are_not_quantized():
    plan, reasons = make_plan(SegmentationModel("yolo26n-seg.yaml", nc=3, verbose=False), X86)
    only = [f"model.23.proto.semseg.{i}" for i in ("0.conv", "1.conv", "2")]
    assert not plan.keys() & set(only) and reasons.keys() >= set(only)


def test_exclude_gives_reasons(net):
    plan, reasons = make_plan(net, X86, exclude=("model.1", r"re:m\.0"))
    assert reasons["model.1.conv"] == "excluded by 'model.1'"
    assert reasons["model.2.m.0.cv1.conv"] == "excluded by 're:m\\.0'"
    assert A not in plan and B in plan and "model.16.conv" in plan


@pytest.mark.parametrize("name", ["ort-x86-full", "openvino"])
def test_sums_of_excluded_bottlenecks_stay_float(net, name):
    plan, _ = make_plan(net, PROFILES[name], exclude=(r"model\.2\.m\.0", r"model\.4\.m\.0\.cv1"))
    assert "model.2.m.0" not in plan
    assert ("model.4.m.0" in plan) is (name == "ort-x86-full")  # a residual is there for the convolution beside it
    assert "model.4.m.1" in plan
    assert make_plan(net, PROFILES[name], exclude=("re:.",))[0] == {}


@pytest.mark.parametrize(
    ("entries", "path", "expected"),
    [
        ([{"op_types": ["Conv2d"], "quant_bits": 4}], A, {"input": (4, "u"), "weight": (4, "sc"), "output": (4, "u")}),
        (
            [{"op_types": "default", "quant_bits": {"weight": 4, "input": 6}}],
            A,
            {"input": (6, "u"), "weight": (4, "sc"), "output": (8, "u")},
        ),
        ([{"op_names": [A], "quant_types": ["weight"], "quant_bits": 2}], A, {"weight": (2, "sc")}),
        ([{"op_names": "model.1", "quant_types": "input"}], A, {"input": (8, "u")}),
        (
            [{"op_names": [A], "target_names": ["_input_", "weight"], "quant_dtype": "int4"}],
            A,
            {"input": (4, "u"), "weight": (4, "sc"), "output": (8, "u")},
        ),
        ([{"op_names": [A], "target_names": ["_output_"]}], A, {"output": (8, "u")}),
        (
            [{"op_names": [A], "quant_types": ["inputs", "outputs"], "quant_bits": {"_input_": 5, "outputs": 6}}],
            A,
            {"input": (5, "u"), "output": (6, "u")},
        ),
        (
            [{"op_names": [A], "quant_types": ["weight"], "quant_dtype": {"weight": "uint16"}}],
            A,
            {"weight": (16, "sc")},
        ),
        (
            [{"op_names": [A], "quant_scheme": "symmetric"}],
            A,
            {"input": (8, "s"), "weight": (7, "sc"), "output": (8, "s")},
        ),
        (
            [{"op_names": [A], "quant_scheme": {"input": "symmetric", "output": "affine", "weight": "symmetric"}}],
            A,
            {"input": (8, "s"), "weight": (7, "sc"), "output": (8, "u")},
        ),
        (
            [{"op_names": [A], "quant_scheme": "affine", "granularity": "per_tensor"}],
            A,
            {"input": (8, "u"), "weight": (7, "s"), "output": (8, "u")},
        ),
        (
            [{"op_names": [A], "granularity": {"weight": "default", "input": "per_tensor"}}],
            A,
            {"input": (8, "u"), "weight": (7, "s"), "output": (8, "u")},
        ),
        ([{"op_names_re": r"^model\.1\.", "quant_types": ["weight"]}], A, {"weight": (7, "sc")}),
        ([{"op_types": ["Conv2d"], "exclude": False}], A, {"input": (8, "u"), "weight": (7, "sc"), "output": (8, "u")}),
    ],
    ids=[
        "bits", "bits per type", "weight only", "input only", "NNI 3 names", "output only", "plural", "dtype per type",
        "symmetric", "scheme per type", "per tensor", "granularity per type", "regex", "exclude false",
    ],
)  # fmt: skip
def test_entries(net, entries, path, expected):
    base, _ = make_plan(net, X86)
    plan, reasons = make_plan(net, X86, config_list=entries)
    got = {s: (x.bits, f"{'s' if x.symmetric else 'u'}{'c' if x.per_channel else ''}") for s, x in plan[path].items()}
    assert got == expected
    assert list(plan) == (list(base) if "op_types" in entries[0] else [path])
    assert all((p in plan) != (reasons.get(p) == UNLISTED) for p in base)
    everything = make_plan(net, X86, config_list=[{"default": "all"}, *entries])[0]
    assert list(everything) == list(base) and everything[path] == plan[path]
    assert "op_types" in entries[0] or {p: s for p, s in everything.items() if p != path} == {
        p: s for p, s in base.items() if p != path
    }


CONVS = {"op_types": ["Conv2d"]}


@pytest.mark.parametrize(
    ("entry", "selectors"),
    [
        ({"op_names": ["model.4"]}, ["model.4"]),
        ({"op_names": [4]}, ["model.4"]),
        ({"op_names": ["model.4."]}, ["model.4"]),
        ({"op_names": ["model.4.cv1.conv", "model.6"]}, ["model.4.cv1", "model.6"]),
        ({"op_names": [r"re:^model\.[46]\."]}, ["model.4", "model.6"]),
        ({"op_names": [r"model\.[46]"]}, ["model.4", "model.6"]),
        ({"op_names_re": [r"^model\.[46]\."]}, ["model.4", "model.6"]),
        ({"op_names": ["backbone"], "exclude_op_names": [r"model\.[0-3]", "SPPF", "6"]}, ["4", "5", "7", "8"]),
        ({"op_types": ["Conv2d"], "op_names": ["model.4"]}, ["model.4"]),
        ({"op_types": ["SPPF"]}, ["9"]),
        ({**CONVS, "exclude_op_types": ["Bottleneck"]}, ["re:^(?!.*\\.m\\.).*conv$"]),
        ({**CONVS, "exclude_op_names": [A]}, [r"re:(?<!^model\.1)\.conv$"]),
        ({**CONVS, "exclude_op_names": "model.1"}, [r"re:(?<!^model\.1)\.conv$"]),
        ({**CONVS, "exclude_op_names_re": r"^model\.1\."}, [r"re:(?<!^model\.1)\.conv$"]),
    ],
    ids=str,
)
def test_a_list_restricts_to_what_it_names(net, entry, selectors):
    """As in NNI: names and types intersect, exclusions are taken off, nothing else is quantized."""
    usual = make_plan(net, X86)[0]
    named = set().union(*(matches(net, s) for s in selectors)) & set(usual)
    plan, reasons = make_plan(net, X86, config_list=[entry])
    assert set(plan) == named
    assert {p for p, r in reasons.items() if r == UNLISTED} == set(usual) - named


@pytest.mark.parametrize("selector", ["model.2", "2", "model.2.", r"model\.2", r"re:^model\.2\.", "model.2.cv1", "C2f",
                                      "neck", "head", "Conv2d"])  # fmt: skip
def test_one_matcher_for_exclude_and_lists_and_pruning(net, selector):
    usual, found = set(make_plan(net, X86)[0]), matches(net, selector)
    assert set(make_plan(net, X86, exclude=(selector,))[0]) == usual - found
    assert set(make_plan(net, X86, config_list=[{"op_names": [selector], "exclude": True}])[0]) == usual - found
    listed = set(make_plan(net, X86, config_list=[{"op_names": [selector]}])[0])
    assert listed & usual == usual & found
    assert selector != "model.2" or not any(p.startswith(("model.21", "model.22")) for p in found)


def test_large_blocks_mean_what_the_profile_quantizes_of_them(net):
    plan = make_plan(net, X86, config_list=[{"op_names": ["head", "model.0"]}])[0]
    assert HEAD not in plan and DFL not in plan and "model.22.cv2.0.0.conv" in plan
    assert "model.0.conv" in plan, "a block of one layer names that layer"


@pytest.mark.parametrize("profile", ["ort-x86", "ort-arm", "ort-x86-full", "openvino"])
@pytest.mark.parametrize("names", [{"quant_types": ["weight", "input"]}, {"target_names": ["_input_", "weight"]}])
def test_outputs_are_added_where_integer_convolutions_need_them(net, profile, names):
    entry = {"op_types": ["Conv2d", "Linear"], **names, "quant_bits": {"weight": 8, "input": 8}}
    plan = make_plan(net, PROFILES[profile], config_list=[entry])[0]
    assert all(("output" in s) == PROFILES[profile].output for s in plan.values() if "weight" in s)
    assert listed_sites(entry, PROFILES[profile])[1] == PROFILES[profile].output
    assert not listed_sites({"quant_types": ["weight"]}, PROFILES[profile])[1]


def test_observer_of_one_tensor(net):
    plan, _ = make_plan(net, X86, config_list=[{"op_names": [A], "observer": {"input": "minmax"}}])
    assert {s: spec.observer for s, spec in plan[A].items()} == {"input": "minmax", "weight": None, "output": None}


def test_later_entries_win(net):
    everything, one = {"op_types": ["Conv2d"], "quant_bits": 4}, {"op_names": [A], "quant_bits": {"weight": 6}}
    plan, _ = make_plan(net, X86, config_list=[everything, one])
    assert (plan[A]["weight"].bits, plan[A]["input"].bits, plan[B]["weight"].bits) == (6, 4, 4)
    plan, _ = make_plan(net, X86, config_list=[one, everything])
    assert (plan[A]["weight"].bits, plan[B]["weight"].bits) == (4, 4)


@pytest.mark.parametrize(
    ("config_list", "quantized"),
    [
        ([{"op_names": [A], "exclude": True}], False),
        ([{"op_types": ["Conv2d"]}, {"op_names_re": r"^model\.1\.", "exclude": True}], False),
        ([{"op_names": [A], "exclude": True}, {"op_types": ["Conv2d"]}], True),
        ([{"op_names": [A], "exclude": True}, {"op_names": ["model.1"]}], True),
        ([{"op_types": ["Conv2d"], "exclude": True}, {"op_names": [A]}], True),
    ],
    ids=["exclude", "exclude after type", "type after exclude", "name after exclude", "only one"],
)
def test_excluded_entries(net, config_list, quantized):
    plan, reasons = make_plan(net, X86, config_list=config_list)
    assert (A in plan, A in reasons) == (quantized, not quantized)
    assert quantized or reasons[A] == f"excluded by entry {len(config_list)} of quant.config_list"
    assert not set(plan) & set(reasons)
    if config_list[0].get("exclude") and "op_types" in config_list[0]:
        assert list(plan) == [A]


def test_exclude_option_outlives_a_whole_type(net):
    plan, reasons = make_plan(net, X86, ("model.1",), [{"op_types": ["Conv2d"], "quant_bits": 4}])
    assert A not in plan and A in reasons
    assert A in make_plan(net, X86, ("model.1",), [{"op_names": [A]}])[0]


@pytest.mark.parametrize(
    ("path", "sites"),
    [("model.0.conv", {"input", "weight", "output"}), (HEAD, {"input", "weight", "output"})],
    ids=["stem", "head output"],
)
def test_float_convolutions_are_quantized_only_when_named(net, path, sites):
    plan, reasons = make_plan(net, X86, config_list=[{"op_types": ["Conv2d"], "quant_bits": 6}])
    assert path not in plan and path in reasons
    plan, reasons = make_plan(net, X86, config_list=[{"op_names": [path]}])
    assert set(plan[path]) == sites and path not in reasons
    assert HEAD in make_plan(net, X86, config_list=[{"op_names_re": r"cv2\.\d\.2"}])[0]


@pytest.mark.parametrize("kind", ["ConvTranspose2d", "Linear"])
def test_other_layers_are_quantized_only_when_named(seg, kind):
    net, path = seg, PROTO
    if kind == "Linear":
        from ultralytics.nn.tasks import ClassificationModel

        net, path = ClassificationModel("yolov8n-cls.yaml", nc=3, verbose=False), LINEAR
    plan, reasons = make_plan(net, X86, config_list=[{"op_types": ["default"], "quant_bits": 6}])
    assert path not in plan and path in reasons
    plan, reasons = make_plan(net, X86, config_list=[{"op_names": [path], "quant_bits": 6}])
    assert bits(plan)[path] == 6 and path not in reasons


def test_dfl_stays_float_in_patterns_and_is_refused_by_name(net):
    plan, reasons = make_plan(net, X86, config_list=[{"op_names_re": "."}])
    assert DFL in reasons and HEAD in plan
    for name in (DFL, "model.22.dfl"):
        with pytest.raises(UsageError, match=r"cannot be quantized \(DFL"):
            make_plan(net, X86, config_list=[{"op_names": [name]}])


def test_a_layer_that_asks_for_other_codes_keeps_its_own_input(net):
    full, inner = PROFILES["ort-x86-full"], "model.2.m.0.cv2.conv"
    assert "input" not in make_plan(net, full)[0][inner]
    everything = {"default": "all"}
    plan, _ = make_plan(net, full, config_list=[everything, {"op_names": [inner], "quant_bits": {"input": 4}}])
    assert plan[inner]["input"] == Spec(4)
    plan, _ = make_plan(net, full, config_list=[everything, {"op_names": [inner], "observer": "minmax"}])
    assert "input" not in plan[inner]


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ("Conv2d", "Entry 1 of quant.config_list is 'Conv2d'. Give a dict"),
        ({"op_type": ["Conv2d"]}, r"unknown key 'op_type'.*Did you mean 'op_types'\? Legal: op_types, "),
        ({"quant_bits": 8}, "picks no layers. Give op_types, op_names or op_names_re"),
        ({"op_types": ["Conv3d"]}, "op type 'Conv3d' is unknown. Legal: Conv2d, ConvTranspose2d, Linear, default"),
        ({"op_types": ["Linear"]}, "picks no layer of this model"),
        ({"op_names": ["model.99.conv"]}, "op_names=model.99.conv' matches no layer"),
        ({"op_names": ["Upsample"]}, "op_names=Upsample' matches none of the 64 layers, such as"),
        ({"op_names": []}, "picks no layer of this model"),
        ({"op_types": []}, "picks no layer of this model"),
        ({"default": "none"}, "default 'none' is unknown. Legal: all"),
        ({"op_names": ["model.1.conb"]}, "Did you mean 'model.1.conv'"),
        ({"op_types": ["Conv2d"], "exclude_op_names": ["model.1.conb"]}, "exclude_op_names=model.1.conb' matches no"),
        ({"op_names_re": "("}, r"op_names=re:\(' is no layer and is not a regular expression"),
        ({"op_names_re": "modle"}, "op_names=re:modle' matches no layer"),
        ({"op_types": ["Conv2d"], "exclude_op_names_re": "modle"}, "exclude_op_names=re:modle' matches no layer"),
        ({"op_types": ["Conv2d"], "exclude_op_types": ["Conv3d"]}, "op type 'Conv3d' is unknown"),
        ({"op_types": ["Conv2d"], "exclude_op_names_re": "."}, "picks no layer of this model"),
        ({"op_names": [A], "quant_types": ["weigth"]}, "quant type 'weigth' is unknown. Legal: input, weight, output"),
        ({"op_names": [A], "quant_types": ["add"]}, "quant type 'add' is unknown"),
        ({"op_names": [A], "quant_bits": {"weigth": 4}}, "quant_bits of the unknown quant type 'weigth'"),
        ({"op_names": [A], "quant_bits": 1}, "Entry 1 of .*: quant_bits=1 is illegal. Legal: a whole number, 2 to 16"),
        ({"op_names": [A], "quant_bits": 32}, "quant_bits=32 is illegal"),
        ({"op_names": [A], "quant_dtype": "float8"}, "quant_dtype 'float8' is unknown. Legal: int8, uint8"),
        ({"op_names": [A], "quant_dtype": "int32"}, "quant_bits=32 is illegal"),
        ({"op_names": [A], "quant_scheme": "afine"}, "Did you mean 'affine'.*Legal: symmetric, asymmetric, affine"),
        ({"op_names": [A], "quant_scheme": {"weight": "affine"}}, "weights are always symmetric"),
        ({"op_names": [A], "granularity": "per_row"}, "'per_row' is unknown.*Legal: per_channel, per_tensor"),
        ({"op_names": [A], "granularity": {"input": "per_channel"}}, "only weights can be per_channel"),
        ({"op_names": [A], "quant_types": ["activation"]}, "'ort-x86' runs activations in float. Give quant.profile="),
    ],
    ids=[
        "no dict", "key", "nothing picked", "op type", "type without layers", "name", "name of no layer", "no names",
        "no types", "default", "near name", "excluded name", "regex", "regex without layers", "excluded regex",
        "excluded type", "all excluded", "quant type", "internal site",
        "type of bits", "1 bit", "32 bits", "dtype", "wide dtype", "scheme", "affine weight", "granularity",
        "per-channel input", "activation in float",
    ],
)  # fmt: skip
def test_wrong_entries(net, entry, message):
    with pytest.raises(UsageError, match=message):
        make_plan(net, X86, config_list=[entry])


def test_a_bare_layer_has_no_activation(net):
    with pytest.raises(UsageError, match=f"'{HEAD}' has no activation behind it"):
        make_plan(net, PROFILES["ort-x86-full"], config_list=[{"op_names": [HEAD], "quant_types": ["activation"]}])


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("(", r"quant.exclude=\(' is no layer and is not a regular expression"),
        ("modle", "'quant.exclude=modle' matches no layer"),
        ("nn.SiLU", "matches no layer"),
        ("Concat", "'quant.exclude=Concat' matches none of the 64 layers, such as"),
    ],
)
def test_wrong_exclude(net, pattern, message):
    with pytest.raises(UsageError, match=message):
        make_plan(net, X86, exclude=(pattern,))


def test_branches_are_refused_by_name_before_they_are_merged(build):
    net = build("yolov9t.yaml")
    path = next(p for p, r in make_plan(net, X86)[1].items() if "merged on fuse" in r)
    with pytest.raises(UsageError, match=r"cannot be quantized \(branch that is merged on fuse"):
        make_plan(net, X86, config_list=[{"op_names": [path]}])


def test_resolved_rows(net):
    entries = [{"default": "all"}, {"op_names": [A], "granularity": "per_tensor"}]
    plan, reasons = make_plan(net, PROFILES["tensorrt"], config_list=entries)
    header, _, *lines, _ = [[c.strip() for c in line.split("|")] for line in table(plan, reasons).splitlines()]
    assert header == ["Layer", "input", "weight", "residual", "Float because"] and len(lines) == len(plan) + len(
        reasons
    )
    found = {row[0]: row[1:] for row in lines}
    assert found["model.0.conv"] == ["8s", "8sc", "-", ""]
    assert found[A] == ["8s", "8s", "-", ""]
    assert found["model.2.m.0"] == ["-", "-", "8s", ""]
    assert found[DFL] == ["-"] * 3 + [reasons[DFL]]
