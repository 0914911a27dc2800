"""The engine on a CUDA device: graphs, statistics, memory. Deselected by default (``-m gpu``)."""

from __future__ import annotations

import pytest
import torch

from dreamkit.arithmetic import has_native_bfloat16
from dreamkit.evaluation.judgement import judge_by
from dreamkit.memory import available_memory, largest_batch, peak_memory
from dreamkit.parameterisations.fourier import Fourier
from dreamkit.parameterisations.pixels import Pixels
from dreamkit.registry import Term
from dreamkit.regularizers.bn_feature import BNFeature
from dreamkit.regularizers.tv import TotalVariation
from dreamkit.synthesizers.bn_statistics import channel_statistics
from dreamkit.synthesizers.deepinversion import DeepInversion
from dreamkit.synthesizers.engine import Engine
from dreamkit.synthesizers.stage import Stage
from dreamkit.types import BatchPlan

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
CUDA = torch.device("cuda")


def options(**changes):
    known = {
        "images": 8,
        "batch_size": 8,
        "regularizers": (
            Term("tv", 0.01, TotalVariation()),
            Term("bn_feature", 0.5, BNFeature("paper", first_layer_scale=3.0)),
        ),
        "stages": (Stage(30, size=16), Stage(30, size=32)),
        "lr": 0.05,
        "flip": True,
        "clip": True,
    }
    return DeepInversion(**(known | changes))


def teacher_on_cuda(toys):
    return toys.teacher(toys.two_bn().to(CUDA), toys.card(size=(3, 32, 32)))


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("parameterisation", [Pixels(), Fourier()], ids=["pixels", "fourier"])
def test_graphs_give_the_losses_of_eager(toys, precision, parameterisation):
    changes = {"parameterisation": parameterisation}

    def losses(compiled):
        given = options(engine=Engine(precision=precision, compile=compiled), **changes)
        seen = []
        with given.session(teacher_on_cuda(toys), CUDA) as session:
            if compiled:
                assert session.compile() is None
            session.dream(BatchPlan(0, 0, 8, 3), lambda d, terms: seen.append(terms["loss"].item()))
        return seen

    # Later steps drift apart by what rounding does to Adam.
    assert losses(True)[:5] == pytest.approx(losses(False)[:5], rel=2e-2)


def test_prepare_and_dream(toys):
    notes = []
    with options().session(teacher_on_cuda(toys), CUDA, note=notes.append) as session:
        cost = session.prepare(3)
        dream = session.dream(BatchPlan(0, 0, 8, 3), lambda *_: None)
    assert cost.seconds > 0
    assert cost.memory_bytes > 0
    assert dream.images.device.type == "cuda"
    assert torch.isfinite(dream.images).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_statistics_and_their_gradient(dtype):
    x = torch.randn(8, 5, 6, 7, device=CUDA).to(dtype).requires_grad_()
    mean, var = channel_statistics(x, torch.zeros(5, device=CUDA))
    assert mean.dtype == var.dtype == torch.float32
    (gradient,) = torch.autograd.grad(mean.sum() + 3 * var.sum(), [x])
    exact = x.detach().double().requires_grad_()
    exact_mean, exact_var = exact.mean((0, 2, 3)), exact.var((0, 2, 3), correction=0)
    (expected,) = torch.autograd.grad(exact_mean.sum() + 3 * exact_var.sum(), [exact])
    torch.testing.assert_close(mean.double(), exact_mean, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(var.double(), exact_var, rtol=1e-5, atol=1e-6)
    tolerance = 1e-5 if dtype == torch.float32 else 1e-2
    torch.testing.assert_close(gradient.double(), expected, rtol=tolerance, atol=tolerance)


def test_memory_by_trial():
    with peak_memory(CUDA) as peak:
        torch.zeros(2**26, device=CUDA, dtype=torch.uint8)
    assert peak.above_start >= 2**26
    free = available_memory(CUDA)
    # A tenth of the memory an image: eight of nine tenths' nine fit, or seven with the rounding.
    found = largest_batch(
        lambda size: torch.empty(size * (free // 10), dtype=torch.uint8, device=CUDA), 64, CUDA
    )
    assert found in {8, 9}


def test_native_bfloat16_is_told():
    assert has_native_bfloat16(CUDA) == (torch.cuda.get_device_capability() >= (8, 0))


def test_a_judgement_is_that_of_the_cpu(toys):
    verifier = toys.teacher(toys.two_bn(), toys.card(size=(3, 12, 12)))
    images, real = toys.images(40), toys.images(30)
    on_cpu = judge_by(verifier, images, real, "fc", 4, 0, torch.device("cpu"))
    on_cuda = judge_by(verifier, images, real, "fc", 4, 0, CUDA)
    assert next(verifier.model.parameters()).is_cuda
    assert on_cuda.metrics() == pytest.approx(on_cpu.metrics(), rel=1e-2)
