# Copyright (C) yolo_ext authors. AGPL-3.0 licence.
"""Files beside the code that repeat what pyproject.toml says are true: recipe, citation, workflows."""

from __future__ import annotations

import re

import yaml

import yolo_ext
from yolo_ext.core.config import cfg_dir

ROOT = cfg_dir().parent
PROJECT = (ROOT / "pyproject.toml").read_text(encoding="utf-8")


def test_the_conda_recipe_needs_what_the_project_needs():
    listed = re.search(r"^dependencies = \[\n(.*?)^\]", PROJECT, re.DOTALL | re.MULTILINE)[1]
    wanted = {re.sub(r"^torch(?=>)", "pytorch", need) for need in re.findall(r'"(.+?)"', listed)}
    python = re.search(r'requires-python = "(.+)"', PROJECT)[1]
    recipe = (ROOT / "recipe/meta.yaml").read_text(encoding="utf-8")
    run = recipe.partition("  run:")[2].partition("\n\n")[0]
    assert {need.replace(" ", "") for need in re.findall(r"- (.+)", run)} == {*wanted, f"python{python}"}


def test_the_citation_is_of_this_version():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert citation["version"] == yolo_ext.__version__ and citation["license"] in PROJECT
    assert f'version = "{yolo_ext.__version__}"' in PROJECT


def test_workflows_call_sessions_that_there_are():
    there = re.findall(r"^def (\w+)\(session", (ROOT / "noxfile.py").read_text(encoding="utf-8"), re.MULTILINE)
    texts = [file.read_text(encoding="utf-8") for file in (ROOT / ".github/workflows").glob("*.yml")]
    assert len(texts) == 3 and all(yaml.safe_load(text)["jobs"] for text in texts)
    called = re.findall(r"session: ([\w.-]+)|nox -s (\w[\w.-]*)", "".join(texts))
    assert len(called) > 8 and {"".join(names).partition("-")[0] for names in called} <= {*there}
