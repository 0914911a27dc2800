"""Runs under torchrun: several ranks against one."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch._subclasses.fake_tensor import FakeTensorMode

import dreamkit
from dreamkit import distributed
from dreamkit.store.dreams import DreamStore
from dreamkit.store.shard import Header

ROOT = Path(__file__).parents[1]
DISTILL = ROOT / "recipes" / "digits" / "distill.yaml"
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "200"}
SMALL = ["--set", "synthesis={images: 120, batch_size: 16, stages: [{steps: 20}]}", "--set"]
SMALL += ["application.training={steps: 60, batch_size: 33, evaluate_every: 30}"]


def run(ranks: int, folder: Path, *changes: str, recipe: Path = DISTILL) -> subprocess.Popen[str]:
    start = [*TORCHRUN, str(ranks), "-m", "dreamkit", "run"]
    return subprocess.Popen(
        [*start, str(recipe), *changes, "--out", str(folder)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=ENVIRONMENT,
    )


def finished(process: subprocess.Popen[str]) -> str:
    out, err = process.communicate(timeout=180)
    assert process.returncode == 0, err
    return out


def dreams(folder: Path) -> dict[int, Header]:
    """Return what a run dreamed; its tensors have the SHA-256 that their header tells."""
    store = DreamStore(folder / "dreams")
    assert store.damaged() == []
    return {index: replace(header, seconds=0.0) for index, header in store.shards.items()}


def report(folder: Path) -> dict:
    return json.loads((folder / "report.json").read_text())


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return what one rank comes to."""
    folder = tmp_path_factory.mktemp("one") / "run"
    finished(run(1, folder, *SMALL))
    return folder


def test_two_ranks_dream_what_one_does(tmp_path, one):
    folder = tmp_path / "run"
    out = finished(run(2, folder, *SMALL))
    assert "on 2 ranks, the first on cpu" in out
    assert out.count("│ student") == 1  # one of them speaks
    assert dreams(folder) == dreams(one)
    assert len(dreams(folder)) == 8
    assert all(header.seconds > 0 for header in DreamStore(folder / "dreams").shards.values())
    found, expected = report(folder)["metrics"], report(one)["metrics"]
    assert found["synthesis.images"] == 120
    assert found["teacher.accuracy"] == expected["teacher.accuracy"]
    assert abs(found["student.accuracy"] - expected["student.accuracy"]) < 0.15
    assert dreamkit.load_student(folder / "student", allow_builder=True).card.num_classes == 10
    assert len((folder / "log.jsonl").read_text().splitlines()) == len(
        (one / "log.jsonl").read_text().splitlines()
    )
    # Given again, with any number of ranks, it does nothing.
    assert "already holds this recipe's finished run" in finished(run(1, folder, *SMALL))


@pytest.mark.slow
def test_a_dry_run_on_ranks_speaks_once_and_writes_nothing(tmp_path):
    out = finished(run(2, tmp_path / "run", *SMALL, "--dry-run"))
    assert out.count("dreaming 120 images in 8 batches") == 1
    assert out.count("nothing was written") == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_ranks_dream_against_one_student(tmp_path):
    folder = tmp_path / "run"
    adaptive = [
        "--preset",
        "adaptive",
        *SMALL,
        "--set",
        "application.adaptive={every: 15, batches: 2}",
    ]
    finished(run(2, folder, *adaptive))
    assert len(DreamStore(folder / "dreams")) == 120
    pools = [
        json.loads(line)
        for line in (folder / "log.jsonl").read_text().splitlines()
        if '"stage": "pool"' in line
    ]
    assert [p["numbers"]["images"] for p in pools] == [32, 64, 96, 120]
    assert report(folder)["metrics"]["training.steps"] == 60


SLOW = "{name: deepinversion, images: 40, batch_size: 8, stages: [{steps: 10}]}"
CONTRASTED = "{name: cmi, images: 24, batch_size: 12, steps: 2, width: 8, regularizers: [tv]}"


@pytest.mark.slow
@pytest.mark.parametrize("listed", [[SLOW, SLOW], [SLOW, CONTRASTED]])
def test_several_synthesizers_dream_on_ranks_what_they_do_on_one(tmp_path, listed):
    found = []
    for ranks in (1, 2):
        folder = tmp_path / f"{ranks}"
        finished(run(ranks, folder, *SMALL, "--set", f"synthesis=[{', '.join(listed)}]"))
        found.append(dreams(folder))
    assert found[0] == found[1]
    assert len(found[0]) == (10 if listed[1] == SLOW else 7)


@pytest.mark.slow
def test_dreams_against_a_student_do_not_depend_on_who_makes_them(tmp_path):
    adaptive = ["--preset", "adaptive", *SMALL, "--set", "application.adaptive={batches: 3}"]
    found = []
    for name in ("first", "second"):
        finished(run(2, tmp_path / name, *adaptive, "--set", "application.adaptive.every=20"))
        found.append(dreams(tmp_path / name))
    assert found[0] == found[1]
    assert len(found[0]) == 8


