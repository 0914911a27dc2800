"""The script of tables 4 and 5: its recipes can be read, and its proxy images are what they say."""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from PIL import Image

from dreamkit.plugins import build_registries
from dreamkit.recipe import read_recipe


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], ModuleType]:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "benchmarks"))
    return importlib.import_module


def test_patches_are_of_a_size_and_the_same_for_a_seed(
    script: Callable[[str], ModuleType], tmp_path: Path
) -> None:
    write = script("photograph_patches").write_patches
    for name, count, seed in (("a", 6, 0), ("more", 8, 0), ("other", 6, 1)):
        write(tmp_path / name, count, 24, seed)
    found = {
        name: [file.read_bytes() for file in sorted((tmp_path / name).rglob("*.png"))]
        for name in ("a", "more", "other")
    }
    assert found["a"] == found["more"][:6]
    assert len(found["more"]) == 8
    assert found["a"] != found["other"]
    with Image.open(tmp_path / "a" / "photographs" / "00000.png") as patch:
        assert patch.size == (24, 24)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "more", "other"]


def test_every_cell_is_a_recipe_and_a_row(
    script: Callable[[str], ModuleType],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """All but the runs: each would begin, and its figures come to where they belong."""
    tables = script("pruning_tables")
    script("photograph_patches").write_patches(tmp_path / "proxy", 2, 32, 0)
    begun: dict[str, Any] = {}

    def run(file: Path, preset: str, changes: list[str], folder: Path, console: object) -> Any:
        folder.joinpath("dreams").mkdir(parents=True)  # as a run that dreams leaves it
        folder.joinpath("dreams", "shard-000000.safetensors").touch()
        root = read_recipe(file, build_registries, preset, changes).root.plain()
        begun[folder.name] = root
        number = len(begun) / 100
        return {f"{kind}.accuracy": number for kind in ("cut", "pruned", "student")}, root

    monkeypatch.setattr(tables, "run_recipe", run)
    out, figures = tmp_path / "runs", tmp_path / "figures.json"
    given = ["--proxy", str(tmp_path / "proxy"), "--original", str(tmp_path / "proxy")]
    given += ["--out", str(out), "--json", str(figures), "--preset", "draft"]
    given += ["--set", "evaluation=null", "--set", "synthesis.stages=[{steps: 7}]"]
    monkeypatch.setattr("sys.argv", ["pruning_tables.py", "--tables", "4", *given])
    tables.main()
    rows = [line.split(" | ")[0].strip("| ") for line in capsys.readouterr().out.splitlines()]

    for row in ("no fine-tuning", "reconstructed", "partial original", "proxy", "fast_meta"):
        assert row in rows
    assert len(begun) == 2 + 5 * 2, "two that dream, and five sources at two ratios"
    assert begun["deepinversion-draft-0"]["synthesis"]["stages"] == [{"steps": 7}]
    assert "stages" not in begun["fast_meta-draft-0"]["synthesis"], "it has none"
    pruned = begun["proxy-0.29-eta0-draft-0"]["application"]
    assert pruned["images"]["labelled"] is False
    assert pruned["target"] == {"flops": 0.29}
    # What "no fine-tuning" shows is of a network that was never trained, nor fitted on the way.
    assert pruned["reconstruction"] == {"images": 1024}
    assert not {"finetune", "reconstruct_each"} & {*pruned}
    assert begun["adaptive-0.63-eta0-draft-0"]["application"]["adaptive"]["batches"] == 4
    assert set(json.loads(figures.read_text())) >= {"table4"}
