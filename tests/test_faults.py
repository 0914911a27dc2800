"""Runs that are stopped, killed, started twice, or whose files are damaged."""

from __future__ import annotations

import gc
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from rich.console import Console
from safetensors.torch import load_file

from dreamkit import run_report, runner, stopping
from dreamkit.errors import DreamkitError, RunDirectoryError
from dreamkit.flat_state import hash_state
from dreamkit.plugins import build_registries
from dreamkit.recipe import read_recipe
from dreamkit.stages import progress_picture
from dreamkit.stopping import Stop
from dreamkit.store.atomic import write_atomically
from dreamkit.store.dreams import DreamStore
from dreamkit.store.lock import RunInUse
from dreamkit.store.run_directory import RECIPE, RunDirectory, read_report
from dreamkit.store.shard import read_header
from dreamkit.types import RunFailed, RunFinished, Tracker

ROOT = Path(__file__).parents[1]
DISTILL = ROOT / "recipes" / "digits" / "distill.yaml"
RUN = [sys.executable, "-m", "dreamkit", "run"]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "200"}

# Adaptive, so that dreaming and training take turns; seconds long, so that there is time to kill.
ADAPTIVE = [str(DISTILL), "--preset", "adaptive", "--set", "evaluation=null", "--set"]
ADAPTIVE += ["synthesis={images: 128, batch_size: 16, stages: [{steps: 30}]}", "--set"]
ADAPTIVE += ["application.training={steps: 160, batch_size: 32, warmup: 0}", "--set"]
ADAPTIVE += ["application.adaptive={every: 20}"]


def start(folder: Path, recipe: list[str] | None = None) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [*RUN, *(recipe or ADAPTIVE), "--out", str(folder)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=ENVIRONMENT,
    )


def wait_for(path: Path, seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not path.exists():
        assert time.monotonic() < end, f"{path} did not come"
        time.sleep(0.01)


def kept(folder: Path) -> dict[str, object]:
    """Return what a run came to, byte for byte, but for the seconds that dreams took."""
    found: dict[str, object] = {}
    for path in folder.glob("**/dreams/shard-*.safetensors"):
        header = read_header(path)
        assert header is not None
        assert hash_state(load_file(path)) == header.sha256
        found[str(path.relative_to(folder))] = replace(header, seconds=0.0)
    for path in folder.glob("**/student/*.safetensors"):
        found[str(path.relative_to(folder))] = path.read_bytes()
    return found


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, object]:
    folder = tmp_path_factory.mktemp("undisturbed") / "run"
    process = start(folder)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    found = kept(folder)
    assert len(found) == 9
    return found


# --- stopped ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "number", [pytest.param(signal.SIGINT, marks=pytest.mark.slow), signal.SIGTERM]
)
def test_a_signal_ends_a_run_that_goes_on_to_the_same_student(tmp_path, undisturbed, number):
    folder = tmp_path / "run"
    process = start(folder)
    wait_for(folder / "dreams" / "shard-000003.safetensors")
    process.send_signal(number)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 128 + number
    assert "stopping after this step" in err
    assert f"go on with\n  dreamkit run {DISTILL} --preset adaptive" in err
    assert "Traceback" not in err
    assert (folder / "checkpoints").is_dir()
    process = start(folder)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    assert "going on from step" in out
    assert kept(folder) == undisturbed


def test_a_second_signal_ends_it_at_once(monkeypatch, capsys):
    stop = Stop()
    before = signal.getsignal(signal.SIGTERM)
    with stop.listening():
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.asked()
        os.kill(os.getpid(), signal.SIGTERM)  # the same one, passed on twice
        monkeypatch.setattr(stopping, "TWICE_SECONDS", -1.0)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert stop.status == 143
    assert capsys.readouterr().err.count("stopping after this step") == 1
    assert signal.getsignal(signal.SIGTERM) == before


def test_a_finished_run_does_nothing(tmp_path, invoke, tiny, recipe_file):
    file = recipe_file(tiny)
    assert invoke("run", file, "--out", tmp_path / "run")[0] == 0
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*")}
    code, out, _ = invoke("run", file, "--out", tmp_path / "run")
    assert code == 0
    assert "already holds this recipe's finished run" in out
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*")} == before


# --- killed -----------------------------------------------------------------------------------


def kill_and_go_on(folder: Path, after: float) -> str:
    """Kill a run some seconds after it began to write, and let it end; return what it said."""
    process = start(folder)
    wait_for(folder / "log.jsonl")
    time.sleep(after)
    process.kill()
    process.communicate()
    assert process.returncode in {0, -signal.SIGKILL}
    process = start(folder)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    return out


