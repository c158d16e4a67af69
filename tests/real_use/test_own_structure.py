# Copyright (C) yolo_ext authors. AGPL-3.0 licence.
"""The page on blocks of one's own: its example runs, and its table says what becomes of the channels."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from ultralytics.nn import tasks

from yolo_ext import cli
from yolo_ext.pruning import build_graph
from yolo_ext.stock.load import load_model

PAGE = Path(__file__).parents[2] / "docs" / "own_structure.md"
ROWS = re.findall(r"^\| `(.+?)` \| (go|stay)(?:[^`|]*`(.+?)`)?.* \|$", PAGE.read_text(encoding="utf-8"), re.MULTILINE)


def block(language: str) -> str:
    return re.search(rf"```{language}\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)[1]


@pytest.mark.slow
def test_the_example_runs(quick, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    for module in [m for m in sys.modules if m.startswith("mypkg")]:
        monkeypatch.delitem(sys.modules, module)
    Path("mypkg").mkdir()
    Path("mypkg/__init__.py").write_text("")
    Path("mypkg/layers.py").write_text(block("python"))
    Path("custom.yaml").write_text(block("yaml"))
    monkeypatch.setattr(tasks, "Fork", None, raising=False)
    monkeypatch.delattr(tasks, "Fork")
    for i, words in enumerate(block("bash").splitlines()):
        assert cli.main([*words.split()[1:], f"project={tmp_path / 'runs'}", f"name={i}"]) == 0
    prunable = {r["name"]: r["prunable"] for r in json.loads((tmp_path / "runs/0/groups.json").read_text())}
    assert prunable["model.2.a.conv"] and prunable["model.2.b.conv"]
    assert type(load_model(tmp_path / "runs/1/weights/best.pt")[0].model[2]).__name__ == "Fork"


@pytest.mark.parametrize(("code", "outcome", "reason"), ROWS, ids=[r[0] for r in ROWS])
def test_the_table_is_true(code, outcome, reason):
    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Conv2d(16, 16, 3, padding=1), nn.Conv2d(16, 16, 3, padding=1)
            self.grouped = nn.Conv2d(16, 16, 3, padding=1, groups=4)
            self.scale = nn.Parameter(torch.ones(1, 16, 1, 1))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return eval(code, {"self": self, "x": x, "torch": torch})

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            made = Own()(torch.rand(1, 16, 64, 64))  # at the size that couplings are found at
            last = nn.Linear(made.shape[1], 8) if made.ndim == 2 else nn.Conv2d(made.shape[1], 8, 1)
            self.model = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), Own(), last)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.model(x)

    net = Net()
    reasons = build_graph(net).reasons()
    found = [reasons.get(f"model.1.{name}", "") for name in "ab" if f"self.{name}(" in code]
    assert any(reason in r for r in found) if outcome == "stay" else not any(found), reasons


def test_the_table_is_read_as_a_whole():
    assert len(ROWS) == 12 and {outcome for _, outcome, _ in ROWS} == {"go", "stay"}
