"""Sources of images: sizes, labels and pixels."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from dreamkit.errors import DreamkitError, OptionError
from dreamkit.sources.digits import Digits
from dreamkit.sources.folder import Folder
from dreamkit.sources.generator import GeneratorImages
from dreamkit.sources.joined import Joined
from dreamkit.sources.torchvision import TorchvisionDataset
from dreamkit.types import NO_LABEL


def pixels(height, width, seed=0):
    total = height * width * 3
    return (np.arange(total) * 31 % 256 + seed).astype(np.uint8).reshape(height, width, 3)


def write(folder, name, array):
    folder.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(folder / name)
    return torch.from_numpy(array).permute(2, 0, 1) if array.ndim == 3 else torch.from_numpy(array)


# --- folders ----------------------------------------------------------------------------------


def test_folders_in_alphabetical_order_are_outputs_in_order(toys, tmp_path):
    second = write(tmp_path / "b", "0.png", pixels(8, 8, 1))
    first = [write(tmp_path / "a", f"{i}.png", pixels(8, 8, 2 + i)) for i in range(2)]
    images = Folder(str(tmp_path)).open(toys.card(classes=2))
    assert len(images) == 3
    stored, labels = images.batch([0, 1, 2])
    assert labels.tolist() == [0, 0, 1]
    assert labels.dtype == torch.int64
    assert stored.dtype == torch.uint8
    assert torch.equal(stored, torch.stack([*first, second])), "exact where the size is right"
    stored, labels = images.batch([2, 0])
    assert torch.equal(stored, torch.stack([second, first[0]]))
    assert labels.tolist() == [1, 0]


def test_folders_named_like_the_teachers_classes_are_mapped(toys, tmp_path):
    for name in ("cat", "zebra"):
        write(tmp_path / name, "0.png", pixels(8, 8))
    card = toys.card(class_names=("zebra", "dog", "cat"))
    assert Folder(str(tmp_path)).open(card).labels.tolist() == [2, 0]
    write(tmp_path / "unknown", "0.png", pixels(8, 8))  # and is not taken for the dog
    with pytest.raises(
        DreamkitError, match="'unknown' is none of the classes of toy, and its 'dog'"
    ):
        Folder(str(tmp_path)).open(card)


def test_the_centre_is_cropped(toys, tmp_path):
    # 8 high and 14 wide: nothing is resized, and 3 columns go on either side.
    whole = write(tmp_path / "a", "0.png", pixels(8, 14))
    stored, _ = Folder(str(tmp_path), labelled=False).open(toys.card()).batch([0])
    assert torch.equal(stored[0], whole[:, :, 3:11])


def test_resize_is_a_multiple_of_the_crop(toys, tmp_path):
    # resize 2: the shorter side becomes 16, which it is, and the middle 8×8 is cut out.
    whole = write(tmp_path / "a", "0.png", pixels(16, 20))
    stored, _ = Folder(str(tmp_path), resize=2.0, labelled=False).open(toys.card()).batch([0])
    assert torch.equal(stored[0], whole[:, 4:12, 6:14])


def test_larger_images_are_resized(toys, tmp_path):
    # Left half black, right half white: so it stays, away from the seam.
    array = np.zeros((32, 32, 3), np.uint8)
    array[:, 16:] = 255
    write(tmp_path / "a", "0.png", array)
    stored, _ = Folder(str(tmp_path), labelled=False).open(toys.card()).batch([0])
    assert stored.shape == (1, 3, 8, 8)
    assert (stored[..., :3] < 8).all()
    assert (stored[..., 5:] > 247).all()


@pytest.mark.parametrize(
    "shape", [(16, 16), (8, 16), (32, 8), (5, 5)], ids=["square", "fits", "tall", "small"]
)
def test_a_card_that_is_not_square_is_filled(toys, tmp_path, shape):
    # A white image is white at any size: there is no border of another colour.
    write(tmp_path / "a", "0.png", np.full((*shape, 3), 255, np.uint8))
    card = toys.card(size=(3, 8, 16), classes=1)
    stored, _ = Folder(str(tmp_path), labelled=False).open(card).batch([0])
    assert stored.shape == (1, 3, 8, 16)
    assert (stored == 255).all()
    images = TorchvisionDataset("ImageFolder", root=str(tmp_path)).open(card)
    assert (images.batch([0])[0] == 255).all()


def test_grey_and_colour(toys, tmp_path):
    grey = write(tmp_path / "a", "0.png", np.arange(64, dtype=np.uint8).reshape(8, 8))
    one = Folder(str(tmp_path), labelled=False).open(toys.card(size=(1, 8, 8))).batch([0])[0]
    assert torch.equal(one, grey.view(1, 1, 8, 8))
    three = Folder(str(tmp_path), labelled=False).open(toys.card()).batch([0])[0]
    assert torch.equal(three, grey.expand(1, 3, 8, 8))
    write(tmp_path / "b", "0.png", np.full((8, 8, 3), (255, 0, 0), np.uint8))
    red = Folder(str(tmp_path), labelled=False).open(toys.card(size=(1, 8, 8))).batch([1])[0]
    assert red.unique().tolist() == [76]  # ITU-R 601: 0.299·255


def test_too_many_classes(toys, tmp_path):
    for name in "abcd":
        write(tmp_path / name, "0.png", pixels(8, 8))
    with pytest.raises(DreamkitError, match="has 4 classes, toy has 3 outputs"):
        Folder(str(tmp_path)).open(toys.card())
    proxies = Folder(str(tmp_path), labelled=False).open(toys.card())
    assert proxies.labels.tolist() == [NO_LABEL] * 4


def test_folder_refusals(toys, tmp_path):
    with pytest.raises(OptionError, match="no such folder") as caught:
        Folder(str(tmp_path / "none"), labelled=False)
    assert caught.value.option == "path"
    with pytest.raises(OptionError, match="at least 1") as caught:
        Folder(str(tmp_path), resize=0.5, labelled=False)
    assert caught.value.option == "resize"
    with pytest.raises(DreamkitError, match=str(tmp_path)):
        Folder(str(tmp_path), labelled=False).open(toys.card())  # no class folders
    write(tmp_path / "a", "0.png", pixels(8, 8))
    with pytest.raises(DreamkitError, match="1, 3 or 4 channels"):
        Folder(str(tmp_path), labelled=False).open(
            toys.card(size=(2, 8, 8), mean=(0, 0), std=(1, 1))
        )


def test_a_file_that_is_no_image_is_named(toys, tmp_path):
    write(tmp_path / "a", "0.png", pixels(8, 8))
    (tmp_path / "a" / "0.png").write_bytes(b"not a picture")
    with pytest.raises(DreamkitError, match=r"0\.png cannot be decoded"):
        Folder(str(tmp_path), labelled=False).open(toys.card()).batch([0])


# --- digits -----------------------------------------------------------------------------------


@pytest.fixture
def digits(toys):
    pytest.importorskip("sklearn", reason="the digits come with scikit-learn (dreamkit[demo])")
    card = toys.card(size=(1, 8, 8), classes=10)
    return {split: Digits(split).open(card) for split in ("train", "test")}


def test_digits_are_split_without_overlap_or_loss(digits):
    from sklearn.datasets import load_digits

    train, test = digits["train"], digits["test"]
    assert (len(train), len(test)) == (1257, 540)  # 30 % of 1797, rounded up
    data = load_digits()
    whole = sorted((row.tobytes(), int(y)) for row, y in zip(data.images, data.target, strict=True))
    assert len(set(whole)) == 1797, "no image occurs twice, so sets tell splits apart"

    def rows(part):
        return {
            (x.numpy().tobytes(), int(y)) for x, y in zip(part.images, part.labels, strict=True)
        }

    assert not rows(train) & rows(test)
    assert len(rows(train) | rows(test)) == 1797


def test_digits_are_stratified(digits):
    train, test = (torch.bincount(digits[s].labels, minlength=10) for s in ("train", "test"))
    share = test / (train + test)
    assert ((share > 0.29) & (share < 0.31)).all()


def test_digits_are_stored_over_the_whole_range(digits, toys):
    # scikit-learn counts 0 to 16: 16 is 255, 8 is 127.5, which rounds to even, 128.
    images = digits["test"].images
    assert images.dtype == torch.uint8
    assert images.shape == (540, 1, 8, 8)
    values = images.unique().tolist()
    assert values == [round(v * 255 / 16) for v in range(17)]
    again = Digits("test").open(toys.card(size=(1, 8, 8), classes=10))
    assert torch.equal(again.images, images), "the split is fixed"


def test_digits_do_not_fit_another_teacher(toys):
    with pytest.raises(DreamkitError, match=r"\(1, 8, 8\)"):
        Digits().open(toys.card())


# --- torchvision ------------------------------------------------------------------------------


def test_torchvision_fake_data(toys):
    # FakeData has no folder: its first parameter is how many images there are.
    source = TorchvisionDataset(
        "FakeData", arguments={"size": 5, "image_size": [3, 8, 8], "num_classes": 3}
    )
    images = source.open(toys.card())
    assert len(images) == 5
    stored, labels = images.batch([4, 0])
    assert stored.shape == (2, 3, 8, 8)
    assert stored.dtype == torch.uint8
    assert labels.dtype == torch.int64
    assert 0 <= labels.min() <= labels.max() < 3
    assert torch.equal(images.batch([0])[0][0], stored[1])


def test_torchvision_image_folder(toys, tmp_path):
    whole = write(tmp_path / "b", "0.png", pixels(8, 14))
    write(tmp_path / "a", "0.png", pixels(8, 8))
    images = TorchvisionDataset("ImageFolder", root=str(tmp_path)).open(toys.card(classes=2))
    stored, labels = images.batch([1])
    assert labels.tolist() == [1]
    assert torch.equal(stored[0], whole[:, :, 3:11])
    grey = TorchvisionDataset("ImageFolder", root=str(tmp_path)).open(
        toys.card(size=(1, 8, 8), classes=2)
    )
    assert grey.batch([0, 1])[0].shape == (2, 1, 8, 8)


def test_torchvision_refusals(toys, tmp_path):
    with pytest.raises(OptionError, match="did you mean 'CIFAR10'") as caught:
        TorchvisionDataset("CIFAR1O")
    assert caught.value.option == "dataset"
    source = TorchvisionDataset("CIFAR10", root=str(tmp_path), arguments={"download": False})
    with pytest.raises(DreamkitError, match="CIFAR10 does not open"):
        source.open(toys.card())


# --- a generator's images ---------------------------------------------------------------------


class Checkered(nn.Module):
    """Maps noise (N, 2) to images whose pixels are its first number, in [-1, 1]."""

    def forward(self, noise):
        return noise[:, :1, None, None].tanh().expand(-1, 3, 8, 8)


@pytest.fixture
def drawing(tmp_path):
    path = tmp_path / "drawing.pt"
    torch.jit.script(Checkered()).save(str(path))
    return str(path)


@pytest.fixture
def exported(tmp_path):
    path = tmp_path / "drawing.pt2"
    torch.export.save(torch.export.export(Checkered(), (torch.zeros(4, 2),)), path)
    return str(path)


@pytest.mark.parametrize("kind", ["drawing", "exported"])
def test_a_generator_draws_by_its_seed(toys, request, kind):
    path = request.getfixturevalue(kind)
    given = GeneratorImages(path, images=6, latent=(2,), batch_size=4, seed=3)
    images = given.open(toys.card())
    noise = torch.Generator().manual_seed(3)
    drawn = torch.cat([torch.randn(4, 2, generator=noise) for _ in range(2)])[:6, 0]
    expected = ((drawn.tanh() + 1) / 2 * 255).round()
    stored, labels = images.batch(range(6))
    assert stored.shape == (6, 3, 8, 8)
    assert torch.equal(stored[:, 1, 2, 3], expected.to(torch.uint8))
    assert labels.tolist() == [NO_LABEL] * 6


def test_a_generators_images_are_brought_to_the_teachers_size(toys, drawing):
    given = GeneratorImages(drawing, images=2, latent=(2,))
    stored, _ = given.open(toys.card(size=(3, 5, 6))).batch([0, 1])
    assert stored.shape == (2, 3, 5, 6)
    assert (stored == stored[:, :, :1, :1]).all()


def test_a_generator_that_does_not_fit_is_named_with_the_option(toys, drawing, tmp_path):
    with pytest.raises(DreamkitError, match="noise of shape") as caught:
        GeneratorImages(drawing, images=2, latent=(3, 1)).open(toys.card())
    assert caught.value.path == ("latent",)
    with pytest.raises(DreamkitError, match="takes 1 channels"):
        GeneratorImages(drawing, images=2, latent=(2,)).open(toys.card(size=(1, 8, 8)))
    (tmp_path / "none.pt").write_bytes(b"none")
    with pytest.raises(DreamkitError, match="neither a TorchScript"):
        GeneratorImages(str(tmp_path / "none.pt"), images=2, latent=(2,)).open(toys.card())
    with pytest.raises(OptionError, match="black"):
        GeneratorImages(drawing, images=2, latent=(2,), pixels=(1.0, 0.0))


# --- classes ----------------------------------------------------------------------------------


def test_chosen_folders_are_the_outputs_in_the_order_named(toys, tmp_path):
    for value, name in enumerate("abcd"):
        write(tmp_path / name, "0.png", np.full((8, 8, 3), value, np.uint8))
    source = Folder(str(tmp_path), classes=("d", "b", "c"))
    assert source.class_names() == ("d", "b", "c")
    stored, labels = source.open(toys.card()).batch([0, 1, 2])
    shown = {int(image[0, 0, 0]): int(label) for image, label in zip(stored, labels, strict=True)}
    assert shown == {1: 1, 2: 2, 3: 0}
    assert Folder(str(tmp_path)).class_names() == ("a", "b", "c", "d")
    assert Folder(str(tmp_path), labelled=False).class_names() is None
    unlabelled = Folder(str(tmp_path), labelled=False, classes=("a",)).open(toys.card())
    assert unlabelled.labels.tolist() == [NO_LABEL]


def test_names_that_the_teacher_has_go_before_the_order(toys, tmp_path):
    for name in "abcd":
        write(tmp_path / name, "0.png", pixels(8, 8))
    card = replace(toys.card(), class_names=("c", "x", "a"))
    assert Folder(str(tmp_path), classes=("a", "c")).open(card).labels.tolist() == [2, 0]


@pytest.mark.parametrize(
    ("classes", "message"),
    [(("a", "cats"), r"no class 'cats'; did you mean 'cat'\?"), (("a", "a"), "named twice")],
)
def test_classes_that_are_not_there(toys, tmp_path, classes, message):
    for name in ("a", "cat"):
        write(tmp_path / name, "0.png", pixels(8, 8))
    source = Folder(str(tmp_path), classes=classes)
    for read in (source.class_names, lambda: source.open(toys.card())):
        with pytest.raises(DreamkitError, match=message) as caught:
            read()
        assert caught.value.path == ("classes",)


def test_some_digits(toys):
    card = toys.card(size=(1, 8, 8), classes=3, mean=(0.5,), std=(0.5,))
    source = Digits(split="train", classes=(7, 9, 8))
    assert source.class_names() == ("7", "9", "8")
    some, all_ = source.open(card), Digits(split="train").open(replace(card, num_classes=10))
    _, labels = some.batch(range(len(some)))
    _, digits = all_.batch(range(len(all_)))
    assert [int((labels == i).sum()) for i in range(3)] == [
        int((digits == i).sum()) for i in (7, 9, 8)
    ]
    with pytest.raises(DreamkitError, match="digits has 10 classes, toy has 3 outputs"):
        Digits().open(card)


def test_some_classes_of_a_torchvision_data_set(toys, tmp_path):
    for value, name in enumerate("abcd"):
        write(tmp_path / name, "0.png", np.full((8, 8, 3), value, np.uint8))
    source = TorchvisionDataset("ImageFolder", root=str(tmp_path), classes=("d", "b"))
    assert source.class_names() == ("d", "b")
    images = source.open(toys.card(classes=2))
    assert len(images) == 2
    stored, labels = images.batch([0, 1])
    assert stored[:, 0, 0, 0].tolist() == [1, 3]
    assert labels.tolist() == [1, 0]


def test_a_torchvision_data_set_without_names_or_targets(toys, monkeypatch):
    class Bare:
        def __init__(self, root):
            pass

        def __len__(self):
            return 2

    monkeypatch.setattr("torchvision.datasets.SBDataset", Bare)
    source = TorchvisionDataset("SBDataset", classes=("a",))
    assert source.class_names() is None
    with pytest.raises(DreamkitError, match="does not name its classes"):
        source.open(toys.card())
    Bare.classes = ["a", "b"]
    with pytest.raises(DreamkitError, match="does not tell its images' classes"):
        source.open(toys.card(classes=1))


# --- several sources as one -------------------------------------------------------------------


def test_joined_sources_are_one_set(toys, tmp_path):
    known = write(tmp_path / "known" / "b", "0.png", pixels(8, 8, 1))
    others = [write(tmp_path / "proxy" / "any", f"{i}.png", pixels(8, 8, 2 + i)) for i in range(2)]
    write(tmp_path / "known" / "a", "0.png", pixels(8, 8, 9))
    proxy = Folder(str(tmp_path / "proxy"), labelled=False)
    images = Joined((Folder(str(tmp_path / "known")), proxy)).open(toys.card(classes=2))
    assert len(images) == 4
    stored, labels = images.batch([3, 1, 2])
    assert torch.equal(stored, torch.stack([others[1], known, others[0]]))
    assert labels.tolist() == [NO_LABEL] * 3, "no image has -1 for a class beside others' classes"
    assert images.notes[-1] == (
        "the images of 'of[1]' have no labels: those of the others are not used"
    )


def test_what_a_joined_source_raises_is_placed_at_it(toys, tmp_path):
    write(tmp_path / "whole" / "a", "0.png", pixels(8, 8))
    write(tmp_path / "whole" / "b", "0.png", pixels(8, 8))
    (tmp_path / "empty").mkdir()
    given = Joined((Folder(str(tmp_path / "whole")), Folder(str(tmp_path / "empty"))))
    with pytest.raises(DreamkitError) as raised:
        given.open(toys.card(classes=2))
    assert raised.value.path[:2] == ("of", 1)
    with pytest.raises(OptionError, match="at least one"):
        Joined(())


def test_joined_images_are_of_one_size(toys):
    class Of:
        def __init__(self, images):
            self.images = images

        def open(self, card):
            return self.images

    sized = [
        Of(toys.images(count, size=(3, side, side))) for count, side in ((0, 4), (2, 8), (2, 4))
    ]
    assert len(Joined((sized[0], sized[1])).open(toys.card())) == 2
    with pytest.raises(DreamkitError, match=r"\(3, 4, 4\), those before them \(3, 8, 8\)"):
        Joined((sized[0], sized[1], sized[2])).open(toys.card())
