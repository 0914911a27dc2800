"""Each entry at work in a run, found as that of an installed distribution."""

from __future__ import annotations

import io
import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from rich.console import Console
from typer.testing import CliRunner

from dreamkit.cli import app
from dreamkit.plugin import BatchDreamed, Noted, RunFailed, RunFinished
from dreamkit.plugins import build_registries, with_commands
from dreamkit.recipe import read_recipe
from dreamkit.runner import run

DIGITS = {"source": "bundled", "model": "digits_resnet8"}
DREAMS = {"name": "sign_ascent", "images": 8, "batch_size": 4, "steps": 3}
TRAINING = {"steps": 2, "batch_size": 4, "precision": "float32"}


@pytest.fixture
def report(installed: str, tmp_path: Path):
    """Run a recipe in ``tmp_path / "run"`` and return its report."""

    def finished(**recipe: Any) -> dict[str, Any]:
        file = tmp_path / "recipe.yaml"
        whole = {"name": "example", "device": "cpu", "teacher": DIGITS, **recipe}
        file.write_text(yaml.safe_dump(whole, sort_keys=False))
        folder = run(
            read_recipe(file, build_registries), tmp_path / "run", Console(file=io.StringIO())
        )
        return json.loads((folder / "report.json").read_text())

    return finished


def test_the_synthesizer_dreams_the_tracker_keeps_track_and_events_are_heard(
    report, tmp_path, caplog
):
    recipe = {"synthesis": DREAMS, "application": {"name": "synthesize"}}
    with caplog.at_level(logging.INFO, "dreamkit_example"):
        found = report(**recipe, trackers=[{"name": "extremes"}])
    assert found["metrics"]["synthesis.images"] == 8
    ranges = json.loads((tmp_path / "run" / "extremes.json").read_text())
    low, high = ranges["synthesis.cross_entropy"]
    assert 0 < low <= high
    first, second, last = caplog.messages
    assert (first[:14], second[:14]) == ("batch 0: loss ", "batch 1: loss ")
    assert last == "example is finished"


def test_the_application_looks_at_the_source(report):
    images = {"source": "stripes", "images": 12}
    found = report(application={"name": "confidence", "images": images, "batch_size": 5})
    assert found["application"] == "confidence"
    assert 0.1 < found["metrics"]["teacher.confidence"] <= 1


def test_the_application_dreams_what_it_looks_at(report):
    found = report(
        synthesis={
            "name": "deepinversion",
            "images": 4,
            "batch_size": 4,
            "stages": [{"steps": 1}],
            "regularizers": ["tv"],
        },
        application="confidence",
    )
    assert 0.1 < found["metrics"]["teacher.confidence"] <= 1
    assert found["metrics"]["synthesis.images"] == 4


def test_the_distillation_loss_teaches_a_student_on_the_source(report, tmp_path):
    found = report(
        application={
            "name": "distill",
            "student": DIGITS,
            "images": {"source": "stripes", "images": 8},
            "training": {**TRAINING, "soft_loss": "mse"},
        }
    )
    assert 0 <= found["metrics"]["student.agreement"] <= 1
    assert (tmp_path / "run" / "student" / "model.safetensors").is_file()


def test_the_regularizer_and_the_criterion_prune(report):
    found = report(
        synthesis={
            "name": "deepinversion",
            "images": 4,
            "batch_size": 4,
            "stages": [{"steps": 2}],
            "regularizers": [{"name": "color_balance", "weight": 0.1, "power": 1}],
        },
        application={
            "name": "prune",
            "criteria": [{"name": "weight_std"}],
            "target": {"channels": 0.9},
            "recovery": TRAINING,
            "step": 0.1,
            "ranking_batches": 1,
            "statistics_batches": 1,
        },
    )
    assert found["metrics"]["pruned.channels_ratio"] <= 0.9


def test_the_loss_keeps_old_classes(report):
    pytest.importorskip("sklearn", reason="the digits are scikit-learn's")
    seven = {"name": "seven", "train": {"source": "digits", "split": "train", "classes": [7]}}
    found = report(
        teacher={"source": "bundled", "model": "digits7_resnet8"},
        synthesis=DREAMS,
        application={
            "name": "continual",
            "images_per_class": 2,
            "sets": [seven],
            "losses": [{"name": "logit_anchor"}, {"name": "cross_entropy"}],
            "training": {"epochs": 1, "batch_size": 64, "precision": "float32"},
        },
    )
    assert found["application"] == "continual"
    assert found["metrics"]["step1.training.steps"] > 0


def test_every_entry_has_the_distribution_as_its_provider(installed):
    registries = build_registries()
    own = {
        (kind, name)
        for kind, registry in registries.by_kind.items()
        for name in registry
        if registry.provider(name) == installed
    }
    assert registries.failures == []
    assert own == {
        ("regularizers", "color_balance"),
        ("synthesizers", "sign_ascent"),
        ("sources", "stripes"),
        ("criteria", "weight_std"),
        ("losses", "logit_anchor"),
        ("distillation_losses", "mse"),
        ("applications", "confidence"),
        ("trackers", "extremes"),
    }


def test_events_are_logged(installed, caplog):
    notes: list[str] = []
    events = build_registries().events(notes.append)
    images, labels = torch.zeros(1, 1, 8, 8, dtype=torch.uint8), torch.zeros(1, dtype=torch.int64)
    with caplog.at_level(logging.INFO, "dreamkit_example"):
        events.emit(BatchDreamed(index=2, images=images, labels=labels, loss=0.5))
        events.emit(Noted(text="nobody listens to this"))
        events.emit(RunFinished(report={"name": "mine"}))
        events.emit(RunFailed(error=KeyboardInterrupt()))
    assert caplog.messages == [
        "batch 2: loss 0.500",
        "mine is finished",
        "ended by KeyboardInterrupt",
    ]
    assert notes == []


def test_the_command_is_one_of_dreamkits(installed):
    whole, failures = with_commands(app)
    assert failures == []
    assert CliRunner().invoke(whole, ["example"]).output == "dreamkit-example: copy me\n"
