"""The card: pixels in and out, and its JSON."""

from __future__ import annotations

import json

import pytest
import torch

from dreamkit.card import Card, read_class_names
from dreamkit.errors import DreamkitError


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


@pytest.mark.parametrize(
    ("mean", "std", "wanted"),
    [
        ((123.675, 116.28, 103.53), (58.395, 57.12, 57.375), "mean [0.485, 0.456, 0.406] and std"),
        ((104.0, 117.0, 123.0), (1.0, 1.0, 1.0), "std [0.003922, 0.003922, 0.003922]"),
        ((127.5,) * 3, (0.5,) * 3, "mean [0.5, 0.5, 0.5] and std [0.5, 0.5, 0.5]"),
        ((0.0,) * 3, (255.0,) * 3, "mean [0.0, 0.0, 0.0] and std [1.0, 1.0, 1.0]"),
        ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225), None),
        ((0.0,) * 3, (1.0,) * 3, None),
        ((0.0,) * 3, (1 / 255,) * 3, None),
    ],
)
def test_a_scale_of_255_is_doubted(mean, std, wanted):
    doubts = Card("x", (3, 8, 8), mean, std, 3, "tests").doubts()
    assert len(doubts) == (wanted is not None)
    assert wanted is None or wanted in doubts[0]


@pytest.mark.parametrize(
    "text",
    [
        "ant\nkit fox\ncafé\n",
        "\ufeffant\r\nkit fox \r\ncafé\r\n\r\n",
        '["ant", "kit fox", "café"]',
        '{"0": "ant", "2": "café", "1": "kit fox"}',
        '{"kit fox": 1, "ant": 0, "café": 2}',
        '{"0": ["n01", "ant"], "1": ["n02", "kit fox"], "2": ["n03", "café"]}',
        '{"id2label": {"0": "ant", "1": "kit fox", "2": "café"}, "model": "x"}',
    ],
    ids=["lines", "windows", "list", "by number", "numbers", "pairs", "configuration"],
)
def test_names_of_classes_in_a_file(tmp_path, text):
    file = tmp_path / "names"
    file.write_bytes(text.encode())
    assert read_class_names(file) == ("ant", "kit fox", "café")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "no name in line 1"),
        (b"ant\n\nbee", "no name in line 2"),
        (b"caf\xe9", "cannot be read"),
        (b'{"0": "ant", "2": "bee"}', "0, 1, 2 and so on"),
        (b'{"zero": "ant"}', "cannot be read"),
        (b"[[], 3.5]", "no list of names"),
        (b"[1, 2", "cannot be read"),
    ],
)
def test_files_that_name_no_classes(tmp_path, content, message):
    file = tmp_path / "names"
    file.write_bytes(content)
    with pytest.raises(DreamkitError, match=message) as caught:
        read_class_names(file)
    assert str(file) in str(caught.value)


def test_names_of_classes_that_are_numbers():
    assert read_class_names([0, 1, "two"]) == ("0", "1", "two")
    assert read_class_names(None) is None
