"""The card: pixels in and out, and its JSON."""

from __future__ import annotations

import json

import pytest
import torch

from dreamkit.card import Card


def imagenet():
    return Card(
        "x",
        (3, 4, 64),
        (0.485, 0.456, 0.406),
        (0.229, 0.224, 0.225),
        3,
        "tests",
        class_names=("a", "b", "c"),
        notes={"list": [1, 2]},
    )


def test_normalise_by_hand(toys):
    # mean (.5, .4, .3), std (.25, .5, .125): a pixel of 51 is 0.2.
    stored = torch.full((1, 3, 1, 1), 51, dtype=torch.uint8)
    expected = [(0.2 - 0.5) / 0.25, (0.2 - 0.4) / 0.5, (0.2 - 0.3) / 0.125]
    assert toys.card().normalise(stored).flatten().tolist() == pytest.approx(expected, rel=1e-5)


def test_every_stored_value_survives_the_way_there_and_back():
    stored = torch.arange(256, dtype=torch.uint8).view(1, 1, 4, 64).expand(2, 3, 4, 64)
    card = imagenet()
    assert torch.equal(card.to_stored(card.normalise(stored)), stored)


def test_to_stored_clips_and_rounds(toys):
    # Channel 0: mean .5, std .25. -9 is below 0, 9 above 255; 0.1 is 255·0.525 = 133.9.
    images = torch.zeros(1, 3, 1, 3)
    images[0, 0, 0] = torch.tensor([-9.0, 9, 0.1])
    assert toys.card().to_stored(images)[0, 0, 0].tolist() == [0, 255, 134]


def test_pixel_range_by_hand(toys):
    low, high = toys.card().pixel_range(torch.zeros(1))
    assert low.flatten().tolist() == pytest.approx([-2, -0.8, -2.4])
    assert high.flatten().tolist() == pytest.approx([2, 1.2, 5.6])


def test_json_round_trip():
    card = imagenet()
    assert Card.from_json(json.loads(json.dumps(card.to_json()))) == card


def test_a_mean_for_each_channel_is_demanded():
    with pytest.raises(ValueError, match="each of the 3 input channels"):
        Card("x", (3, 8, 8), (0.5,), (0.5,), 3, "tests")
