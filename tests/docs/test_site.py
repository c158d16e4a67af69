# Copyright (C) yolo_ext authors. AGPL-3.0 licence.
"""The site: tables made from the code hold everything, and no link of the built pages leads nowhere."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote

import pytest

from yolo_ext import cli
from yolo_ext.commands.help import bundled
from yolo_ext.core.config import CONFIGS, cfg_dir, option_names

ROOT = cfg_dir().parent


@pytest.fixture(scope="module")
def hooks():
    spec = importlib.util.spec_from_file_location("hooks", ROOT / "docs/hooks.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_option_is_in_the_table_made_from_the_code(hooks):
    rows = re.findall(r"^\| <code>([\w.-]+)[=<]", hooks.options().replace("<wbr>", ""), re.MULTILINE)
    assert {*option_names()} - {*CONFIGS} <= {*rows}
    assert {"taylor", "slim", "cwd", "ld", "mse", "ort-arm", "cubic"} <= {*rows}


def test_every_command_and_recipe_is_on_its_page(hooks):
    page = hooks.commands()
    assert re.findall(r"^## (\w+)$", page, re.MULTILINE) == [*cli.NAMES]
    assert all(f"<code>{name}</code>" in page for name, *_ in bundled())


def test_links_to_files_of_the_repository_work_on_the_site(hooks):
    text = "[a](../benchmarks/RESULTS.md#demo) [b](../cfg/default.yaml) [c](tables.md) ![d](../docs/images/report.png)"
    wanted = "[a](results.md#demo) [b](R/blob/main/cfg/default.yaml) [c](tables.md) ![d](images/report.png)"
    assert hooks.on_page_markdown(text, {"repo_url": "R"}) == wanted
    with pytest.raises(FileNotFoundError, match=r"nothing\.md"):
        hooks.on_page_markdown("[a](../nothing.md)", {"repo_url": "R"})


class Page(HTMLParser):
    """Anchors of a page, and what it links."""

    def __init__(self, file: Path) -> None:
        super().__init__()
        self.anchors, self.links = {""}, []
        self.feed(file.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        self.anchors |= {given.get("id") or "", given.get("name") or ""}
        self.links += [given[key] for key in ("href", "src") if given.get(key)]


@pytest.mark.slow
def test_no_link_of_the_site_leads_nowhere(tmp_path):
    pytest.importorskip("mkdocs")
    words = [sys.executable, "-m", "mkdocs", "build", "--strict", "-q", "-d", str(tmp_path)]
    built = subprocess.run(words, cwd=ROOT, capture_output=True, text=True)
    assert built.returncode == 0, built.stderr[-2000:]
    pages = {file: Page(file) for file in tmp_path.rglob("*.html") if file.name != "404.html"}
    broken = []
    for file, page in pages.items():
        for link in (link for link in page.links if not re.match(r"\w+:|//", link)):
            path, _, anchor = unquote(link).partition("#")
            target = (file.parent / path).resolve() if path else file
            target = target / "index.html" if target.is_dir() else target
            known = pages[target].anchors if target in pages else {anchor}
            if not target.is_file() or anchor not in known:
                broken.append(f"{file.name}: {link}")
    assert len(pages) > 20 and not broken
    assert {*cli.NAMES} <= pages[tmp_path / "commands.html"].anchors  # found by a process that imports nothing else
