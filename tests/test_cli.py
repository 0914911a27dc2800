"""The command line: what it prints, its exit status, and that listing is quick."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dreamkit import cli
from dreamkit.plugins import build_registries
from dreamkit.registry import KINDS
from dreamkit.synthesizers.deepinversion import Inversion
from dreamkit.types import BatchPlan
from dreamkit.version import __version__

Invoke = Callable[..., Any]
Write = Callable[..., Path]
COMMANDS = [c.name or c.callback.__name__ for c in cli.app.registered_commands if c.callback]
START_SECONDS = 3.0


def test_the_commands() -> None:
    assert {"run", "validate", "new", "recipes", "list", "show", "plugins"} < set(COMMANDS)


def test_version(invoke: Invoke) -> None:
    assert invoke("--version") == (0, f"dreamkit {__version__}\n", "")


@pytest.mark.parametrize("flag", ["--help", "-h"])
def test_help_names_every_command(invoke: Invoke, flag: str) -> None:
    code, out, err = invoke(flag)
    assert (code, err) == (0, "")
    assert all(re.search(rf"\b{command}\b", out) for command in COMMANDS)


@pytest.mark.parametrize("command", COMMANDS)
def test_help_of_a_command_shows_examples(invoke: Invoke, command: str) -> None:
    code, out, err = invoke(command, "--help")
    assert (code, err) == (0, "")
    _, found, examples = out.partition("Example")
    assert found
    assert f"dreamkit {command}" in examples


def test_an_unknown_command_is_exit_status_2(invoke: Invoke) -> None:
    code, _, err = invoke("lsit")
    assert code == 2
    assert "lsit" in err
    assert "Traceback" not in err


def test_a_missing_argument_is_exit_status_2(invoke: Invoke) -> None:
    code, _, err = invoke("run")
    assert code == 2
    assert "Missing argument" in err
    assert "recipe" in err.lower()


def test_list_shows_every_kind(invoke: Invoke) -> None:
    code, out, err = invoke("list")
    assert (code, err) == (0, "")
    assert all(kind in out for kind in KINDS)
    row = next(line for line in out.splitlines() if "bn_feature" in line)
    assert "regularizers" in row
    assert "dreamkit" in row
    assert "BatchNorm" in row


def test_list_of_a_kind_as_json(invoke: Invoke) -> None:
    code, out, err = invoke("list", "regularizers", "--json")
    assert (code, err) == (0, "")
    rows = json.loads(out)
    assert {row["kind"] for row in rows} == {"regularizers"}
    builtin = {row["name"]: row for row in rows if row["provider"] == "dreamkit"}
    assert set(builtin) >= {"bn_feature", "js_compete", "l2", "tv"}
    assert all(set(row) == {"kind", "name", "provider", "summary"} for row in rows)


def test_every_built_in_entry_has_a_summary(invoke: Invoke) -> None:
    rows = json.loads(invoke("list", "--json").out)
    assert {row["kind"] for row in rows} == set(KINDS)
    assert [row["name"] for row in rows if not row["summary"].endswith((".", "):"))] == []


@pytest.mark.parametrize("command", [("list",), ("show",)])
def test_an_unknown_kind(invoke: Invoke, command: tuple[str, ...]) -> None:
    arguments = ("tv",) if command == ("show",) else ()
    code, out, err = invoke(*command, "regularisers", *arguments)
    assert (code, out) == (2, "")
    assert err == (
        f"error: no kind 'regularisers'; did you mean 'regularizers'? (kinds: {', '.join(KINDS)})\n"
    )


def test_an_unknown_name(invoke: Invoke) -> None:
    code, out, err = invoke("show", "regularizers", "bn_featur")
    assert (code, out) == (2, "")
    assert err.startswith("error: no name 'bn_featur' among the regularizers; did you mean ")
    assert "'bn_feature'? (choices: activation, adversarial, bn_feature, " in err
    assert invoke("show", "teachers", "tim").err.startswith("error: no source 'tim' among the ")


def test_show_prints_what_an_entry_does_and_its_options(invoke: Invoke) -> None:
    code, out, err = invoke("show", "regularizers", "bn_feature")
    assert (code, err) == (0, "")
    assert out.startswith("regularizers bn_feature (from dreamkit)\n")
    assert "R_feature of eq. 4" in out
    row = next(
        line for line in out.splitlines() if "first_layer_scale" in line and "number" in line
    )
    assert "1.0" in row
    assert ">= 0" in row


def test_show_prints_nested_options_and_what_is_required(invoke: Invoke) -> None:
    out = invoke("show", "applications", "prune").out
    rows = {line.split()[1]: line for line in out.splitlines() if line.startswith(("│", "|"))}
    assert "required" in rows["target"]
    assert "list of weighted criteria" in rows["criteria"]
    assert "its own defaults" in rows["recovery"]
    assert "temperature" in rows
    assert "max_ratio" in rows
    assert '"mean" | "max" | "group" | "none"' in rows["normalise"]


def test_show_calls_a_default_as_recipes_do(invoke: Invoke) -> None:
    out = invoke("show", "applications", "quantize").out
    rows = {line.split()[1]: line for line in out.splitlines() if line.startswith(("│", "|"))}
    assert " onnxruntime " in rows["quantizer"]


def entries() -> list[tuple[str, str]]:
    registries = build_registries()
    return [(kind, name) for kind in KINDS for name in registries[kind]]


@pytest.mark.parametrize(("kind", "name"), entries())
def test_every_entry_can_be_shown(invoke: Invoke, kind: str, name: str) -> None:
    code, out, err = invoke("show", kind, name)
    assert (code, err) == (0, "")
    assert len(out.splitlines()) >= 3
    assert "dreamkit." not in out.partition("\n")[2].replace("dreamkit.types", "")


def test_plugins_as_json(invoke: Invoke) -> None:
    code, out, err = invoke("plugins", "--json")
    assert (code, err) == (0, "")
    first = json.loads(out)[0]
    assert (first["provider"], first["status"]) == ("dreamkit", "loaded")
    assert "regularizers: bn_feature" in first["entries"]


def test_a_plugin_file_is_listed(invoke: Invoke, tmp_path: Path) -> None:
    file = tmp_path / "mine.py"
    file.write_text(
        "from dreamkit import hookimpl\n"
        "class Mine:\n    '''Mine alone.'''\n"
        "@hookimpl\ndef register_regularizers(register):\n    register('mine', Mine)\n"
    )
    rows = json.loads(invoke("list", "regularizers", "--json", "--plugin", file).out)
    (row,) = (row for row in rows if row["name"] == "mine")
    assert (row["provider"], row["summary"]) == (str(file), "Mine alone.")
    providers = json.loads(invoke("plugins", "--json", "--plugin", file).out)
    assert {"provider": str(file), "status": "loaded", "entries": "regularizers: mine"} in providers


def test_a_plugin_file_that_is_not_there(invoke: Invoke, tmp_path: Path) -> None:
    code, out, err = invoke("list", "--plugin", tmp_path / "none.py")
    assert (code, out) == (2, "")
    assert "none.py" in err
    assert "Traceback" not in err


def test_validate(invoke: Invoke, tiny: dict[str, Any], recipe_file: Write) -> None:
    path = recipe_file(tiny)
    assert invoke("validate", path) == (0, f"{path} is valid\n", "")


def test_validate_with_preset_and_override(
    invoke: Invoke, tiny: dict[str, Any], recipe_file: Write
) -> None:
    path = recipe_file({**tiny, "presets": {"big": {"seed": 3}}})
    assert invoke("validate", path, "--preset", "big", "--set", "seed=4").code == 0
    code, out, err = invoke("validate", path, "--set", "seed=x", "--set", "device=tpu")
    assert (code, out) == (2, "")
    assert "--set seed: " in err
    assert "--set device: " in err


def test_validate_warns_of_a_missing_file(
    invoke: Invoke, tiny: dict[str, Any], recipe_file: Write
) -> None:
    path = recipe_file({**tiny, "evaluation": {"source": "folder", "path": "no/such"}})
    code, out, err = invoke("validate", path)
    assert (code, out) == (0, f"{path} is valid\n")
    assert err.startswith("warning: ")
    assert "evaluation.path: no such folder: no/such" in err


def test_a_bad_recipe_is_one_message_and_exit_status_2(
    invoke: Invoke, tiny: dict[str, Any], recipe_file: Write
) -> None:
    path = recipe_file({**tiny, "sede": 1})
    code, out, err = invoke("validate", path)
    assert (code, out) == (2, "")
    assert re.fullmatch(
        rf"error: {re.escape(str(path))}:\d+:1 sede: unknown option; did you mean 'seed'\?\n", err
    )


def test_a_run_and_what_it_leaves(
    invoke: Invoke, tiny: dict[str, Any], recipe_file: Write, tmp_path: Path
) -> None:
    path, out = recipe_file({**tiny, "evaluation": {"source": "digits"}}), tmp_path / "out"
    assert invoke("run", path, "--out", out).code == 0
    report = json.loads((out / "report.json").read_text())
    assert report["metrics"]["synthesis.images"] == 4
    assert report["metrics"]["teacher.accuracy"] > 0.9
    before = {file: file.read_bytes() for file in out.rglob("*") if file.is_file()}
    code, text, _ = invoke("run", path, "--out", out)
    assert code == 0
    assert "already holds this recipe's finished run" in text
    assert {file: file.read_bytes() for file in out.rglob("*") if file.is_file()} == before
    pictures = tmp_path / "pictures"
    assert invoke("export-dreams", out, pictures).out == f"4 images written to {pictures}\n"
    assert len(list(pictures.rglob("*.png"))) == 4


@pytest.fixture
def interrupted(
    invoke: Invoke,
    tiny: dict[str, Any],
    recipe_file: Write,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> Path:
    """Interrupt a run, with a preset and an override, after its first of two batches."""
    dream = Inversion.dream

    def stop(self: Inversion, plan: BatchPlan, on_step: Any) -> Any:
        if plan.index == 1:
            raise KeyboardInterrupt
        return dream(self, plan, on_step)

    path = recipe_file({**tiny, "presets": {"twice": {"synthesis": {"images": 8}}}})
    with monkeypatch.context() as patch:
        patch.setattr(Inversion, "dream", stop)
        options = ("--preset", "twice", "--set", "seed=3")
        code, _, err = invoke("run", path, *options, "--out", tmp_path / "out")
    assert code == 130
    assert "interrupted: what was finished is kept; go on with\n  dreamkit run " in err
    return tmp_path / "out"


def test_a_run_directory_is_gone_on_with(interrupted: Path, invoke: Invoke) -> None:
    code, out, err = invoke("run", "--resume", interrupted)
    assert (code, err) == (0, "")
    assert "1 of 2 batches kept" in out
    report = json.loads((interrupted / "report.json").read_text())
    assert (report["seed"], report["metrics"]["synthesis.images"]) == (3, 8)
    assert report["preset"] == "twice"
    assert not [note for note in report["notes"] if "student" in note], "it makes none"
    code, out, _ = invoke("run", "--resume", interrupted)
    assert code == 0
    assert "already holds this recipe's finished run" in out


def test_a_run_directory_and_its_recipe_are_one_run(
    interrupted: Path, invoke: Invoke, tmp_path: Path
) -> None:
    assert invoke("run", "--resume", interrupted).code == 0
    options = ("--preset", "twice", "--set", "seed=3", "--out", interrupted)
    code, out, _ = invoke("run", tmp_path / "r.yaml", *options)
    assert code == 0
    assert "already holds this recipe's finished run" in out


def test_a_run_directory_asks_for_resume_and_nothing_else(
    interrupted: Path, invoke: Invoke, tmp_path: Path
) -> None:
    code, _, err = invoke("run", interrupted)
    assert code == 2
    assert err == (
        f"error: {interrupted} is a run directory: go on with 'dreamkit run --resume "
        f"{interrupted}', or name a recipe\n"
    )
    for option in (("--preset", "twice"), ("--set", "seed=3"), ("--out", tmp_path / "other")):
        code, _, err = invoke("run", "--resume", interrupted, *option)
        assert code == 2
        assert "goes on with the recipe that is stored there: leave --preset, --set and" in err


def test_a_folder_without_a_run(invoke: Invoke, tmp_path: Path) -> None:
    code, _, err = invoke("run", "--resume", tmp_path)
    assert code == 2
    assert err == f"error: {tmp_path} holds no run to resume (no recipe.resolved.yaml)\n"
    assert "Is a directory" in invoke("run", tmp_path).err


def test_export_without_dreams(invoke: Invoke, tmp_path: Path) -> None:
    code, out, err = invoke("export-dreams", tmp_path, tmp_path / "pictures")
    assert (code, out) == (2, "")
    assert err == f"error: {tmp_path} holds no dreams\n"
    assert not (tmp_path / "pictures").exists()


def python_m_dreamkit(*arguments: str) -> tuple[subprocess.CompletedProcess[str], float]:
    start = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "dreamkit", *arguments],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    return done, time.perf_counter() - start


def test_starting_imports_no_torch_and_is_quick() -> None:
    seconds = []
    for _ in range(3):  # other work on the machine may slow one of them down
        done, taken = python_m_dreamkit("plugins", "--json")
        seconds.append(taken)
        if taken < START_SECONDS:
            break
    assert done.returncode == 0
    assert json.loads(done.stdout)
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert "dreamkit.cli" in imported
    heavy = {"torch", "torchvision", "timm", "numpy", "sklearn", "matplotlib"}
    assert not imported & heavy
    assert min(seconds) < START_SECONDS


@pytest.mark.parametrize("arguments", ["--help", "list --help", "run --help", "recipes"])
def test_help_imports_no_torch(arguments: str) -> None:
    done, _ = python_m_dreamkit(*arguments.split())
    assert done.returncode == 0
    assert done.stdout
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert not imported & {"torch", "torchvision", "timm", "numpy", "sklearn", "matplotlib"}


def test_a_mistake_on_the_real_command_line_is_exit_status_2() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "dreamkit", "list", "teachrs"],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: no kind 'teachrs'; did you mean 'teachers'?")


def test_a_dry_run_tells_the_cost_and_writes_nothing(recipe_file, tiny, invoke, tmp_path):
    out = tmp_path / "never"
    done = invoke("run", recipe_file(tiny), "--out", out, "--dry-run")
    assert done.code == 0
    assert "images in" in done.out
    assert "on this CPU" in done.out
    assert "nothing was written" in done.out
    assert not out.exists()


def test_the_schema_names_every_entry(invoke):
    done = invoke("schema")
    schema = json.loads(done.out)
    assert done.code == 0
    assert {"teacher", "synthesis", "application"} <= schema["properties"].keys()
    assert "bn_feature" in done.out
