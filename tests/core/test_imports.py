# Copyright (C) yolo_ext authors. AGPL-3.0 licence.
from __future__ import annotations

import ast
import importlib
import pydoc
import re
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path
from statistics import median

import pytest

import yolo_ext

PACKAGE = Path(yolo_ext.__file__).parent
# Imports run down only, from a floor to those before it; rooms of one floor do not know each other, but for `SEES`.
FLOORS = [
    {"core"},
    {"stock", "checkpoint", "runs"},
    {"data", "reporting"},
    {"pruning", "distillation", "quantization", "deployment", "sparsity"},
    {"training", "pipeline"},
    {"commands", "cli", "__main__"},
]
SEES = {
    ("checkpoint", "stock"),
    ("runs", "stock"),
    ("runs", "checkpoint"),
    ("sparsity", "pruning"),
    ("pipeline", "training"),
    ("cli", "commands"),
    ("__main__", "cli"),
}
FLOOR = {room: i for i, rooms in enumerate(FLOORS) for room in rooms}
HEAVY = ("onnx", "onnxruntime", "onnxsim", "matplotlib", "openvino", "ray")
SLOW = (*HEAVY, "torch", "torch_pruning", "ultralytics")


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
ROOMS = {s.split("/")[0] for s in SOURCES} - {"__init__"}


def file_of(name: str) -> str | None:
    """Return the file in which a dotted name of the package lies."""
    path = name.replace(".", "/").removeprefix("yolo_ext/")
    return next((s for p in (path, path.rpartition("/")[0]) for s in (p, f"{p}/__init__") if s in SOURCES), None)


def used(source: str) -> set[str]:
    """Return the files of the package that a file imports."""
    return {s for n in imports(SOURCES[source]) if n.startswith("yolo_ext.") and (s := file_of(n)) and s != source}


def test_every_room_has_its_place():
    assert set(FLOOR) == ROOMS


def test_imports_run_down():
    room = {s: s.split("/")[0] for s in SOURCES if s != "__init__"}
    arrows = {(s, u) for s in room for u in used(s) if room[u] != room[s]}
    assert not {(s, u) for s, u in arrows if FLOOR[room[u]] >= FLOOR[room[s]] and (room[s], room[u]) not in SEES}


def test_no_circle_between_files():
    list(TopologicalSorter({s: used(s) for s in SOURCES if s != "__init__"}).static_order())  # raises CycleError


def test_internals_of_ultralytics_are_touched_in_stock_only():
    touch = re.compile(r"ultralytics\.(nn|engine|models|data|cfg)(\.|$)")
    flags = re.compile(r"\.(export|end2end|xyxy) = ")  # of heads
    outside = {s: p for s, p in SOURCES.items() if not s.startswith("stock/")}
    assert not {s: found for s, p in outside.items() if (found := [n for n in imports(p) if touch.match(n)])}
    assert not [s for s, p in outside.items() if flags.search(p.read_text())]


def test_reporting_reads_plain_data():
    plain = [s for s in SOURCES if s.startswith("reporting/")]
    assert not {s for s in plain if {n.split(".")[0] for n in imports(SOURCES[s])} & {"torch", "onnx", "onnxruntime"}}


@pytest.mark.slow
def test_torch_pruning_is_touched_in_three_files_only():
    users = {s for s, p in SOURCES.items() if "torch_pruning" in {n.split(".")[0] for n in imports(p)}}
    assert users <= {"pruning/depgraph", "pruning/pruner", "pruning/criteria"}


@pytest.mark.parametrize(
    ("statement", "absent"),
    [
        pytest.param("import yolo_ext", (*SLOW, "cv2"), id="package"),
        pytest.param("from yolo_ext import PruneConfig, UsageError", SLOW, id="options"),
        pytest.param("from yolo_ext import bench, compress, convert", SLOW, id="commands"),
        pytest.param("from yolo_ext import DetectionTrainer, attach", HEAVY, id="trainer"),
        pytest.param("import yolo_ext.pruning.surgery, yolo_ext.reporting.pages", HEAVY, id="pruning and pages"),
        pytest.param("import yolo_ext.cli", SLOW, id="cli"),
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
    assert set(yolo_ext.__all__) <= set(dir(yolo_ext))
    assert not set(yolo_ext.__all__) & ROOMS, "a package of this name would take the place of the function"
    assert "compress(model:" in (told := pydoc.plain(pydoc.render_doc(yolo_ext))) and "class PruneConfig" in told


def test_house_rules_of_a_file():
    texts = {s: p.read_text() for s, p in SOURCES.items()}
    head = "# Copyright (C) yolo_ext authors. AGPL-3.0 licence.\n"
    assert not [s for s, text in texts.items() if not (text.startswith(head) and ast.get_docstring(ast.parse(text)))]


@pytest.mark.slow
def test_the_house_stays_small():
    """A change that breaks a limit takes something else out, or argues for a higher one."""
    texts = [path.read_text() for path in SOURCES.values()]
    sizes = []
    for node in (n for t in texts for n in ast.walk(ast.parse(t)) if isinstance(n, ast.FunctionDef)):
        doc = node.body[0].end_lineno - node.body[0].lineno + 1 if ast.get_docstring(node) else 0
        sizes.append(node.end_lineno - node.lineno + 1 - doc)
    assert sum(t.count("\n") for t in texts) <= 19_500 and len(texts) <= 106
    assert median(sizes) <= 8 and sorted(sizes)[int(0.99 * len(sizes))] <= 40


def test_no_two_test_files_have_one_name():
    names = [path.name for path in Path(__file__).parents[1].rglob("test_*.py")]
    assert len(names) == len(set(names)), "pytest imports test files by their bare name"
