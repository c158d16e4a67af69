# Copyright (C) yolo_ext authors. AGPL-3.0 licence.
"""Help: every way to ask for it, every key in it, every width, and examples that the command line takes."""

from __future__ import annotations

import re
from dataclasses import fields

import pytest

import yolo_ext
from yolo_ext import cli
from yolo_ext.commands import COMMANDS, check_keys, keys, needed
from yolo_ext.commands.help import FORWARDED, FURTHER, OPTIONS, STOCK, TOPICS, WIDTH, bundled, help_text
from yolo_ext.core.config import CONFIGS, cfg_dir, load_recipe, option_names, parse
from yolo_ext.core.registry import Table

NAMES = [*COMMANDS.names(), *FORWARDED]
PAGES = [*dict.fromkeys([None, *NAMES, *TOPICS])]


@pytest.fixture(autouse=True)
def terminal(monkeypatch) -> None:
    monkeypatch.setenv("COLUMNS", "100")


def said(capsys, *words: str) -> str:
    assert cli.main([*words]) == 0
    return capsys.readouterr().out


# Ways to ask -------------------------------------------------------------------------------------------------------
FORMS = ["help {}", "{} help", "{} --help", "{} -h", "--help {}", "-h {}", "help topic={}", "{} --model x.pt --help"]


@pytest.mark.parametrize("name", [name for name in NAMES if name != "help"])
def test_every_way_to_ask_gives_the_same_help(capsys, name):
    forms = [form.format(name).split() for form in FORMS]
    assert {said(capsys, *words) for words in forms} == {f"{help_text(name)}\n"}


@pytest.mark.parametrize("words", [[], ["help"], ["-h"], ["--help"], ["help", "help"], ["help", "-h"]], ids=str)
def test_the_first_page_names_every_command(capsys, words):
    page = said(capsys, *words)
    assert all(f"\n  {name} " in page for name in NAMES)
    assert page.count("\n  predict ") == 1 and page.index("\nUltralytics:\n") < page.index("\n  predict ")
    assert len(page.splitlines()) < 60


@pytest.mark.parametrize(("word", "near"), [("prnue", "'prune'"), ("sparse", "'sparsity'"), ("valid", "'val'")])
def test_there_is_no_help_on_what_there_is_not(capsys, word, near):
    for words in (["help", word], [word, "--help"]):
        assert cli.main(words) == 2
        assert f"'{word}'. Did you mean {near}?" in capsys.readouterr().err


# What it says ------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", COMMANDS.names())
def test_every_key_of_a_command_is_in_its_help(name):
    """What the help explains is legal, and what is legal is explained."""
    page = help_text(name)
    own = page.partition("\n\nExamples:\n")[0]
    legal = {*keys(COMMANDS[name].fn)}
    assert {key for key in legal if not re.search(rf"\b{key}\b", own)} == set()
    explained = re.findall(r"^  (\w+)(?:=\S*)?(?:  |$)", own.partition("\n\n")[2], re.MULTILINE)
    assert {*explained} <= legal | {word.split()[0] for word in FURTHER.values()}
    required = [key for key in needed(COMMANDS[name].fn) if (name, key) != ("predict", "compare")]
    assert page.startswith(" ".join([f"Usage: yolo-ext {name}", *(f"{key}=..." for key in required)]))
    assert COMMANDS[name].summary in " ".join(page.split())
    for technique in CONFIGS.keys() & legal:
        options = [key for key in option_names() if key.startswith(f"{technique}.")]
        told = all(re.search(rf"^  {key}\b", page, re.MULTILINE) for key in options)
        assert told or f"yolo-ext help {technique}" in " ".join(page.split())


@pytest.mark.parametrize("topic", TOPICS)
def test_options_and_methods_of_a_technique_are_in_its_help(topic):
    page = " ".join(help_text(topic).split())
    assert all(f"{technique}.{f.name}" in page for technique in TOPICS[topic] for f in fields(CONFIGS[technique]))
    lists = {"prune": [yolo_ext.list_criteria], "sparsity": [yolo_ext.list_penalties],
             "quantize": [yolo_ext.list_profiles], "distill": []}  # fmt: skip
    assert all(f"{name} {text}" in page for lister in lists.get(topic, []) for name, text in lister().items())
    assert "see `yolo-ext help" not in page.lower() or topic in ("compress", "train")


