"""What dreamkit counts on, checked as any plugin can."""

from __future__ import annotations

from dreamkit_example.color_balance import ColorBalance
from dreamkit_example.confidence import Confidence
from dreamkit_example.extremes import Extremes
from dreamkit_example.logit_anchor import LogitAnchor
from dreamkit_example.mse import MSE
from dreamkit_example.sign_ascent import SignAscent
from dreamkit_example.stripes import Stripes
from dreamkit_example.weight_std import WeightStd

from dreamkit.plugin import testing


def test_losses():
    testing.check_regularizer(ColorBalance)
    testing.check_incremental_loss(LogitAnchor)
    testing.check_distillation_loss(MSE)


def test_criterion():
    testing.check_criterion(WeightStd)


def test_images():
    testing.check_synthesizer(SignAscent(images=2, batch_size=2, steps=2))
    testing.check_source(Stripes(images=3))


def test_runs(tmp_path):
    testing.check_application(Confidence(images=Stripes(images=3)), tmp_path)
    testing.check_tracker(Extremes, tmp_path)
