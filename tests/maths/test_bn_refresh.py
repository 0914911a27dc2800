"""BatchNorm states what it is given of old and new classes, and computes what it did."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torchvision.ops import FrozenBatchNorm2d

from dreamkit.stages.refreshing import refresh_statistics
from dreamkit.training.batches import NormalisedBatches
from dreamkit.training.bn_refresh import refresh
from dreamkit.types import StoredImages, Teacher

CPU = torch.device("cpu")


def batches(toys, images, batch_size=3):
    return NormalisedBatches(images, toys.card(), CPU, batch_size)


def some(toys, first, last):
    images = toys.images(20)
    return StoredImages(images.images[first:last], images.labels[first:last])


def moments(rows):
    """Return mean and biased variance of channels, in float64."""
    flat = rows.double().transpose(0, 1).flatten(1)
    return flat.mean(1), flat.var(1, correction=0)


def mixed(first, second, share):
    """Return what values have of which ``share`` are as the first, told by E[x] and E[x²]."""
    (m1, v1), (m2, v2) = first, second
    mean = share * m1 + (1 - share) * m2
    return mean, share * (v1 + m1**2) + (1 - share) * (v2 + m2**2) - mean**2


def assert_states(bn, expected):
    mean, variance = expected
    torch.testing.assert_close(bn.running_mean.double(), mean, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(bn.running_var.double(), variance, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def given(model, x):
    """Return what the two layers of a network are given."""
    first = model.conv1(x)
    return first, model.conv2(model.bn1(first).relu())


@torch.no_grad()
def learnt(toys):
    """Return a network and what it was, with other weights."""
    old, new = toys.two_bn(), toys.two_bn()
    new.conv1.weight.mul_(1.5)
    new.conv2.weight.add_(0.2)
    return old, new


def test_old_classes_move_by_the_difference_and_new_ones_are_seen(toys):
    old, new = learnt(toys)
    replay, added = some(toys, 0, 7), some(toys, 7, 20)
    xs = [toys.card().normalise(images.images) for images in (replay, added)]
    expected = []
    for layer in (0, 1):
        bn = (old.bn1, old.bn2)[layer]
        (m_new, v_new), (m_old, v_old) = (moments(given(m, xs[0])[layer]) for m in (new, old))
        before = bn.running_mean + m_new - m_old, bn.running_var * v_new / v_old
        expected.append(mixed(before, moments(given(new, xs[1])[layer]), 0.7))
    with torch.no_grad():
        computed = [new(x) for x in xs]
    done = []
    refresh(new, old, batches(toys, replay), batches(toys, added), 0.7, done.append)
    assert_states(new.bn1, expected[0])
    assert_states(new.bn2, expected[1])
    with torch.no_grad():
        for x, logits in zip(xs, computed, strict=True):
            torch.testing.assert_close(new(x), logits, rtol=1e-3, atol=1e-4)
    toys.assert_same_tensors(old, toys.two_bn())
    assert done == list(range(1, 3 + 5 + 3 + 1))


def test_of_real_images_what_is_seen_counts(toys):
    _, new = learnt(toys)
    replay, added = some(toys, 0, 7), some(toys, 7, 20)
    xs = [toys.card().normalise(images.images) for images in (replay, added)]
    expected = [mixed(*(moments(given(new, x)[layer]) for x in xs), 7 / 20) for layer in (0, 1)]
    refresh(new, None, batches(toys, replay), batches(toys, added), 7 / 20)
    assert_states(new.bn1, expected[0])
    assert_states(new.bn2, expected[1])
    everything = moments(given(new, torch.cat(xs))[0])
    assert_states(new.bn1, everything)


def test_a_network_that_learnt_nothing_states_what_it_did_of_old_classes(toys):
    old, new = toys.two_bn(), toys.two_bn()
    refresh(new, old, batches(toys, some(toys, 0, 7)), batches(toys, some(toys, 7, 20)), 1.0)
    toys.assert_same_tensors(new, old)


def test_layers_without_scale_and_shift_state_what_they_did(toys):
    model = nn.Sequential(
        nn.BatchNorm2d(3, affine=False), nn.BatchNorm2d(3, track_running_stats=False)
    )
    before = toys.state(model)
    refresh(model, model, batches(toys, toys.images(4)), batches(toys, toys.images(4)), 0.5)
    toys.assert_same_state(model, before)
    assert model.training


def test_a_frozen_norm_is_refreshed_and_a_dead_channel_is_not(toys):
    model = nn.Sequential(FrozenBatchNorm2d(3), nn.BatchNorm2d(3)).eval()
    with torch.no_grad():
        model[0].weight[1] = 0  # nothing of channel 1 reaches the second layer
    images = toys.images(4)
    x = toys.card().normalise(images.images)
    before = model(x)
    refresh(model, None, batches(toys, images), batches(toys, images), 0.5)
    torch.testing.assert_close(model(x), before, rtol=1e-4, atol=1e-5)
    assert_states(model[0], moments(x))
    assert model[1].running_var[1] == 1
    assert model[1].weight[1] == 1
    assert model[1].running_var[0] != 1


@pytest.mark.parametrize("how", ["difference", "recalibrate", "keep"])
def test_each_class_counts_as_much(toys, tmp_path, how):
    """Of five classes three are old, whatever there are of images."""
    old, new = learnt(toys)
    replay, added = some(toys, 0, 7), some(toys, 7, 20)
    expected = copy.deepcopy(new)
    if how != "keep":
        network = old if how == "difference" else None
        refresh(expected, network, batches(toys, replay), batches(toys, added), 0.6)
    refresh_statistics(
        how,
        Teacher(old, toys.card(classes=3), {}),
        Teacher(new, toys.card(classes=5), {}),
        replay,
        added,
        3,
        toys.context(tmp_path),
    )
    toys.assert_same_tensors(new, expected)