@pytest.mark.slow
def test_a_killed_run_ends_the_same(tmp_path, undisturbed):
    out = kill_and_go_on(tmp_path / "run", 1.5)
    assert "which ended without finishing" in out
    assert kept(tmp_path / "run") == undisturbed


@pytest.mark.slow
def test_thirty_kills_at_random_moments(tmp_path, undisturbed):
    draw = random.Random(0)
    process, begun = start(tmp_path / "timed"), time.monotonic()
    wait_for(tmp_path / "timed" / "log.jsonl")
    begun = time.monotonic()
    process.communicate(timeout=120)
    whole = time.monotonic() - begun
    recovered = 0
    for number in range(30):
        folder = tmp_path / str(number)
        kill_and_go_on(folder, draw.uniform(0, whole))
        assert kept(folder) == undisturbed, f"kill {number}"
        recovered += 1
    assert recovered == 30


# --- started twice ----------------------------------------------------------------------------


HOLD = """
import sys, time
from dataclasses import replace
from pathlib import Path
from dreamkit.store.lock import RunLock
lock = RunLock(Path(sys.argv[1]))
lock.acquire()
print("held", flush=True)
time.sleep(600)
"""


def test_two_processes_in_one_folder(tmp_path, invoke, tiny, recipe_file):
    folder, file = tmp_path / "run", recipe_file(tiny)
    folder.mkdir()
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(folder)], stdout=subprocess.PIPE, text=True
    )
    try:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        code, _, err = invoke("run", file, "--out", folder)
        assert code == 2
        assert f"is in use by process {holder.pid} on {os.uname().nodename}" in err
        assert not (folder / "recipe.resolved.yaml").exists()
    finally:
        holder.kill()
        holder.communicate()
    assert (folder / ".owner.json").is_file()  # a stale lock
    code, _, err = invoke("run", file, "--out", folder)
    assert code == 0, err
    assert not (folder / ".owner.json").exists()
    assert invoke("run", file, "--out", folder)[0] == 0


# --- no room ----------------------------------------------------------------------------------


@pytest.fixture
def small_disk(tmp_path):
    """Mount a disk of 256 kB; return it and what makes it larger."""
    disk = tmp_path / "disk"
    disk.mkdir()

    def mount(*options: str) -> subprocess.CompletedProcess[bytes]:
        return subprocess.run(
            ["mount", "-t", "tmpfs", "-o", *options, "tmpfs", str(disk)],
            capture_output=True,
            check=False,
        )

    if mount("size=256k").returncode:
        pytest.skip("mounting a small disk is not permitted here")
    try:
        yield disk, lambda: mount("remount,size=64m")
    finally:
        subprocess.run(["umount", str(disk)], check=False)


def test_a_full_disk(small_disk, invoke, tiny, recipe_file, tmp_path):
    disk, enlarge = small_disk
    tiny["synthesis"] |= {"images": 400 * 12, "batch_size": 400}  # 37 kB a batch
    file = recipe_file(tiny)
    assert invoke("run", file, "--out", tmp_path / "whole")[0] == 0
    code, _, err = invoke("run", file, "--out", disk / "run")
    assert code == 2
    assert "No space left on device" in err
    assert "what was finished is kept" in err
    assert "Traceback" not in err
    finished = kept(disk / "run")
    assert 0 < len(finished) < 12
    assert not list((disk / "run").rglob("*.tmp"))
    enlarge()
    code, out, err = invoke("run", file, "--out", disk / "run")
    assert code == 0, err
    assert f"{len(finished)} of 12 batches kept" in out
    assert kept(disk / "run") == kept(tmp_path / "whole")


def test_a_training_outlasts_a_failure_where_nothing_is_dreamed(
    tmp_path, invoke, tiny, recipe_file, monkeypatch
):
    def full(*arguments, **named):
        raise RunDirectoryError("no room")

    tiny["application"] = {
        "name": "distill",
        "student": {"source": "bundled", "model": "digits_resnet8"},
        "images": {"source": "digits"},
        "training": {"steps": 2, "batch_size": 8, "warmup": 0},
    }
    run = ("run", recipe_file(tiny), "--out", tmp_path / "run")
    with monkeypatch.context() as patched:
        patched.setattr(runner, "save_student", full)
        assert invoke(*run)[::2] == (2, "error: no room\n")
    code, out, err = invoke(*run)
    assert code == 0, err
    assert "going on from step 2 of 2" in out


