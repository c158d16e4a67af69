# Copyright (C) yolo_ext authors. AGPL-3.0 licence.
"""What no command foresees: an error of ours, too little memory, Ctrl-C while importing, types and words of values."""

from __future__ import annotations

import inspect
import subprocess
import sys
import typing
from pathlib import Path

import pytest
import ultralytics

import yolo_ext
from yolo_ext import cli
from yolo_ext.commands import CENTRAL, COMMANDS, NATIVE, PLACE, keys, read_values
from yolo_ext.core.config import PruneConfig, given_options, parse
from yolo_ext.core.errors import UsageError
from yolo_ext.core.log import FILE

TYPED = [(row.name, key) for row in COMMANDS for key in keys(row.fn)]
BUGS = {
    "bug": (KeyError("x"), 3, "internal error (KeyError: 'x'), log at "),
    "without words": (AssertionError(), 3, "internal error (AssertionError: AssertionError), log at "),
    "several lines": (RuntimeError("first\nsecond"), 3, "internal error (RuntimeError: first), log at "),
    "memory": (MemoryError("Unable to allocate 2 GiB"), 2, "out of memory (Unable to allocate 2 GiB). Lower"),
    "torch": (RuntimeError("DefaultCPUAllocator: not enough memory: you tried"), 2, "out of memory (DefaultCPU"),
    "GPU": (RuntimeError("CUDA out of memory. Tried to allocate 2 GiB"), 2, "out of memory (CUDA out of memory."),
    "folder": (OSError(), 2, "yolo-ext: OSError"),
}


@pytest.mark.parametrize(("name", "key"), TYPED, ids=[f"{name}-{key}" for name, key in TYPED])
def test_every_key_has_a_type_that_is_checked(name, key):
    kinds = NATIVE | CENTRAL | typing.get_type_hints(inspect.unwrap(COMMANDS[name].fn), include_extras=True)
    with pytest.raises(UsageError, match=f"'?{key}="):
        read_values({key: object()}, kinds)


@pytest.mark.parametrize(("error", "status", "said"), BUGS.values(), ids=BUGS)
def test_an_error_that_nobody_foresaw_is_one_line_and_a_log(monkeypatch, capsys, tmp_path, error, status, said):
    def broken(**_):
        raise error

    monkeypatch.setattr("yolo_ext.pipeline.compress", broken)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    assert cli.main(["prune", "model=a.pt"]) == status
    told = capsys.readouterr().err
    assert told.count("\n") == 1 and said in told and "Traceback" not in told
    logs = [*tmp_path.glob("*.log")]
    assert len(logs) == (status == 3)
    for log in logs:
        assert str(log) in told and f"in broken\n    raise error\n{type(error).__name__}" in log.read_text()


def test_the_log_of_a_run_holds_the_traceback(tiny, monkeypatch, capsys, tmp_path):
    def broken(*_, **__):
        raise LookupError("oops")

    monkeypatch.setattr("yolo_ext.runs.write_json", broken)
    run = tmp_path / "run"
    assert cli.main(["analyze", f"model={tiny}", "imgsz=32", f"save_dir={run}"]) == 3
    assert f"internal error (LookupError: oops), log at {run / FILE}" in capsys.readouterr().err
    assert "raise LookupError" in (run / FILE).read_text(encoding="utf-8")


@pytest.mark.parametrize("module", ["yolo_ext.cli", "yolo_ext.commands.help", "ultralytics.utils"])
def test_ctrl_c_while_importing(module):
    code = f"""import builtins, runpy, sys
real = builtins.__import__
def stopped(name, *rest, **more):
    if name == {module!r}:
        raise KeyboardInterrupt
    return real(name, *rest, **more)
sys.modules.pop({module!r}, None)
sys.argv = ["yolo-ext", "convert"]
builtins.__import__ = stopped
runpy.run_module("yolo_ext", run_name="__main__")"""
    root = Path(yolo_ext.__file__).parents[1]
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=root, timeout=120)
    assert (done.returncode, "Traceback" in done.stderr) == (130, False), done.stderr


# Values --------------------------------------------------------------------------------------------------------------
SWITCHED = {
    "half=no": False, "half=OFF": False, "half=Yes": True, "half=on": True, "quant=off": False, "exist_ok=no": False,
    "cache=off": False, "quant.strict=on": True, "distill.half=no": False, "prune=off": False, "name=no": "no",
    "model=on": "on",
}  # fmt: skip


