"""Fixtures that several test files share."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import yaml

from dreamkit import cli

TINY: dict[str, Any] = {
    "name": "tiny",
    "device": "cpu",
    "teacher": {"source": "bundled", "model": "digits_resnet8"},
    "synthesis": {
        "name": "deepinversion",
        "images": 4,
        "batch_size": 4,
        "stages": [{"steps": 1}],
        "regularizers": [{"name": "tv", "weight": 1e-3}],
    },
    "application": {"name": "synthesize"},
}


class Outcome(NamedTuple):
    """What a call of the command line left behind."""

    code: int
    out: str
    err: str


@pytest.fixture
def tiny() -> dict[str, Any]:
    """A valid recipe that runs in a moment, as data to change."""
    return copy.deepcopy(TINY)


@pytest.fixture
def recipe_file(tmp_path: Path) -> Callable[..., Path]:
    """Write a recipe, given as text or as data, into ``tmp_path``."""

    def write(recipe: str | dict[str, Any], name: str = "r.yaml") -> Path:
        text = recipe if isinstance(recipe, str) else yaml.safe_dump(recipe, sort_keys=False)
        path = tmp_path / name
        path.write_text(text, encoding="utf-8")
        return path

    return write


@pytest.fixture
def invoke(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., Outcome]:
    """Run the command line in this process; whatever it does not catch fails the test."""
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setenv("NO_COLOR", "1")

    def run(*arguments: object) -> Outcome:
        monkeypatch.setattr(sys, "argv", ["dreamkit", *map(str, arguments)])
        capsys.readouterr()
        code: Any = 0
        try:
            cli.main()
        except SystemExit as stop:
            code = stop.code or 0
        captured = capsys.readouterr()
        return Outcome(code, captured.out, captured.err)

    return run
