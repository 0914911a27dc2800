"""Fixtures that several test files share."""

from __future__ import annotations

import copy
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import yaml
from hypothesis import strategies as st

from dreamkit import cli

# Workers of pytest-xdist share the cores, and so does what they start: more threads than cores wait
# for each other, spinning.
if "PYTEST_XDIST_WORKER" in os.environ:
    _THREADS = max(1, (os.cpu_count() or 1) // int(os.environ["PYTEST_XDIST_WORKER_COUNT"]))
    os.environ.setdefault("OMP_NUM_THREADS", str(_THREADS))
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))

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

WORDS = ["name", "source", "weight", "steps", "size", "images", "presets", "tv", "timm", "resnet18"]
KEYS = st.one_of(st.sampled_from(WORDS), st.text(max_size=6))
SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.text(max_size=8),
    st.sampled_from(WORDS),
)
VALUES = st.one_of(
    SCALARS,
    st.recursive(
        SCALARS,
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=3),
        max_leaves=5,
    ),
    st.sampled_from([10**400, -(10**400), 2**63, 1e308, "\ud800"]),
    st.sampled_from(["js_compete", "bn_feature", "tv", "csv"]).map(lambda name: {"name": name}),
)


def places(data: Any) -> list[tuple[Any, Any]]:
    """Return every (container, key) inside nested data."""
    pairs: list[tuple[Any, Any]] = []
    if isinstance(data, dict | list):
        keys = list(data) if isinstance(data, dict) else list(range(len(data)))
        for key in keys:
            pairs += [(data, key), *places(data[key])]
    return pairs


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


@pytest.fixture(scope="session")
def mutate() -> Callable[[st.DataObject, dict[str, Any]], None]:
    """Change one to three places of a nested document, as hypothesis draws them."""

    def change(data: st.DataObject, document: dict[str, Any]) -> None:
        for _ in range(data.draw(st.integers(1, 3), label="changes")):
            container, key = data.draw(st.sampled_from(places(document)), label="place")
            action = data.draw(st.sampled_from(["replace", "delete", "insert"]), label="action")
            if action == "delete":
                del container[key]
            elif action == "replace":
                container[key] = data.draw(VALUES)
            elif isinstance(container, dict):
                container[data.draw(KEYS)] = data.draw(VALUES)
            else:
                container.insert(key, data.draw(VALUES))
            if not places(document):
                break

    return change
