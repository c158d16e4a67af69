# Copyright (C) yolo_ext authors. AGPL-3.0 licence.
from __future__ import annotations

import ast
import importlib
import re
import subprocess
import sys
from pathlib import Path

import pytest

import yolo_ext

PACKAGE = Path(yolo_ext.__file__).parent
# Imports run from right to left only; areas of one rank do not know each other.
ORDER = [
    {"core"},
    {"stock"},
    {"checkpoint"},
    {"runs"},
    {"data", "reporting"},
    {"pruning", "distillation", "quantization", "deployment"},
    {"sparsity"},
    {"training"},
    {"pipeline"},
    {"commands"},
    {"cli"},
    {"__main__"},
]
RANK = {area: rank for rank, areas in enumerate(ORDER) for area in areas}
HEAVY = ("onnx", "onnxruntime", "onnxsim", "matplotlib", "torch_pruning", "openvino", "ray")


def imports(path: Path) -> set[str]:
    """Return the dotted names that a file imports anywhere, also inside functions."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {a.name for a in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"relative import in {path}"
            found |= {f"{node.module}.{a.name}" for a in node.names}
    return found


SOURCES = {p.relative_to(PACKAGE).with_suffix("").as_posix(): p for p in PACKAGE.rglob("*.py")}
AREAS = {
    p.stem if p.is_file() else p.name for p in PACKAGE.iterdir() if p.suffix == ".py" or (p / "__init__.py").exists()
}


def test_every_area_has_its_place():
    assert AREAS - {"__init__"} == set(RANK)


@pytest.mark.parametrize("source", [s for s in SOURCES if s.split("/")[0] in RANK])
def test_imports_run_one_way(source):
    area = source.split("/")[0]
    used = {n.split(".")[1] for n in imports(SOURCES[source]) if n.startswith("yolo_ext.")} & set(RANK)
    wrong = {u for u in used if u != area and RANK[u] >= RANK[area]}
    assert not wrong, f"{source} imports {sorted(wrong)}"


def test_internals_of_ultralytics_are_touched_in_stock_only():
    touch = re.compile(r"ultralytics\.(nn|engine|models|data|cfg)(\.|$)")
    flags = re.compile(r"\.(export|end2end|xyxy) = ")  # of heads
    outside = {s: p for s, p in SOURCES.items() if not s.startswith("stock/")}
    assert not {s: found for s, p in outside.items() if (found := [n for n in imports(p) if touch.match(n)])}
    assert not [s for s, p in outside.items() if flags.search(p.read_text())]


@pytest.mark.parametrize("source", [s for s in SOURCES if s.startswith("reporting/")])
def test_reporting_reads_plain_data(source):
    assert not {n for n in imports(SOURCES[source]) if n.split(".")[0] in {"torch", "onnx", "onnxruntime"}}


@pytest.mark.parametrize("source", SOURCES)
def test_nothing_leans_on_torch_pruning(source):
    assert not {n for n in imports(SOURCES[source]) if n.split(".")[0] == "torch_pruning"}


@pytest.mark.parametrize(
    ("statement", "absent"),
    [
        pytest.param("import yolo_ext", (*HEAVY, "torch", "ultralytics", "cv2"), id="package"),
        pytest.param("from yolo_ext import PruneConfig, UsageError", (*HEAVY, "torch", "ultralytics"), id="options"),
        pytest.param("from yolo_ext import DetectionTrainer, attach", HEAVY, id="trainer"),
        pytest.param("import yolo_ext.pruning.surgery, yolo_ext.checkpoint", HEAVY, id="pruning"),
        pytest.param("import yolo_ext.cli", (*HEAVY, "torch", "ultralytics"), id="cli"),
    ],
)
def test_importing_is_light(statement, absent):
    code = f"import sys; {statement}; print([m for m in {absent!r} if m in sys.modules])"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=PACKAGE.parent, timeout=120)
    assert ran.returncode == 0, ran.stderr[-1000:]
    assert ran.stdout.strip().splitlines()[-1] == "[]"


def test_public_names_are_what_type_checkers_see():
    """The imports under `TYPE_CHECKING` say which names there are and where from; at run time they are lazy."""
    tree = ast.parse((PACKAGE / "__init__.py").read_text())
    named = {a.name: n.module for n in ast.walk(tree) if isinstance(n, ast.ImportFrom) for a in n.names}
    typed = {name: module for name, module in named.items() if module.startswith("yolo_ext.")}
    assert sorted([*typed, "__version__"]) == yolo_ext.__all__
    assert (PACKAGE / "py.typed").is_file()
    for name, module in typed.items():
        assert getattr(yolo_ext, name) is getattr(importlib.import_module(module), name)
    with pytest.raises(AttributeError, match="no attribute 'Nothing'"):
        _ = yolo_ext.Nothing


@pytest.mark.parametrize("source", SOURCES)
def test_house_rules_of_a_file(source):
    text = SOURCES[source].read_text()
    assert text.startswith("# Copyright (C) yolo_ext authors. AGPL-3.0 licence.\n")
    assert ast.get_docstring(ast.parse(text))
