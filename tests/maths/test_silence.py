"""No network computes, and no layer is timed, but within a stage that people see."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from dreamkit.applications.distill import Distill
from dreamkit.applications.prune import Prune
from dreamkit.applications.recover import Recover
from dreamkit.applications.synthesize import Synthesize
from dreamkit.criteria.magnitude import Magnitude
from dreamkit.criteria.taylor import Taylor
from dreamkit.registry import Term
from dreamkit.regularizers.bn_feature import BNFeature
from dreamkit.report.run_log import MemoryLog
from dreamkit.stages.adaptive import Adaptive
from dreamkit.stages.budget import Target
from dreamkit.stages.measuring import measure_costs
from dreamkit.stages.reconstructing import Reconstruction
from dreamkit.stages.teaching import Recovery
from dreamkit.synthesizers.deepinversion import DeepInversion
from dreamkit.synthesizers.engine import Engine
from dreamkit.synthesizers.stage import Stage
from dreamkit.training.distillation import Distillation
from dreamkit.types import LatencyBackend, Synthesis, TeacherSource, Timing

TAUGHT = {
    "steps": 2,
    "batch_size": 4,
    "precision": "float32",
    "statistics": "difference",
    "statistics_batches": 1,
    "evaluate_every": 1,
}


class Heard(LatencyBackend):
    """A latency target that notes in which stage it was asked."""

    batch_size = 1

    def __init__(self, log, stages):
        self.log, self.stages = log, stages

    def describe(self):
        return {"device": "heard"}

    def time(self, modules):
        self.stages.append(self.log.stages.innermost)
        return [Timing(1e-3 * sum(p.numel() for p in m.parameters()), 0.0) for m, _ in modules]


def synthesis():
    synthesizer = DeepInversion(
        images=8,
        batch_size=4,
        regularizers=(Term("bn_feature", 1.0, BNFeature()),),
        stages=(Stage(2),),
        engine=Engine(precision="float32", compile=False),
    )
    return Synthesis(synthesizer, {})


class Student(TeacherSource):
    """Builds the network that a test gives it."""

    def __init__(self, made):
        self.made = made

    def build(self):
        return self.made.model

    def load(self, seed):
        return self.made


def applications(toys):
    pruned = {"recovery": Recovery(**TAUGHT), "batch_size": 4, "step": 0.2, "ranking_batches": 2}
    taylor, target = (Term("taylor", 1.0, Taylor()),), Target(flops=0.8)
    return {
        "synthesize": Synthesize(),
        "distill": Distill(Student(toys.teacher(toys.two_bn())), Distillation(**TAUGHT)),
        "distill adaptively": Distill(
            Student(toys.teacher(toys.two_bn())),
            Distillation(**TAUGHT),
            adaptive=Adaptive(every=1, batches=1),
        ),
        "prune": Prune(taylor, target, **pruned),
        "prune by latency, with fits": Prune(
            (Term("magnitude", 1.0, Magnitude()),),
            Target(latency=0.8),
            reconstruction=Reconstruction(images=8, batch_size=4),
            reconstruct_each=True,
            **pruned,
        ),
        "recover": Recover(0.5, training=Recovery(**TAUGHT)),
        "recover with fits": Recover(
            0.5, rounds=2, training=Recovery(**TAUGHT), reconstruction=Reconstruction(images=8)
        ),
    }


NAMES = (
    "synthesize",
    "distill",
    "distill adaptively",
    "prune",
    "prune by latency, with fits",
    "recover",
    "recover with fits",
)


@pytest.mark.parametrize("name", NAMES)
def test_whatever_computes_is_in_a_stage(toys, tmp_path, name):
    log, stages = MemoryLog(), []
    context = toys.context(tmp_path, Heard(log, stages), evaluation=toys.images(6), log=log)
    teacher = toys.teacher(toys.residual() if "prune" in name else toys.two_bn())
    application = applications(toys)[name]
    whole = nn.modules.module.register_module_forward_pre_hook(
        lambda module, inputs: (
            stages.append(log.stages.innermost) if type(module) is type(teacher.model) else None
        )
    )
    try:
        outcome = application.run(teacher, synthesis(), context)
        measure_costs(outcome, teacher, context, latency=True)
    finally:
        whole.remove()
    assert len(stages) > 5
    assert None not in stages
    known = {"synthesis", "preparing", "teacher accuracy", "dreams against the student"}
    assert known & set(stages)


def test_every_batch_is_told(toys, tmp_path):
    told = []

    class Told(MemoryLog):
        def progress(self, stage, total, before=0):
            told.append((stage, total))
            return super().progress(stage, total, before)

    context = toys.context(tmp_path, evaluation=toys.images(6), log=Told())
    teacher = toys.teacher(toys.residual())
    pruned = {"recovery": Recovery(**TAUGHT), "batch_size": 4, "step": 0.2, "ranking_batches": 2}
    prune = Prune((Term("taylor", 1.0, Taylor()),), Target(flops=0.8), **pruned)
    prune.run(teacher, synthesis(), context)
    expected = {("ranking", 2), ("statistics", 2), ("teacher accuracy", 6), ("accuracy", 6)}
    assert {*expected, ("student agreement", 16), ("recovery accuracy", 6)} <= set(told)
    assert torch.is_grad_enabled()
