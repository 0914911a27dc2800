"""The examples: notebooks in jupytext's percent format, run from their first cell to their last."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SAYS = {
    "01_dream_digits": "loaded: 0.9",
    "02_shrink_your_own_network": "loaded: 0.9",
    "03_from_notebook_to_recipe": "the run's dreams are those of this notebook: True",
    "04_add_classes": "with dreams: old digits 0.9",
}
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))


def test_every_example_is_run():
    assert [example.stem for example in EXAMPLES] == list(SAYS)


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.stem)
def test_an_example_is_a_notebook(example):
    lines = example.read_text(encoding="utf-8").splitlines()
    assert lines[0] == "# %% [markdown]"
    assert lines[1].startswith("# # "), "its title"
    cells = [line for line in lines if line.startswith("# %%")]
    assert set(cells) == {"# %%", "# %% [markdown]"}


@pytest.mark.slow
@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.stem)
def test_an_example_runs(example, tmp_path):
    done = subprocess.run(
        [sys.executable, str(example)],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert not done.stderr, "no warnings, no bar"
    assert SAYS[example.stem] in done.stdout
