"""Every built-in application as a plain function: what it returns, and what it leaves alone."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import nn

from dreamkit.applications.continual import Continual
from dreamkit.applications.distill import Distill
from dreamkit.applications.judge import Judge
from dreamkit.applications.prune import Prune
from dreamkit.applications.recover import Recover
from dreamkit.applications.synthesize import Synthesize
from dreamkit.criteria.latency_lut import LatencyLUT
from dreamkit.criteria.magnitude import Magnitude
from dreamkit.criteria.taylor import Taylor
from dreamkit.errors import DreamkitError
from dreamkit.plugins import build_registries
from dreamkit.pruning.knapsack import Knapsack
from dreamkit.pruning.selection import Limits
from dreamkit.registry import Term
from dreamkit.regularizers.bn_feature import BNFeature
from dreamkit.regularizers.js_compete import JSCompete
from dreamkit.stages.adaptive import Adaptive
from dreamkit.stages.budget import Target
from dreamkit.stages.course import NewClasses
from dreamkit.stages.measuring import measure_costs
from dreamkit.stages.reconstructing import Reconstruction
from dreamkit.stages.teaching import Recovery
from dreamkit.synthesizers.deepinversion import DeepInversion, Stage
from dreamkit.synthesizers.engine import Engine
from dreamkit.training.distillation import Distillation
from dreamkit.training.incremental import IncrementalTraining
from dreamkit.types import (
    LatencyBackend,
    Outcome,
    RoundPruned,
    StoredImages,
    Synthesis,
    Teacher,
    Timing,
)

SHORT = {"steps": 4, "batch_size": 4, "precision": "float32"}
ADAPTIVE = Adaptive(every=1)


@dataclasses.dataclass(frozen=True)
class Given:
    """A source of a network that is there already."""

    network: Teacher

    def load(self, seed):
        return self.network


@dataclasses.dataclass(frozen=True)
class Held:
    """A source of images of two classes that are there already."""

    images: StoredImages

    def class_names(self):
        return ("a", "b")

    def open(self, card):
        return self.images


class Counting(LatencyBackend):
    """A latency target on which everything takes a microsecond a weight; counts what it times."""

    batch_size = 1

    def __init__(self):
        self.timed = 0

    def describe(self):
        return {"device": "counting"}

    def time(self, modules):
        self.timed += len(modules)
        sizes = [sum(p.numel() for p in module.parameters()) for module, _ in modules]
        return [Timing(1e-3 * size, 0.0) for size in sizes]


def synthesis(adaptive=False):
    """Return eight dreams in two batches, that compete with a student where that is wanted."""
    regularizers = [Term("bn_feature", 1.0, BNFeature())]
    regularizers += [Term("js_compete", 1.0, JSCompete())] if adaptive else []
    dreamer = DeepInversion(
        regularizers=tuple(regularizers),
        images=8,
        batch_size=4,
        stages=(Stage(2),),
        engine=Engine(precision="float32", compile=False),
    )
    return Synthesis(dreamer, {"name": "deepinversion", "images": 8})


def pruning(**changes):
    known = {
        "criteria": (Term("magnitude", 1.0, Magnitude()), Term("taylor", 1.0, Taylor())),
        "target": Target(params=0.7),
        "recovery": Recovery(**SHORT),
        "limits": Limits(min_channels=1),
        "step": 0.2,
        "ranking_batches": 1,
        "batch_size": 8,
        "statistics_batches": 1,
    }
    return Prune(**(known | changes))


def applications(toys, adaptive=None):
    """Return every application by name, with options for toys."""
    rival = toys.teacher(toys.residual(), toys.card(name="rival", weights_sha256="def"))
    new = NewClasses(Held(toys.images(6, classes=2)), Held(toys.images(4, classes=2)))
    shared = {} if adaptive is None else {"adaptive": adaptive}
    fit = Reconstruction(images=8, batch_size=4)
    tuned = Recovery(**SHORT)
    alone = {"synthesize": Synthesize(), "judge": Judge(verifiers=(Given(rival),), splits=2)}
    return ({} if adaptive else alone) | {
        "distill": Distill(student=Given(rival), training=Distillation(**SHORT), **shared),
        "prune": pruning(reconstruction=fit, reconstruct_each=True, finetune=tuned, **shared),
        "recover": Recover(0.5, rounds=2, training=tuned, reconstruction=fit, **shared),
        "continual": Continual(
            (new,), training=IncrementalTraining(**SHORT), images_per_class=3, **shared
        ),
    }


NAMES = ("synthesize", "distill", "prune", "recover", "continual", "judge")
STUDENTS = ("distill", "prune", "recover", "continual")
CASES = [
    *((name, "dreams") for name in NAMES),
    *((name, "images") for name in NAMES),
    *((name, "adaptive") for name in STUDENTS),
]


@pytest.fixture
def teacher(toys):
    """A teacher whose owner has hooks on it, a layer frozen, and gradients."""
    model = toys.two_bn()
    model.bn1.register_forward_hook(lambda module, inputs, output: None)
    model(torch.zeros(1, 3, 8, 8)).sum().backward()
    model.conv2.weight.requires_grad_(False)
    return toys.teacher(model, toys.card(weights_sha256="abc", class_names=("x", "y", "z")))


def given(toys, name, kind):
    """Return an application, and images, dreams to come, or dreams against its student."""
    adaptive = ADAPTIVE if kind == "adaptive" else None
    images = toys.images(12) if kind == "images" else synthesis(kind == "adaptive")
    return applications(toys, adaptive)[name], images


def test_every_built_in_application_is_called_here(toys):
    found = set(build_registries()["applications"])
    # Writing INT8 files takes a runtime, and tests of its own (test_quantizing).
    assert set(NAMES) == set(applications(toys)) == found - {"quantize"}


@pytest.mark.parametrize(("name", "kind"), CASES)
def test_an_application_leaves_all_but_its_folder_and_log_alone(
    toys, teacher, tmp_path, capsys, name, kind
):
    context = toys.context(tmp_path / "run", evaluation=toys.images(6))  # that times nothing
    before, facts = toys.state(teacher.model), dataclasses.asdict(teacher.card)
    application, images = given(toys, name, kind)
    random = torch.get_rng_state()
    outcome = application.run(teacher, images, context)
    toys.assert_same_state(teacher.model, before)
    assert dataclasses.asdict(teacher.card) == facts
    assert torch.equal(torch.get_rng_state(), random)
    assert torch.is_grad_enabled()
    assert capsys.readouterr() == ("", "")
    assert [path.name for path in tmp_path.iterdir()] in ([], ["run"])
    assert not (tmp_path / "run" / "student").exists(), "that is for the caller to save"
    assert isinstance(outcome, Outcome)
    assert "teacher.accuracy" in context.log.metrics
    assert not [key for key in context.log.metrics if "latency" in key]


@pytest.mark.parametrize(("name", "kind"), CASES)
def test_an_outcome_is_a_function_of_the_arguments(toys, teacher, tmp_path, name, kind):
    found = []
    for number in range(2):
        application, images = given(toys, name, kind)
        with torch.random.fork_rng():
            torch.manual_seed(number)
            context = toys.context(tmp_path / str(number))
            found.append(application.run(teacher, images, context))
    first, second = found
    if name not in STUDENTS:
        assert first.student is None
    else:
        student = first.student
        toys.assert_same_tensors(student.model, second.student.model)
        assert not any(module.training for module in student.model.modules())
        assert all(parameter.requires_grad for parameter in student.model.parameters())
        theirs = {tensor.data_ptr() for tensor in teacher.model.state_dict().values()}
        mine = {tensor.data_ptr() for tensor in student.model.state_dict().values()}
        assert not theirs & mine, "it shares no memory with the teacher"
        assert student.card.weights_sha256 is None
        assert student.card.num_classes == (5 if name == "continual" else 3)
    if name == "continual":
        return  # it has images of its own in each of its steps
    assert len(first.images) == (12 if kind == "images" else 8)
    every = range(len(first.images))
    assert torch.equal(first.images.batch(every)[0], second.images.batch(every)[0])


@pytest.mark.parametrize("name", NAMES)
def test_without_images_there_is_nothing_to_work_on(toys, teacher, tmp_path, name):
    application = applications(toys)[name]
    with pytest.raises(DreamkitError, match="needs a synthesizer"):
        application.run(teacher, None, toys.context(tmp_path))
    assert application.needs_synthesis


@pytest.mark.parametrize("name", STUDENTS)
def test_dreams_against_a_student_take_the_place_of_images(toys, teacher, tmp_path, name):
    application = applications(toys, ADAPTIVE)[name]
    with pytest.raises(DreamkitError, match="leave 'images' out"):
        application.run(teacher, toys.images(12), toys.context(tmp_path))


# --- latency ----------------------------------------------------------------------------------


LATENCY_LUT = (Term("magnitude", 1.0, Magnitude()), Term("latency_lut", 1.0, LatencyLUT()))


@pytest.mark.parametrize(
    ("asked", "reported"),
    [
        ({"criteria": LATENCY_LUT}, False),
        ({"target": Target(latency=0.7)}, True),
        ({"target": Target(latency_ms=0.25)}, True),
        ({"target": Target(latency=0.7), "selection": Knapsack()}, True),
    ],
)
def test_latency_is_measured_for_a_criterion_or_a_goal(toys, teacher, tmp_path, asked, reported):
    backend = Counting()
    context = toys.context(tmp_path, latency=backend)
    before, random = toys.state(teacher.model), torch.get_rng_state()
    pruning(**asked).run(teacher, toys.images(12), context)
    toys.assert_same_state(teacher.model, before)
    assert torch.equal(torch.get_rng_state(), random)
    assert backend.timed > 0
    assert (tmp_path / "latency_lut.json").is_file()
    assert ("student.latency_ms" in context.log.metrics) == reported
    assert all("latency_ms" in numbers for numbers in context.log.records["pruning"].values())


@pytest.mark.parametrize(
    "changes",
    [{"target": Target(**{goal: 0.7})} for goal in ("flops", "params", "channels")]
    + [{"selection": Knapsack()}],
)
def test_no_latency_is_measured_for_other_goals(toys, teacher, tmp_path, changes):
    context = toys.context(tmp_path)  # that fails if anything is timed
    pruning(**changes).run(teacher, toys.images(12), context)
    assert not (tmp_path / "latency_lut.json").exists()
    assert not any("latency_ms" in numbers for numbers in context.log.records["pruning"].values())


def test_costs_are_measured_by_the_caller(toys, teacher, tmp_path):
    backend = Counting()
    context = toys.context(tmp_path, latency=backend)
    outcome = pruning().run(teacher, toys.images(12), context)
    metrics = context.log.metrics
    assert not {"teacher.params", "student.flops", "pruned.latency_ms"} & metrics.keys()
    measure_costs(outcome, teacher, context, latency=False)
    parameters = sum(p.numel() for p in outcome.student.model.parameters())
    assert metrics["pruned.params"] == metrics["student.params"] == parameters
    assert backend.timed == 0
    measure_costs(outcome, teacher, context, latency=True)
    assert backend.timed == 4, "teacher and student, each twice"
    assert metrics["pruned.latency_ms"] == metrics["student.latency_ms"] == 1e-3 * parameters
    measure_costs(outcome, teacher, context, latency=True)
    assert backend.timed == 4, "it knows already"
    measure_costs(Outcome(), teacher, context, latency=True)
    assert backend.timed == 4, "there is no student"


class Eights(Counting):
    """Its kernels like multiples of eight channels."""

    channel_multiple = 8

    def remark(self, model, example):
        return f"{type(model).__name__} on {tuple(example.shape)}"


def test_pruning_keeps_the_multiple_that_the_target_likes(toys, tmp_path):
    wide = nn.Sequential(
        *(nn.Conv2d(3, 32, 3), nn.BatchNorm2d(32), nn.ReLU(), nn.Conv2d(32, 12, 1), nn.ReLU()),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(12, 3)),
    )
    context, teacher = toys.context(tmp_path, latency=Eights()), toys.teacher(wide)
    outcome = pruning(target=Target(channels=0.75)).run(teacher, toys.images(12), context)
    student = outcome.student.model
    left = (student[0].out_channels, student[3].out_channels)
    assert left[0] % 8 == left[1] % 2 == 0
    assert sum(left) <= 33
    assert sum("multiples of 8" in note for note in context.log.notes) == 1
    measure_costs(outcome, teacher, context, latency=True)
    assert context.log.notes[-1] == "Sequential on (1, 3, 8, 8)"
    of_ones = toys.context(tmp_path / "ones", latency=Eights())
    pruning(limits=Limits(chunk=1)).run(teacher, toys.images(12), of_ones)
    assert not any("multiples" in note for note in of_ones.log.notes)


@pytest.mark.parametrize("fit", [None, Reconstruction(images=8, batch_size=4)], ids=repr)
def test_recovery_tells_of_every_round(toys, teacher, tmp_path, fit):
    context, heard = toys.context(tmp_path), []
    context.log.listen(heard.append)
    rounds = 1 if fit is None else 2
    Recover(0.5, rounds=rounds, training=Recovery(**SHORT), reconstruction=fit).run(
        teacher, toys.images(12), context
    )
    told = {event.round: event.numbers for event in heard if isinstance(event, RoundPruned)}
    assert list(told) == list(range(1, rounds + 1))
    assert told == context.log.records["pruning"]
    assert told[rounds]["sparsity"] == pytest.approx(0.5, abs=0.01)
