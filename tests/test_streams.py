"""What is printed where an encoding lacks characters, or nobody reads, or nothing is open."""

from __future__ import annotations

import io
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dreamkit.cli.streams import Lasting, standard_streams

SHOW = [sys.executable, "-m", "dreamkit", "show", "synthesizers", "deepinversion"]


@pytest.mark.parametrize(
    ("encoding", "text", "written"),
    [
        ("ascii", "γ → x̂ ≤ 2×3 …", "gamma -> x <= 2x3 ..."),
        ("cp1252", "naïve x̂ → η", "naïve x -> eta"),
        ("ascii", "/data/Bücher", r"/data/B\xfccher"),
        ("utf-8", "γ → x̂", "γ → x̂"),
    ],
)
def test_characters_that_an_encoding_lacks(
    monkeypatch: pytest.MonkeyPatch, encoding: str, text: str, written: str
) -> None:
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding=encoding))
    with standard_streams():
        print(text, end="")
    assert raw.getvalue().decode(encoding) == written


def test_the_streams_are_as_before_afterwards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdout", None)
    monkeypatch.setenv("COLUMNS", "0")
    with standard_streams():
        print("to nobody")
        assert "COLUMNS" not in os.environ
    assert sys.stdout is None


def test_writing_goes_on_when_the_reader_is_gone() -> None:
    read, write = os.pipe()
    with os.fdopen(write, "w", encoding="utf-8") as stream:
        os.close(read)
        lasting = Lasting(stream)
        for _ in range(3):
            lasting.write("x" * 100_000)
            lasting.flush()


@pytest.mark.parametrize("encoding", ["cp1252", "ascii"])
def test_documentation_is_shown_in_any_encoding(encoding: str) -> None:
    environment = {**os.environ, "PYTHONIOENCODING": encoding, "PYTHONUTF8": "0"}
    done = subprocess.run(SHOW, env=environment, capture_output=True, check=False)
    assert (done.returncode, done.stderr) == (0, b"")
    assert "R(x)" in done.stdout.decode(encoding)


@pytest.mark.skipif(os.name != "posix", reason="names of files are bytes on POSIX alone")
def test_files_are_found_where_the_locale_has_no_name_for_them(
    tmp_path: Path, tiny: dict[str, Any], recipe_file: Callable[..., Path]
) -> None:
    folder = tmp_path / "Bücher"
    folder.mkdir()
    (folder / "nets.py").write_text("def make(): ...")
    tiny["teacher"] = {
        "source": "checkpoint",
        "builder": f"{folder}/nets.py:make",
        "input_size": [3, 8, 8],
        "mean": [0.5] * 3,
        "std": [0.25] * 3,
        "num_classes": 10,
    }
    plain = {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"}
    done = subprocess.run(
        [sys.executable, "-m", "dreamkit", "validate", str(recipe_file(tiny))],
        env={**os.environ, **plain},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.rstrip().endswith("is valid")