class Told(Tracker):
    """Notes what it is called for, and what a listener beside it hears."""

    def __init__(self):
        self.calls = []

    def start(self, folder, recipe, resumed):
        self.calls.append("start")

    def record(self, stage, step, numbers): ...

    def finish(self, metrics):
        self.calls.append("finish")

    def close(self):
        self.calls.append("close")

    def hear(self, event):
        if isinstance(event, RunFailed | RunFinished):
            self.calls.append(type(event).__name__)


@pytest.fixture
def told(tiny, recipe_file):
    """Return a recipe and its tracker."""
    loaded = read_recipe(recipe_file(tiny), build_registries)
    tracker = Told()
    loaded.registries.listeners.append(("a test", tracker.hear))
    return replace(loaded, recipe=replace(loaded.recipe, trackers=(tracker,))), tracker


@pytest.mark.parametrize("place", ["_prepare", "claim", "_keep"])
def test_trackers_are_closed_on_every_way_out(told, tmp_path, monkeypatch, place):
    loaded, tracker = told

    def fail(*arguments):
        raise RunInUse("no")

    monkeypatch.setattr(RunDirectory if place == "claim" else runner, place, fail)
    with pytest.raises(RunDirectoryError, match="no"):
        runner.run(loaded, tmp_path / "run", Console(quiet=True))
    begun = place == "_keep"
    assert tracker.calls == (["start", "RunFailed", "close"] if begun else ["close"])
    assert (tmp_path / "run").exists() == begun  # its dreams stay


def test_a_folder_that_another_process_holds_is_not_withdrawn(told, tmp_path):
    loaded, _ = told
    holder = RunDirectory(tmp_path / "run", loaded.resolved_yaml())
    holder.claim()
    with pytest.raises(RunInUse):
        runner.run(loaded, tmp_path / "run", Console(quiet=True))
    assert (tmp_path / "run" / RECIPE).is_file()
    holder.release()


def test_what_fails_after_the_report_is_no_failure_of_the_run(told, tmp_path, monkeypatch):
    loaded, tracker = told

    def fail(*arguments):
        raise DreamkitError("the console is gone")

    monkeypatch.setattr(runner, "show", fail)
    with pytest.raises(DreamkitError, match="the console is gone"):
        runner.run(loaded, tmp_path / "run", Console(quiet=True))
    assert tracker.calls == ["start", "finish", "RunFinished", "close"]
    assert read_report(tmp_path / "run")["name"] == "tiny"


def test_a_folder_that_vanishes(tmp_path, invoke, tiny, recipe_file, monkeypatch):
    tiny["synthesis"]["images"] = 12
    file, folder = recipe_file(tiny), tmp_path / "run"
    real, written = DreamStore.write, []

    def write(self, *arguments, **named):
        real(self, *arguments, **named)
        written.append(1)
        if len(written) == 2:
            shutil.rmtree(folder)

    with monkeypatch.context() as patched:
        patched.setattr(DreamStore, "write", write)
        code, _, err = invoke("run", file, "--out", folder)
    assert code in {0, 2}
    assert "Traceback" not in err
    if code == 2:
        assert str(folder) in err
    shutil.rmtree(folder, ignore_errors=True)
    assert invoke("run", file, "--out", folder)[0] == 0


# --- over time --------------------------------------------------------------------------------


def resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1])


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/statm").is_file(), reason="memory is read off /proc")
@pytest.mark.parametrize("adaptive", [False, True])
def test_memory_stays_flat(tmp_path, invoke, recipe_file, monkeypatch, adaptive):
    recipe = yaml.safe_load(DISTILL.read_text())
    del recipe["presets"]
    recipe |= {"evaluation": None}
    recipe["synthesis"] |= {"images": 200 * 16, "batch_size": 16, "stages": [{"steps": 4}]}
    recipe["application"]["training"] = {"steps": 210, "batch_size": 32}
    if adaptive:
        recipe["synthesis"]["regularizers"] = {"bn_feature": 30, "js_compete": 1}
        recipe["application"]["adaptive"] = {"every": 10, "batches": 10}
    file, seen, real = recipe_file(recipe), [], DreamStore.write
    invoke("run", file, "--set", "synthesis.images=32", "--out", tmp_path / "warm-up")
    threads, handles = threading.active_count(), len(os.listdir("/proc/self/fd"))

    def write(self, *arguments, **named):
        real(self, *arguments, **named)
        gc.collect()
        seen.append(resident())

    monkeypatch.setattr(DreamStore, "write", write)
    code, _, err = invoke("run", file, "--out", tmp_path / "run")
    assert code == 0, err
    assert len(seen) == 200
    settled = seen[40]
    assert max(seen[40:]) <= 1.05 * settled
    gc.collect()
    assert threading.active_count() == threads
    assert len(os.listdir("/proc/self/fd")) <= handles


