"""The site: every page is reached, everything has its heading, and what is generated is up to date.

The snippets in its pages are tests of their own: see ``conftest.py`` at the root.
"""

from __future__ import annotations

import copy
import importlib.util
import inspect
import re
import shlex
import tomllib
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

import dreamkit
from dreamkit import hookspecs, plugin
from dreamkit.plugins import BUILTIN_PROVIDER, build_registries
from dreamkit.registry import KINDS
from dreamkit.types import Event

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = sorted(DOCS.rglob("*.md"))
WRITTEN = [ROOT / "README.md", *PAGES]
FENCE = re.compile(r"^( *)```(.*)\n(?:.*\n)*?\1```$", re.MULTILINE)
REASON = re.compile(r'(?:next|start),? (?:if\(.+, reason=)?".+"\)?|end')
INDENTED = r"^ {4,}(?:\$ |dreamkit |pip |import |from ).*"
RUN = {"python", "bash", "console", "yaml"}
SHOWN = {"text", "json", "ini", "toml"}


def _generate() -> ModuleType:
    spec = importlib.util.spec_from_file_location("generate", DOCS / "generate.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


generate = _generate()
COMMANDS: dict[str, Any] = dict(generate.every_command())
EXAMPLES = [line for command in COMMANDS.values() for line in generate.examples(command)]


def _headings(page: str) -> set[str]:
    """Return the headings of a page, and the names that mkdocstrings makes headings of."""
    text = FENCE.sub("", (DOCS / page).read_text(encoding="utf-8"))
    return set(re.findall(r"^(?:#+|:::) (.+)$", text, re.MULTILINE))


def _files(navigation: Any) -> Iterator[str]:
    if isinstance(navigation, str):
        yield navigation
    else:
        inside = navigation.values() if isinstance(navigation, dict) else navigation
        for part in inside:
            yield from _files(part)


def test_the_navigation_has_every_page_once_and_no_other() -> None:
    config = tomllib.loads((ROOT / "zensical.toml").read_text(encoding="utf-8"))
    pages = [page.relative_to(DOCS).as_posix() for page in PAGES]
    assert sorted(_files(config["project"]["nav"])) == sorted(pages)


@pytest.mark.parametrize("page", WRITTEN, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links_to_files_lead_somewhere(page: Path) -> None:
    text = FENCE.sub("", page.read_text(encoding="utf-8"))
    links = re.findall(r"\]\(([^)#\s]+)[^)]*\)", re.sub(r"`[^`]*`", "``", text))
    inside = [link for link in links if "://" not in link and not link.startswith("mailto:")]
    assert [link for link in inside if not (page.parent / link).exists()] == []


@pytest.mark.parametrize("page", WRITTEN, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_every_block_says_what_it_is_so_that_it_runs(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    languages = {found[2].split(" ")[0] for found in FENCE.finditer(text)}
    assert languages <= RUN | SHOWN
    indented = FENCE.sub("", text)
    assert re.findall(INDENTED, indented, re.MULTILINE) == []


@pytest.mark.parametrize("page", WRITTEN, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_what_does_not_run_says_why(page: Path) -> None:
    skips = re.findall(r"<!--+ *skip: *(.*?) *--+>", page.read_text(encoding="utf-8"))
    silent = [
        skip for skip in skips if not re.fullmatch(r'(?:next|start),? (if\(.+, )?".+"\)?|end', skip)
    ]
    assert silent == []


def test_what_is_generated_is_up_to_date() -> None:
    assert generate.generate(check=True) == 0, "run: python docs/generate.py"


@pytest.mark.parametrize("kind", KINDS)
def test_every_entry_has_its_heading(kind: str) -> None:
    registry = build_registries()[kind]
    names = {f"`{name}`" for name in registry if registry.provider(name) == BUILTIN_PROVIDER}
    assert names
    assert names <= _headings(f"reference/entries/{kind}.md")


def test_every_hook_has_its_heading_with_its_arguments() -> None:
    hooks = {
        f"`{name}({', '.join(inspect.signature(spec).parameters)})`"
        for name, spec in vars(hookspecs).items()
        if hasattr(spec, "dreamkit_spec")
    }
    assert hooks == _headings("extend/hooks.md") - {"Hooks"}


def test_every_event_has_its_heading() -> None:
    events = {f"`{event.__name__}`" for event in Event.__subclasses__()}
    assert events == _headings("extend/events.md") - {"Events"}


def test_every_command_has_its_heading() -> None:
    assert {f"`{path}`" for path in COMMANDS} == _headings("reference/cli.md") - {"Commands"}


@pytest.mark.parametrize("line", EXAMPLES)
def test_examples_of_help_parse(line: str) -> None:
    words = shlex.split(line.partition(" > ")[0])
    path = max((path for path in COMMANDS if words[: len(path.split())] == path.split()), key=len)
    COMMANDS[path].make_context(path, words[len(path.split()) :])


def test_every_public_name_has_its_heading() -> None:
    told = _headings("reference/python.md")
    small = {"__version__", "hookimpl"}  # a sentence each
    assert {name for name in dreamkit.__all__ if f"dreamkit.{name}" not in told} == small


def test_every_name_of_the_plugin_module_has_its_heading() -> None:
    told = _headings("reference/plugin.md")
    events = {event.__name__ for event in Event.__subclasses__()}
    small = {"API", "Event", "Field", "hookimpl"}
    left = {name for name in plugin.__all__ if f"dreamkit.plugin.{name}" not in told}
    assert left == events | small


def test_every_metric_of_a_run_has_its_row() -> None:
    digits = dreamkit.load_teacher("bundled:digits_resnet8")
    quick = {"progress": False, "device": "cpu"}
    dreams = dreamkit.invert(digits, 8, steps=1, batch_size=8, **quick)
    held_out = (dreams.images, dreams.labels)
    small = dreamkit.prune(
        digits, dreams, flops=0.8, recovery={"steps": 1}, evaluation=held_out, **quick
    )
    other = copy.deepcopy(digits.model)
    torch.nn.init.zeros_(next(other.parameters()))
    judged = dreamkit.judge(digits, dreams, {"other": other}, reference=held_out, splits=2, **quick)
    pytest.importorskip("onnxscript")
    pytest.importorskip("onnxruntime")
    whole = dreamkit.quantize(digits, dreams, evaluation=held_out, compare=held_out, **quick)
    page = (DOCS / "reference" / "files.md").read_text(encoding="utf-8")
    metrics = {*dreams.metrics, *small.metrics, *judged.metrics, *whole.metrics}
    assert {"synthesis.images", "pruned.params", "student.agreement"} <= metrics
    assert {
        name for name in metrics if not _rows(name) & set(re.findall(r"`(.+?)`", page))
    } == set()


def _rows(metric: str) -> set[str]:
    """Return what the row of a metric may be called."""
    return {
        metric,
        re.sub(r"^(?:teacher|pruned|student)\.", "MODEL.", metric),
        re.sub(r"^judge\.\w+\.", "judge.VERIFIER.", metric),
    }