def test_headings_are_those_of_options_that_there_are():
    for technique, headings in OPTIONS.items():
        names = [f.name for f in fields(CONFIGS[technique])]
        assert next(iter(headings)) == names[0] and {*headings} <= {*names}


@pytest.mark.parametrize(("columns", "most"), [("60", 60), ("100", WIDTH), ("200", WIDTH), ("0", WIDTH)])
def test_every_help_fits_the_terminal(monkeypatch, columns, most):
    monkeypatch.setenv("COLUMNS", columns)
    assert {page: max(map(len, help_text(page).splitlines())) for page in PAGES if
            max(map(len, help_text(page).splitlines())) > most} == {}  # fmt: skip


def test_a_long_example_is_one_command_for_a_shell(monkeypatch):
    monkeypatch.setenv("COLUMNS", "60")
    examples = help_text("compress").partition("Examples:\n")[2].partition("\n\n")[0]
    assert examples.replace(" \\\n     ", "").splitlines() == [
        f"  yolo-ext compress {words}" for words in COMMANDS["compress"].examples
    ]


# Examples ----------------------------------------------------------------------------------------------------------
EXAMPLES = [(r.name, words) for r in COMMANDS for words in r.examples]
EXAMPLES += [(name, words) for name, (_, *examples) in FORWARDED.items() for words in examples]
SHOWN = [words.partition(" ")[::2] for words in re.findall(r"^  yolo-ext (.+)$", help_text(None), re.MULTILINE)]


def take(words: list[str]) -> set[str]:
    """Read a command and check its keys and options as the command line does; return its keys."""
    command, options = cli.parse_args(words)
    if command not in STOCK:
        check_keys(command, options)
    if command != "sensitivity":  # which needs no target
        parse({t: options[t] for t in CONFIGS if isinstance(options.get(t), dict)})
    return {*options}


@pytest.mark.parametrize(("name", "words"), [*EXAMPLES, *SHOWN])
def test_examples_are_legal(name, words):
    given = take([name, *words.split()])
    assert name in STOCK or {*needed(COMMANDS[name].fn)} <= given


def test_commands_that_take_keys_have_three_examples():
    assert [r.name for r in COMMANDS if needed(r.fn) and len(r.examples) < 3] == []


# Recipes -----------------------------------------------------------------------------------------------------------
RECIPES = {name: (about, words) for name, about, words in bundled()}


def test_recipes_are_listed_with_a_line_and_a_command_each(capsys):
    page = said(capsys, "recipes")
    assert [*RECIPES] == sorted(p.stem for p in (cfg_dir() / "recipes").iterdir())
    for name, (about, words) in RECIPES.items():
        assert f"  {name.ljust(max(map(len, RECIPES)))}  {about}\n" in page and f"recipe={name} " in words
    assert max(map(len, page.splitlines())) <= WIDTH and "recipes" in help_text(None)


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_is_legal_in_its_command_and_keeps_the_criterion(name):
    program, *words = RECIPES[name][1].split()
    assert program == "yolo-ext" and CONFIGS.keys() & take(words)
    assert load_recipe(name) == load_recipe(f"{name}.yaml") and load_recipe(name)
    assert "prune.method" not in load_recipe(name)  # the default is the best one measured


# Lists for Python --------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("lister", "some"),
    [
        (yolo_ext.list_criteria, {"taylor", "lamp", "random"}),
        (yolo_ext.list_penalties, {"slim", "group_sl"}),
        (yolo_ext.list_losses, {"cwd", "ld", "kl_binary"}),
        (yolo_ext.list_observers, {"mse", "max"}),
        (yolo_ext.list_schedules, {"cubic", "linear", "cosine"}),
        (yolo_ext.list_profiles, {"ort-x86", "openvino"}),
    ],
    ids=lambda given: getattr(given, "__name__", ""),
)
def test_methods_are_listed_with_a_line_each(lister, some):
    found = lister()
    assert some <= {*found} and all(text and "\n" not in text for text in found.values())
    assert lister.__doc__.startswith("Return the names of all ")


def test_a_name_in_two_tables_has_both_lines():
    assert yolo_ext.list_schedules()["linear"].count("linear") == 0
    assert "pruning schedule: " in yolo_ext.list_schedules()["linear"]
    assert "distillation schedule: " in yolo_ext.list_schedules()["linear"]


def test_rows_of_methods_have_no_examples():
    table = Table("thing")
    table.row("a", "does a")(len)
    table.row("b", "does b", examples=["x=1"])(len)
    assert [row.examples for row in table] == [(), ("x=1",)]
