# Copyright (C) yolo_ext authors. AGPL-3.0 licence.
"""Sessions in fresh environments: `nox -l` lists them, words behind `--` go to pytest."""

import re

import nox

nox.options.sessions = ["lint", "oldest", "tests-3.13"]
nox.options.default_venv_backend = "virtualenv"
PROJECT = nox.project.load_toml("pyproject.toml")["project"]
PYTHONS = ["3.10", "3.11", "3.12", "3.13"]
WORDS = {"YOLO_AUTOINSTALL": "false", "YOLO_OFFLINE": "true"}


def fast(session: nox.Session, legal: tuple[int, ...] = (0,)) -> None:
    """Say what is installed and run the fast tests, or those that the words behind `--` name."""
    session.run("yolo-ext", "checks", env=WORDS, success_codes=legal)
    session.run("pytest", "-q", *(session.posargs or ["-n", "auto"]), env=WORDS)


@nox.session(python=PYTHONS)
def tests(session: nox.Session) -> None:
    """The newest supported release of everything, on each Python."""
    session.install("--upgrade", "--upgrade-strategy", "eager", "-e", ".[test]")
    fast(session)


@nox.session(python=PYTHONS[0])
def oldest(session: nox.Session) -> None:
    """The lower bound of everything in pyproject.toml, on the oldest Python."""
    lower = [re.sub(r">=([\d.]+).*", r"==\1", need) for need in PROJECT["dependencies"]]
    session.install("-e", ".[test]", *lower)
    fast(session)


@nox.session(python=PYTHONS[-1])
def canary(session: nox.Session) -> None:
    """Whatever Ultralytics is newest, also beyond the supported range: this may fail, and says what to look at."""
    session.install("-e", ".[test]")
    session.install("--upgrade", "--pre", "ultralytics")
    fast(session, legal=(0, 1))


@nox.session
def lint(session: nox.Session) -> None:
    """Style and types."""
    session.install("-e", ".[test]")
    session.run("ruff", "check", ".")
    session.run("ruff", "format", "--check", ".")
    session.run("mypy")


@nox.session
def coverage(session: nox.Session) -> None:
    """Lines and branches that the fast tests run."""
    session.install("-e", ".[test]", "pytest-cov")
    session.run("pytest", "-q", "--cov", "--cov-report=term-missing:skip-covered", *session.posargs, env=WORDS)


@nox.session
def security(session: nox.Session) -> None:
    """Look for risky code, and for known vulnerabilities of what is installed; the latter needs the network."""
    session.install("bandit[toml]", "pip-audit", ".")
    session.run("bandit", "-q", "-c", "pyproject.toml", "-r", "yolo_ext")
    session.run("pip-audit", "--strict", "--skip-editable")


@nox.session
def docs(session: nox.Session) -> None:
    """Build the site; a link that leads nowhere fails."""
    session.install("-e", ".[docs]")
    session.run("mkdocs", "build", "--strict", *session.posargs, env=WORDS)


@nox.session
def wheel(session: nox.Session) -> None:
    """Build the wheel twice, in two folders: the same bytes."""
    session.run("bash", ".ci/wheel", external=True)