# --- damaged ----------------------------------------------------------------------------------


def flip_a_bit(path: Path) -> None:
    blob = bytearray(path.read_bytes())
    blob[-3] ^= 1
    path.write_bytes(blob)


def unfinished(folder: Path) -> None:
    (folder / "report.json").unlink()


@pytest.fixture
def done(tmp_path, invoke, tiny, recipe_file):
    """Return a finished run of three batches, and the recipe's file."""
    tiny["synthesis"]["images"] = 12
    file = recipe_file(tiny)
    assert invoke("run", file, "--out", tmp_path / "run")[0] == 0
    return tmp_path / "run", file


def test_a_damaged_shard_is_dreamed_again(done, invoke):
    folder, file = done
    before = kept(folder)
    flip_a_bit(folder / "dreams" / "shard-000001.safetensors")
    code, out, _ = invoke("verify", folder)
    assert code == 1
    assert "shard-000001.safetensors" in out
    assert "it is not what its header tells" in out
    unfinished(folder)
    code, out, err = invoke("run", file, "--out", folder)
    assert code == 0, err
    assert "shard-000001.safetensors is damaged: it is set aside" in out
    assert kept(folder) == before
    assert invoke("verify", folder)[0] == 0


def test_a_shard_cut_short_is_dreamed_again(done, invoke):
    folder, file = done
    before = kept(folder)
    path = folder / "dreams" / "shard-000001.safetensors"
    path.write_bytes(path.read_bytes()[:100])
    assert invoke("verify", folder)[0] == 1
    unfinished(folder)
    code, out, err = invoke("run", file, "--out", folder)
    assert code == 0, err
    assert "2 of 3 batches kept" in out
    assert kept(folder) == before


def test_verify_reads_everything(tmp_path, invoke):
    folder = tmp_path / "run"
    small = ["--preset", "smoke"]
    assert invoke("run", DISTILL, *small, "--out", folder)[0] == 0
    code, out, _ = invoke("verify", folder)
    assert code == 0
    for what in ("of dreams", "a student", "the report"):
        assert what in out
    flip_a_bit(folder / "student" / "model.safetensors")
    code, out, _ = invoke("verify", folder)
    assert code == 1
    assert "1 damaged" in out


def test_verify_of_a_checkpoint(tmp_path, invoke, undisturbed):
    folder = tmp_path / "run"
    process = start(folder)
    wait_for(folder / "dreams" / "shard-000002.safetensors")
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)
    code, out, _ = invoke("verify", folder)
    assert code == 0
    assert "a checkpoint" in out
    flip_a_bit(next((folder / "checkpoints").iterdir()))
    assert invoke("verify", folder)[0] == 1
    code, _, err = invoke("run", *ADAPTIVE, "--out", folder)
    assert code == 2
    assert "delete it" in err


def test_no_run_to_verify(tmp_path, invoke):
    code, _, err = invoke("verify", tmp_path)
    assert code == 2
    assert "holds no run" in err


def test_the_owner_file_is_json(tmp_path):
    from dreamkit.store.lock import OWNER, RunLock

    lock = RunLock(tmp_path)
    assert lock.acquire() is None
    told = json.loads((tmp_path / OWNER).read_text())
    assert told == {"host": os.uname().nodename, "pid": os.getpid()}
    lock.release()
    assert not (tmp_path / OWNER).exists()


def test_a_picture_that_cannot_be_written_is_noted_in_the_end_too(
    invoke, recipe_file, tiny, tmp_path, monkeypatch
):
    out = tmp_path / "out"

    def full(path, content):
        if path.name == "dreams.png":
            raise RunDirectoryError(f"{path} cannot be written: no space left")
        write_atomically(path, content)

    monkeypatch.setattr(progress_picture, "write_atomically", full)
    monkeypatch.setattr(run_report, "write_atomically", full)
    code, _, err = invoke("run", recipe_file(tiny), "--out", out)
    assert code == 0, err
    assert not (out / "dreams.png").exists()
    notes = [note for note in read_report(out)["notes"] if "no space left" in note]
    assert [note.partition(":")[0] for note in notes] == [
        "no more pictures of the dreams so far",
        "the picture of the dreams is in the report alone",
    ]
    assert "data:image/png" in (out / "report.html").read_text()
