"""The distance of feature statistics as a multiple of chance, by hand and on samples."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from dreamkit.stages.statistics_distance import overall, statistics_distance
from dreamkit.synthesizers.bn_statistics import pooled, tapped
from dreamkit.types import ImageStatistics, LayerStatistics


def layer(means, variances, running_mean, running_var, name="bn"):
    images = ImageStatistics(torch.tensor(means), torch.tensor(variances))
    stored = torch.tensor(running_mean), torch.tensor(running_var)
    return LayerStatistics(name, *pooled(images), *stored, images)


def test_by_hand():
    # Two images of one channel: means 1 and 3, variances 2 and 4. Together μ̂ = 2 and
    # σ̂² = 3 + 1 = 4. Training: μ = 0, σ² = 9.
    # Distance² = 2²/9 + (2 - 3)²/9 = 5/9.
    # Chance: Var(mᵢ) = 2; cᵢ = 2 + 1 and 4 + 1, Var(cᵢ) = 2; s² = 2/9 + 2/(4·81) = 37/162.
    (found,) = statistics_distance([layer([[1.0], [3.0]], [[2.0], [4.0]], [0.0], [9.0])]).values()
    assert found == pytest.approx(((5 / 9) / (37 / 162 / 2)) ** 0.5, rel=1e-6)


def test_channels_count_alike_whatever_their_scale():
    # The second channel is the first times 10: nothing changes.
    one = layer([[1.0], [3.0]], [[2.0], [4.0]], [0.0], [9.0])
    both = layer([[1.0, 10], [3.0, 30]], [[2.0, 200], [4.0, 400]], [0.0, 0], [9.0, 900])
    expected = statistics_distance([one])["bn"]
    assert statistics_distance([both])["bn"] == pytest.approx(expected, rel=1e-6)


def test_wild_images_do_not_lengthen_their_own_ruler():
    # σ̂² = 400 against σ² = 1: by Var(mᵢ)/σ² alone, chance would be √(800/2) = 20.
    wild = layer([[-20.0], [20.0]], [[0.0], [0.0]], [0.0], [1.0])
    # s² = 800/400 + 0; distance² = (20 - 1)² = 361.
    assert statistics_distance([wild])["bn"] == pytest.approx((361 / (2 / 2)) ** 0.5, rel=1e-6)


def test_a_dead_channel_by_hand():
    # Variances 0 and 2: the first is divided by a thousandth of their mean, 0.001.
    # Off by 0.01: distance² = (0.0001/0.001 + 0)/2 = 0.05. Both images are alike in the first
    # channel; in the second s² = 0.5/2 + 0, as both cᵢ are 1.75 + 0.25.
    dead = layer([[0.01, 0.5], [0.01, -0.5]], [[0.0, 1.75], [0.0, 1.75]], [0.0, 0.0], [0.0, 2.0])
    found = statistics_distance([dead])["bn"]
    assert found == pytest.approx((0.05 / (0.25 / 2 / 2)) ** 0.5, rel=1e-5)


def test_a_layer_that_stores_no_variance_at_all_stays_finite():
    blank = layer([[0.5], [0.5]], [[0.25], [0.25]], [0.0], [0.0])
    # Divided by BatchNorm's own 1e-5; s is at its least, 0.1.
    expected = ((0.25 + 0.25) / 1e-5) ** 0.5 / (0.1 / 2**0.5)
    assert statistics_distance([blank])["bn"] == pytest.approx(expected, rel=1e-5)


def test_images_that_are_all_the_same_are_not_infinitely_far():
    same = layer([[1.0]] * 4, [[1.0]] * 4, [0.0], [1.0])
    assert statistics_distance([same])["bn"] == pytest.approx(1 / (0.1 / 2), rel=1e-6)


def test_one_image_has_no_spread_and_no_distance():
    assert statistics_distance([layer([[1.0]], [[1.0]], [0.0], [1.0])]) == {}
    assert overall({}) is None
    assert overall({"a": 1.0, "b": 2.0}) == 1.5


@pytest.mark.parametrize("count", [16, 64])
def test_batches_of_the_training_images_are_at_one(count):
    # Images of unequal brightness and contrast, a layer that stored the statistics of all.
    generator = torch.Generator().manual_seed(0)

    def random(*shape):
        return torch.randn(*shape, generator=generator)

    contrast = torch.rand(8192, 16, 1, 1, generator=generator) + 0.5
    images = random(8192, 16, 1, 1) + contrast * random(8192, 16, 3, 3)
    bn = nn.BatchNorm2d(16, momentum=None)
    bn(images)
    found = []
    with tapped(bn.eval(), each_image=True) as tap:
        for first in range(0, 40 * count, count):
            _, layers = tap(images[first : first + count])
            found.append(overall(statistics_distance(layers)))
        _, layers = tap(1.5 * images[:count])
    assert sum(found) / len(found) == pytest.approx(1, abs=0.1)
    assert overall(statistics_distance(layers)) > 2
