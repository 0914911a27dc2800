"""Runs the snippets of README.md and docs/ as tests: Python, shell and recipes.

The snippets of a page share their names and an empty working directory that has ``plugins/`` and
``recipes/``. What does not run says why, in the page:

    <!-- skip: next "it downloads weights" -->

``<!-- slow -->`` leaves what follows on a page to ``-m slow``. A recipe whose first line is
``# my.yaml`` is saved under that name, for the commands after it.
"""

from __future__ import annotations

import contextlib
import re
import shlex
import sys
import tempfile
from collections.abc import Iterator
from doctest import ELLIPSIS
from pathlib import Path
from typing import Any

import pytest
import yaml
from sybil import Example, Sybil
from sybil.integration.pytest import SybilItem
from sybil.parsers.markdown import CodeBlockParser, PythonCodeBlockParser, SkipParser

ROOT = Path(__file__).parent
SLOW = "<!-- slow -->"
BASE: dict[str, Any] = {
    "name": "shown",
    "teacher": {"source": "bundled", "model": "digits_resnet8"},
    "synthesis": {"name": "deepinversion", "images": 8, "stages": [{"steps": 1}]},
    "application": {"name": "synthesize"},
}
"""What a part of a recipe is laid over."""


def _enter(names: dict[str, Any]) -> None:
    stack = contextlib.ExitStack()
    folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
    stack.enter_context(contextlib.chdir(folder))
    patch = stack.enter_context(pytest.MonkeyPatch.context())
    patch.setenv("DREAMKIT_PLUGINS", "")
    for shared in ("plugins", "recipes"):
        (folder / shared).symlink_to(ROOT / shared)
    names["__leave__"] = stack


def _leave(names: dict[str, Any]) -> None:
    names["__leave__"].close()


def _commands(text: str) -> Iterator[list[str]]:
    """Yield the commands of a block; in ``console`` blocks they stand after ``$``."""
    lines = text.replace("\\\n", " ").splitlines()
    typed = [line[2:] for line in lines if line.startswith("$ ")] or lines
    yield from filter(None, (shlex.split(line, comments=True) for line in typed))


def _run_commands(example: Example) -> None:
    from dreamkit import cli

    for words in _commands(example.parsed):
        assert words[0] == "dreamkit", f"'{words[0]}' is not run: say why with 'skip: next'"
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys, "argv", words)
            with pytest.raises(SystemExit) as stop:
                cli.main()
        assert not stop.value.code, f"{shlex.join(words)} ended with {stop.value.code}"


def _check_recipe(example: Example) -> None:
    """Validate a recipe, or a part of one laid over ``BASE``; its files may be missing."""
    from dreamkit.plugins import build_registries
    from dreamkit.recipe import validate_recipe

    text, data = example.parsed, yaml.safe_load(example.parsed)
    whole = {"name", "teacher", "application"} <= data.keys()
    named = re.match(r"# (\S+\.yaml)\n", text)
    file = Path(named[1] if named else "shown.yaml")
    recipe = text if whole else yaml.safe_dump({**BASE, "presets": {"part": data}})
    file.write_text(recipe, encoding="utf-8")
    validate_recipe(file, build_registries, None if whole else "part")


_collect = Sybil(
    parsers=[
        PythonCodeBlockParser(doctest_optionflags=ELLIPSIS),
        CodeBlockParser("bash", _run_commands),
        CodeBlockParser("console", _run_commands),
        CodeBlockParser("yaml", _check_recipe),
        SkipParser(),
    ],
    pattern="*.md",
    setup=_enter,
    teardown=_leave,
).pytest()


def pytest_collect_file(file_path: Path, parent: pytest.Collector) -> pytest.Collector | None:
    """Collect the pages of the site and README.md, and no other Markdown."""
    ours = file_path == ROOT / "README.md" or file_path.is_relative_to(ROOT / "docs")
    return _collect(file_path, parent) if ours else None


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark the snippets after ``<!-- slow -->``."""
    for item in items:
        if isinstance(item, SybilItem):
            before = item.example.document.text[: item.example.start]
            if SLOW in before:
                item.add_marker(pytest.mark.slow)