@pytest.mark.slow
@pytest.mark.parametrize(
    ("recipe", "changes"),
    [
        (
            "quickstart",
            [
                "application.recovery.epochs=2",
                "application.step=0.2",
                "application.sensitivity={images: 16}",
            ],
        ),
        ("digits/continual", ["application.training.epochs=2", "application.images_per_class=20"]),
    ],
)
def test_every_application_runs_on_ranks(tmp_path, recipe, changes):
    folder = tmp_path / "run"
    small = ["synthesis.stages=[{steps: 10}]", *changes]
    given = [part for change in small for part in ("--set", change)]
    finished(run(2, folder, *given, recipe=ROOT / "recipes" / f"{recipe}.yaml"))
    found = report(folder)["metrics"]
    assert 0 <= found["student.accuracy"] <= 1
    student = dreamkit.load_student(folder / "student")
    assert student.card.num_classes == 10
    # Done by one rank or shared, but once: every stage counts its steps upwards.
    records = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    steps = [(r["stage"], r["step"]) for r in records if "step" in r]
    assert len(steps) == len(set(steps)) > 0


@pytest.mark.slow
def test_a_killed_rank_ends_the_rest_and_nothing_is_lost(tmp_path, one):
    folder = tmp_path / "run"
    slow = [*SMALL, "--set", "synthesis.stages=[{steps: 20}]"]
    process = run(2, folder, *slow)
    end = time.monotonic() + 60
    while not (folder / "dreams" / "shard-000001.safetensors").exists():
        assert time.monotonic() < end
        time.sleep(0.005)
    workers = subprocess.run(
        ["pgrep", "-P", str(process.pid)], capture_output=True, text=True, check=True
    ).stdout.split()
    os.kill(int(workers[-1]), signal.SIGKILL)
    process.communicate(timeout=60)
    assert process.returncode != 0
    out = finished(run(2, folder, *slow))
    assert "batches kept" in out or "already holds" in out
    assert dreams(folder) == dreams(one)


@pytest.mark.slow
def test_batches_that_are_too_small_for_the_ranks(tmp_path):
    small = [*SMALL, "--set", "application.training.batch_size=3"]
    process = run(2, tmp_path / "run", *small)
    _, err = process.communicate(timeout=120)
    assert process.returncode != 0
    assert "3 images in a batch leave 2 ranks less than two each" in err


def test_without_torchrun_there_is_one_rank():
    with distributed.ranks():
        assert (distributed.rank(), distributed.size()) == (0, 1)
        assert distributed.is_first()
        assert distributed.broadcast("a") == "a"
        assert distributed.gather("a") == ["a"]
        assert distributed.anywhere(True)
        assert not distributed.anywhere(False)
        assert list(distributed.drawn_from([3, 1], "q")) == [3, 1]
        distributed.barrier()
        with distributed.first_before_others():
            pass


RESTARTED = """
import os
from dreamkit import distributed

with distributed.ranks():
    mine = []
    for item in distributed.drawn_from(range(6), "queue"):
        mine.append(item)
        if os.environ["TORCHELASTIC_RESTART_COUNT"] == "0" and distributed.rank() == 1:
            os._exit(3)
    every = sorted(item for part in distributed.gather(mine) for item in part)
    if distributed.is_first():
        print("shared out:", every)
"""


@pytest.mark.slow
def test_ranks_that_torchrun_starts_anew_begin_the_queue_anew(tmp_path):
    (tmp_path / "work.py").write_text(RESTARTED)
    command = [*TORCHRUN, "2", "--max-restarts", "1", str(tmp_path / "work.py")]
    environment = ENVIRONMENT | {"PYTHONPATH": str(ROOT)}
    found = subprocess.run(command, env=environment, text=True, capture_output=True, timeout=120)
    assert found.returncode == 0, found.stderr
    assert "shared out: [0, 1, 2, 3, 4, 5]" in found.stdout


def test_tensors_are_sent_from_the_cpu_and_come_to_the_ranks_own_device(monkeypatch):
    sent = []

    def broadcast(held, src, device):
        sent.extend(tensor.device.type for tensor in held[0].values())

    monkeypatch.setattr(distributed, "size", lambda: 2)
    monkeypatch.setattr(torch.distributed, "broadcast_object_list", broadcast)
    with FakeTensorMode():  # a GPU that need not be there
        masks = {"fc.weight": torch.ones(3, device="cuda")}
        found = distributed.broadcast_tensors(masks, torch.device("cuda"))
        assert found["fc.weight"].device.type == "cuda"
    assert sent == ["cpu"]


RECOVER = "application={name: recover, sparsity: 0.5, rounds: 2, reconstruction: {images: 64}, "
RECOVER += "training: {steps: 20, batch_size: 16}}"


@pytest.mark.slow
def test_recovery_on_ranks_prunes_what_one_rank_does(tmp_path):
    found = {}
    for ranks in (1, 2):
        folder = tmp_path / str(ranks)
        finished(run(ranks, folder, *SMALL[:2], "--set", RECOVER))
        masks = {
            name: weight != 0
            for name, weight in load_file(folder / "student" / "model.safetensors").items()
            if weight.dim() > 1
        }
        found[ranks] = report(folder)["metrics"], masks
    (first, kept), (second, kept_on_two) = found[1], found[2]
    for name in ("pruned.accuracy", "pruned.agreement", "student.sparsity"):
        assert second[name] == first[name], name
    assert 0.49 < second["student.sparsity"] < 0.51
    assert abs(second["student.accuracy"] - first["student.accuracy"]) < 0.1
    assert kept.keys() == kept_on_two.keys()
    assert all(torch.equal(kept[name], kept_on_two[name]) for name in kept)
