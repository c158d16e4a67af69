# Copyright (C) yolo_ext authors. AGPL-3.0 licence.
"""What the site shows beyond its pages: tables made from the code, the results, and links to files of the repository.

A page holds a line such as `<!-- made from the code: options -->`, behind which the hook writes.
"""

from __future__ import annotations

import html
import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
MARK = re.compile(r"^<!-- made from the code: (\w+) -->$", re.MULTILINE)
PAGES = {"benchmarks/RESULTS.md": "results.md"}  # files of the repository that the site has as a page
LINK = re.compile(r"(?<=\]\()(?:\.\./)+([^)#\s]+)")


def on_page_markdown(markdown: str, config: Any, **_: Any) -> str:
    """Write what a page only names, and turn links that leave the folder of pages into such that work on the site."""
    text = MARK.sub(lambda found: MADE[found[1]](), markdown)
    return LINK.sub(lambda found: site_link(found[1], str(config["repo_url"])), text)


def site_link(file: str, repository: str) -> str:
    """Return the link to a file of the repository: its page, or its place on GitHub; refuse one that is not there."""
    if not (ROOT / file).exists():
        raise FileNotFoundError(f"A page links '{file}', which is not there")
    return PAGES.get(file) or (
        file.removeprefix("docs/") if file.startswith("docs/") else f"{repository}/blob/main/{file}"
    )


def options() -> str:
    """Return options and methods of each technique, as `yolo-ext help TECHNIQUE` has them."""
    from yolo_ext.commands import help as told
    from yolo_ext.core.config import CONFIGS

    parts = []
    for technique in CONFIGS:
        about, headed, methods = told._technique(technique, False)
        parts.append(f"## {technique}\n\n{about}")
        parts += [f"### {technique}: {title}\n\n{table('option', rows)}" for title, rows in headed.items()]
        parts += [f"### {technique}: each {kind}\n\n{table('name', rows)}" for kind, rows in methods.items()]
    return "\n\n".join(parts)


def commands() -> str:
    """Return keys and examples of each command, as `yolo-ext COMMAND --help` has them, and the recipes."""
    from yolo_ext import cli  # which imports them all
    from yolo_ext.commands import help as told

    parts = []
    for name in cli.NAMES:
        found = told._command(name)
        parts.append(f"## {name}\n\n{found['summary']}.")
        parts += [f"{title}:\n\n{table('key', rows)}" for title, rows in found["keys"].items() if rows]
        if found["stock"]:
            parts.append(f"Its keys are those of [`yolo {name}`](https://docs.ultralytics.com/modes/{name}/).")
        parts.append("```bash\n" + "\n".join(f"yolo-ext {words}".strip() for words in found["examples"]) + "\n```")
    rows = [(name, f"{about}: `{words}`") for name, about, words in told.bundled()]
    return "\n\n".join([*parts, "## The bundled recipes", table("recipe", rows)])


def results() -> str:
    """Return the text of RESULTS.md without its title, which the page has."""
    return (ROOT / "benchmarks/RESULTS.md").read_text(encoding="utf-8").partition("\n")[2]


def table(title: str, rows: Any) -> str:
    """Return a table of names and what they do; a narrow screen breaks a name behind its dots."""
    names = (re.sub(r"\.(?=[a-z])|=", r"\g<0><wbr>", html.escape(name)) for name, _ in rows)
    lines = [f"| <code>{name}</code> | {cell(text)} |" for name, (_, text) in zip(names, rows)]
    return "\n".join([f"| {title} | what it does |", "|---|---|", *lines])


def cell(text: str) -> str:
    """Return a text as it may stand in a table, where `a|b` and `*` would mean something else."""
    return re.sub(r"([|*_<])", r"\\\1", text) if "`" not in text else text.replace("|", "\\|")


MADE = {"options": options, "commands": commands, "results": results}
