"""Images as callers of the library hold them: arrays, lists, files, labels of every kind."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from torch.utils.data import TensorDataset

from dreamkit.api.given_images import GivenImages, as_images
from dreamkit.api.networks import View, take_in
from dreamkit.card import Card
from dreamkit.errors import DreamkitError
from dreamkit.stages.opening import open_evaluation

CARD = Card("net", (3, 8, 8), (0.4, 0.5, 0.6), (0.2, 0.25, 0.3), 3, "tests", weights_sha256="a")
PIXELS = (torch.arange(4 * 3 * 8 * 8) % 251).to(torch.uint8).view(4, 3, 8, 8)
LABELS = [0, 1, 2, 1]
LAST = PIXELS.permute(0, 2, 3, 1).numpy()


def items(label):
    return [(PIXELS[i], label(LABELS[i])) for i in range(4)]


@pytest.mark.parametrize(
    "given",
    [
        (PIXELS, np.array(LABELS, np.uint16)),
        (PIXELS, torch.tensor(LABELS)[:, None]),
        (PIXELS, torch.eye(3)[LABELS]),
        (PIXELS, [1.0 * label for label in LABELS]),
        [PIXELS, LABELS],
        (LAST, np.array(LABELS)),
        [(array, label) for array, label in zip(LAST, LABELS, strict=True)],
        ([Image.fromarray(array) for array in LAST], LABELS),
        [{"image": Image.fromarray(a), "label": b} for a, b in zip(LAST, LABELS, strict=True)],
        items(torch.tensor),
        items(np.int64),
        items(lambda label: torch.eye(3)[label]),
        iter([([Image.fromarray(array) for array in LAST], LABELS)]),
        iter([(LAST[:2], LABELS[:2]), (LAST[2:], np.array(LABELS[2:]))]),
    ],
    ids=range(14),
)
def test_pixels_and_labels_in_any_form(given):
    stored, labels = as_images(given, CARD, "images").batch([0, 1, 2, 3])
    assert torch.equal(stored, PIXELS)
    assert labels.tolist() == LABELS
    assert labels.dtype == torch.int64


def test_two_labels_of_two_classes_are_not_one_hot():
    two = Card("net", (3, 8, 8), CARD.mean, CARD.std, 2, "tests")
    assert as_images((PIXELS[:2], [0, 1]), two, "images").batch([0, 1])[1].tolist() == [0, 1]


def test_lists_of_files_and_flat_folders(tmp_path):
    files = [tmp_path / f"{i}.png" for i in range(4)]
    for file, array in zip(files, LAST, strict=True):
        Image.fromarray(array).save(file)
    for given in ((files, LABELS), [(str(f), y) for f, y in zip(files, LABELS, strict=True)]):
        stored, labels = as_images(given, CARD, "images").batch([0, 3])
        assert torch.equal(stored, PIXELS[[0, 3]])
        assert labels.tolist() == [0, 1]
    stored, labels = as_images(tmp_path, CARD, "images").batch([2])
    assert (stored[0].equal(PIXELS[2]), labels.tolist()) == (True, [-1])
    files[1].write_bytes(b"")
    with pytest.raises(DreamkitError, match=r"1\.png is an empty file"):
        as_images(files, CARD, "images")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ((PIXELS, [0, 1, 5, 1]), "label 5 is none of the 3 classes .*, at image 2"),
        ((PIXELS, [0, 1, -1, 1]), "image 2 has no label, and others have one"),
        ((PIXELS, torch.full((4, 3), 1 / 3)), "shares of several classes"),
        ((PIXELS, [0.5, 1, 2, 0]), "shares of several classes"),
        ((PIXELS, ["ant", "bee", "cat", "bee"]), "a label should be a whole number"),
        (items(lambda label: label or None), "image 0 has no label|image 1 has a label"),
        (items(lambda label: 3 * label), "label 3 is none of .*, at image 1"),
        (items(lambda label: label + 0.5), "shares of several classes"),
        ([{"picture": 0}], "its items have picture, and no image under image"),
        ([()], "one of its items is empty"),
        (([Image.new("RGB", (8, 8))], [0, 1]), "there are 1 images and 2 labels"),
        (iter([(PIXELS, LABELS), (PIXELS, None)]), "image 4 has no label"),
        ([Image.fromarray(np.ones((8, 8), np.float32))], "it holds floats, which have no white"),
    ],
    ids=range(13),
)
def test_labels_and_items_that_cannot_be_used_are_named(given, message):
    def read():
        taken = as_images(given, CARD, "images")
        taken.batch(range(len(taken)))

    with pytest.raises(DreamkitError, match=message):
        read()


def test_a_data_set_that_raises_is_refused_by_the_item():
    class Broken:
        def __len__(self):
            return 20

        def __getitem__(self, index):
            if index == 17:
                raise OSError("gone")
            return PIXELS[0], 0

    images = as_images(Broken(), CARD, "images")
    with pytest.raises(DreamkitError, match=r"item 17 cannot be read \(OSError: gone\)"):
        images.batch([16, 17])


def test_classes_in_another_order_than_the_networks_are_told():
    named = TensorDataset(PIXELS, torch.tensor(LABELS))
    named.classes = ["0", "1", "10"]
    assert as_images(named, CARD, "images").notes == ()
    named.classes = ["1", "0", "2"]
    (note,) = as_images(named, CARD, "images").notes
    assert "calls 0 '1', which is output 1 of net" in note


def test_evaluation_on_dreams_is_told_and_half_labelled_ones_are_refused():
    class Dreamt(TensorDataset):
        card = CARD

    told = []
    open_evaluation(
        GivenImages(Dreamt(PIXELS, torch.tensor(LABELS)), "evaluation"), CARD, told.append
    )
    assert "are dreams" in told[0]
    told.clear()
    open_evaluation(GivenImages((PIXELS, LABELS), "evaluation"), CARD, told.append)
    assert told == []
    for bare in (PIXELS, (PIXELS, [-1, 0, 1, 2])):
        with pytest.raises(DreamkitError, match="evaluation"):
            open_evaluation(GivenImages(bare, "evaluation"), CARD, told.append)


def test_the_names_of_classes_may_be_a_file(tmp_path):
    names = tmp_path / "names.json"
    names.write_text('{"ant": 0, "cat": 2, "bee": 1}', encoding="utf-8")
    net = nn.Sequential(nn.Flatten(), nn.Linear(192, 3))
    for given in (names, str(names)):
        card = take_in(net, View((3, 8, 8), CARD.mean, CARD.std, given), [].append).card
        assert card.class_names == ("ant", "bee", "cat")