@pytest.mark.parametrize(("word", "value"), SWITCHED.items(), ids=SWITCHED)
def test_words_of_switches(word, value, monkeypatch):
    command = "export" if word.startswith("half") else "compress"
    key = word.partition("=")[0]
    technique, _, name = key.partition(".")

    def read(words: list[str]) -> object:
        found = cli.parse_args(words)[1][technique]
        return found[name] if name else found

    assert read([command, word]) == value
    if not name and key != "prune":
        monkeypatch.setenv(cli._variable(key), word.partition("=")[2])
        assert key == "quant" or read([command]) == value


@pytest.mark.parametrize("command", cli.STOCK)
def test_words_of_switches_are_handed_on(monkeypatch, command):
    seen = []
    monkeypatch.setattr("yolo_ext.stock.context.yolo_entrypoint", lambda argv: seen.extend(argv))
    assert cli.main([command, "model=m.pt", "half=no", "save=Off", "name=no"]) == 0
    assert seen == [command, "model=m.pt", "half=False", "save=False", "name=no"]


def test_python_takes_no_words_for_switches():
    for given in ({"half": "no"}, {"quant": "off"}, {"exist_ok": "no"}):
        with pytest.raises(UsageError, match="is illegal"):
            yolo_ext.export("a.pt", **given)


NUMBERS = {
    "prune": {"speedup": float("nan")}, "distill": {"features": [{"name": "cwd", "weight": float("inf")}]},
    "quant": {"config_list": [{"op_types": ["Conv2d"], "x": float("nan")}]}, "sparsity": {"start": 10**40},
}  # fmt: skip


@pytest.mark.parametrize("technique", NUMBERS)
def test_options_are_finite(technique):
    with pytest.raises(UsageError, match="is illegal"):
        parse({technique: NUMBERS[technique]})


@pytest.mark.parametrize("given", [{"lr0": float("nan")}, {"seed": 10**40}, {"confidence": float("nan")}], ids=str)
def test_values_are_finite(given):
    with pytest.raises(UsageError, match="is illegal"):
        yolo_ext.train("a.pt", "b.yaml", **given)


@pytest.mark.parametrize("name", ["recipe", "cfg", "contract"])
def test_files_hold_finite_numbers(tmp_path, capsys, name):
    file = tmp_path / "x.yaml"
    file.write_text("lr0: .nan\n")
    assert cli.main(["train", "model=a.pt", "data=b.yaml", f"{name}={file}", "contract.map=-0.1"]) == 2
    assert "Give finite numbers" in capsys.readouterr().err


def test_a_folder_may_be_called_by_a_number():
    assert read_values({"save_dir": 2026, "name": 1.5}, CENTRAL) == {"save_dir": "2026", "name": "1.5"}


@pytest.mark.parametrize(
    ("given", "options"),
    [(None, {}), (True, {}), (False, {}), ({"ratio": 0.3}, {"ratio": 0.3}), (PruneConfig(ratio=0.3), {"ratio": 0.3})],
    ids=["not", "on", "off", "dict", "dataclass"],
)
def test_ways_to_give_the_options_of_a_technique(given, options):
    assert given_options(given) == options


# Doors ---------------------------------------------------------------------------------------------------------------
DOORS = [c for c in (*COMMANDS.names(), *cli.FORWARDED) if c not in cli.PLAIN]


@pytest.mark.parametrize("command", DOORS)
def test_no_command_works_with_another_ultralytics(monkeypatch, capsys, tmp_path, command):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(ultralytics, "__version__", "9.0.0")
    assert cli.main([command, *(["model=a.pt", "data=b.yaml"] if command in cli.FORWARDED else [])]) == 2
    assert "Ultralytics 9.0.0 is not supported" in capsys.readouterr().err and not [*tmp_path.iterdir()]


@pytest.mark.parametrize("words", ["bench models={0},{0}", "compare model={0} other={0}"])
@pytest.mark.parametrize("limit", ["contract.recall.unicorn=-0.1", "contract=gone.yaml"])
def test_a_contract_is_read_before_anything_is_measured(tiny, shapes, monkeypatch, capsys, tmp_path, words, limit):
    monkeypatch.chdir(tmp_path)
    measured = []
    monkeypatch.setattr("yolo_ext.stock.accuracy.accuracy", lambda *_, **__: measured.append(1))
    assert cli.main([*words.format(tiny).split(), f"data={shapes}", "imgsz=64", limit]) == 2
    assert ("unicorn" in limit) == ("there is no 'recall.unicorn'" in capsys.readouterr().err) and not measured


def test_keys_come_in_the_same_order_in_each_process():
    more = [k for k in CENTRAL if k not in PLACE]
    for row in COMMANDS:
        found = [k for k in keys(row.fn) if k in more]
        assert found in ([], more)
