"""Folders of images as people have them: names, hidden files, pixel formats, damage."""

from __future__ import annotations

import unicodedata

import numpy as np
import pytest
import torch
from PIL import Image

from dreamkit.errors import DreamkitError
from dreamkit.sources.folder import Folder
from dreamkit.sources.torchvision import TorchvisionDataset
from dreamkit.types import NO_LABEL


@pytest.fixture
def folders(tmp_path):
    """Write class folders, each with a picture whose grey is its place in the list."""

    def write(*names, root="set"):
        for grey, name in enumerate(names):
            (tmp_path / root / name).mkdir(parents=True)
            Image.new("RGB", (8, 8), (grey,) * 3).save(tmp_path / root / name / "0.png")
        return tmp_path / root

    return write


def found(images):
    """Return the label of each grey."""
    stored, labels = images.batch(range(len(images)))
    return {int(x[0, 0, 0]): int(y) for x, y in zip(stored, labels, strict=True)}


# --- which output a class is ------------------------------------------------------------------


@pytest.mark.parametrize("names", [[str(i) for i in range(12)], [f"{i:02}" for i in range(12)]])
def test_numbers_are_the_outputs(toys, folders, names):
    source = Folder(str(folders(*names)))
    images = source.open(toys.card(classes=12))
    assert found(images) == {i: i for i in range(12)}
    assert source.class_names() == tuple(names), "in the order of numbers"
    told = "order of text (0, 1, 10, 2" in "".join(images.notes)
    assert told == (names[0] == "0"), "another order than that of text is told"


def test_some_numbers_are_those_outputs(toys, folders):
    images = Folder(str(folders("7", "10", "2"))).open(toys.card(classes=12))
    assert found(images) == {0: 7, 1: 10, 2: 2}


def test_a_folder_that_is_no_number_among_numbers_is_named(toys, folders):
    with pytest.raises(DreamkitError, match="'misc' is no number, as the other classes are"):
        Folder(str(folders("0", "1", "2", "misc"))).open(toys.card(classes=3))


def test_a_class_without_images_is_told(toys, folders):
    card = toys.card(class_names=("ant", "bee", "cat"))
    assert "has no images of 'bee'" in Folder(str(folders("cat", "ant"))).open(card).notes[0]


def test_numbers_from_one_are_in_order_and_it_is_told(toys, folders):
    images = Folder(str(folders(*"123"))).open(toys.card(classes=3))
    assert found(images) == {0: 0, 1: 1, 2: 2}
    assert "'1' is output 0, '3' is 2" in images.notes[0]


def test_classes_in_an_order_of_the_callers(toys, folders):
    root = folders(*"012")
    images = Folder(str(root), classes=(2, 0, 1)).open(toys.card(classes=3))
    assert found(images) == {2: 0, 0: 1, 1: 2}
    assert images.notes == ()


def decomposed(text):
    return unicodedata.normalize("NFD", text)


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        (("Zoo", "Cat", "Ant"), ("zoo", "cat", "ant")),
        (("zoo", "café", "thé"), ("zoo", decomposed("café"), decomposed("thé"))),
        (("red fox", "kit fox", "arctic fox"), ("red_fox", "Kit-Fox", "arctic  fox")),
        (("5", "12", "9"), ("05", "12", "09")),
    ],
)
def test_names_that_are_written_otherwise(toys, folders, ours, theirs):
    images = Folder(str(folders(*theirs))).open(toys.card(class_names=ours))
    assert found(images) == {0: 0, 1: 1, 2: 2}
    assert images.notes == ()
    few = Folder(str(folders(theirs[2], root="few"))).open(toys.card(class_names=ours))
    assert found(few) == {0: 2}, "some may be absent"


@pytest.mark.parametrize(
    ("ours", "theirs", "message"),
    [
        (("ant", "bee", "cat"), ("bee", "cat", "dog"), "'dog' is none of .* its 'ant' is not"),
        (("ant", "bee", "cat"), ("ant", "bee", "dog"), "'dog' is none of .* its 'cat' is not"),
        (("ant", "bee", "cat"), ("ant", "bee", "cat", "dog"), "'dog' is none of"),
        (("ant", "bee", "cat"), ("bee", "eel", "dog"), "'dog', 'eel' are none .*'ant', 'cat' are"),
        (("ant", "bee", "cat"), ("ant", "Ant"), "'Ant', 'ant' are all called like the class 'ant'"),
        (("a b", "a_b", "c"), ("A B", "c"), "'A B' is none of"),
    ],
)
def test_names_of_which_some_are_strange(toys, folders, ours, theirs, message):
    with pytest.raises(DreamkitError, match=message) as caught:
        Folder(str(folders(*theirs))).open(toys.card(class_names=ours))
    assert caught.value.path == ("path",)


def test_a_strange_name_has_its_place_if_somebody_says_so(toys, folders):
    root = folders("ant", "bee", "dog")
    card = toys.card(class_names=("ant", "bee", "cat"))
    images = Folder(str(root), classes=("ant", "bee", "dog")).open(card)
    assert found(images) == {0: 0, 1: 1, 2: 2}
    assert "'dog' for 'cat'" in images.notes[0]
    with pytest.raises(DreamkitError, match="'dog' is none of the classes"):
        Folder(str(root), classes=("bee", "ant", "dog")).open(card)


def test_the_order_decides_where_no_name_tells_and_a_note_says_so(toys, folders):
    root = folders("class_1", "class_2", "class_10")
    images = Folder(str(root)).open(toys.card(class_names=("ant", "bee", "cat")))
    assert found(images) == {0: 0, 2: 1, 1: 2}
    assert "'class_1' is output 0 ('ant'), 'class_2' is 2" in images.notes[0]
    assert "'class_10' comes before 'class_2'" in images.notes[0]


def test_some_of_imagenets_classes_are_found_by_their_synsets(toys, folders):
    images = Folder(str(folders("n01443537", "n15075141"))).open(toys.card(classes=1000))
    assert found(images) == {0: 1, 1: 999}
    assert "synsets" in images.notes[0]


def test_a_data_set_with_an_order_of_its_own(toys, folders, monkeypatch):
    # Of folders torchvision says '0', '1', '10', '2'; others number their classes themselves.
    root = str(folders("0", "1", "10", "2"))
    images = TorchvisionDataset("ImageFolder", root=root).open(toys.card(classes=11))
    assert found(images) == {0: 0, 1: 1, 2: 10, 3: 2}

    class Own:
        def __init__(self, root):
            self.classes = [("ant", "emmet"), "bee", "dog"]

        def __len__(self):
            return 1

        def __getitem__(self, index):
            return Image.new("RGB", (8, 8)), np.int64(3)

    monkeypatch.setattr("torchvision.datasets.SBDataset", Own)
    images = TorchvisionDataset("SBDataset").open(toys.card(class_names=("ant", "bee", "cat")))
    assert "'dog' for 'cat'" in images.notes[0]
    with pytest.raises(DreamkitError, match="image 0 of the data set: its label 3 is none of the"):
        images.batch([0])


# --- what lies in a folder --------------------------------------------------------------------


def test_hidden_and_empty_folders_are_no_classes(toys, folders):
    root = folders("cat", "dog", ".git", "__MACOSX", "@eaDir", "$RECYCLE.BIN", "lost+found")
    (root / ".ipynb_checkpoints").mkdir()
    (root / "old").mkdir()
    source = Folder(str(root))
    images = source.open(toys.card(classes=2))
    assert found(images) == {0: 0, 1: 1}
    assert source.class_names() == ("cat", "dog", "old")
    assert any("no image in 'old'" in note for note in images.notes)
    assert found(Folder(str(root), classes=("cat", "dog")).open(toys.card(classes=2))) == found(
        images
    )
    three = Folder(str(root)).open(toys.card(class_names=("old", "dog", "cat")))
    assert found(three) == {0: 2, 1: 1}, "of a class there may be no images"
    in_order = Folder(str(root)).open(toys.card(classes=3))
    assert found(in_order) == {0: 0, 1: 1}, "its place in the order stays"


def test_files_that_are_no_pictures_are_left_out(toys, folders):
    root = folders("cat", "dog")
    (root / "cat" / "._0.png").write_bytes(b"\x00\x05\x16\x07Mac OS X")
    for name in ("Thumbs.db", ".DS_Store", "desktop.ini"):
        (root / "cat" / name).write_bytes(b"x")
    (root / "cat" / "deep").mkdir()
    Image.new("RGB", (8, 8), (9, 9, 9)).save(root / "cat" / "deep" / "1.PNG")
    (root / "dog" / "loop").symlink_to(root / "dog", target_is_directory=True)
    images = Folder(str(root)).open(toys.card(classes=2))
    assert found(images) == {0: 0, 9: 0, 1: 1}
    assert len(images) == 3, "a link in a circle brings no image twice"
    assert not [note for note in images.notes if "left out" in note], "nobody misses these"
    (root / "dog" / "1.heic").write_bytes(b"x")
    Image.new("RGB", (8, 8)).save(root / "loose.png")
    notes = Folder(str(root)).open(toys.card(classes=2)).notes
    assert any("1 .heic" in note for note in notes)
    assert any("1 images beside the class folders" in note for note in notes)


def cut(path):
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda path: path.write_bytes(b""), "is an empty file"),
        (lambda path: path.write_bytes(b"<html>"), "cannot be decoded"),
        (cut, "cannot be decoded"),
        (lambda path: (path.unlink(), path.symlink_to("nowhere")), "cannot be decoded"),
    ],
    ids=["empty", "html", "cut off", "broken link"],
)
def test_a_damaged_file_is_named_when_the_folder_is_opened(toys, folders, damage, message):
    root = folders("cat", "dog")
    noise = np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(noise).save(root / "dog" / "b.png")
    damage(root / "dog" / "b.png")
    with pytest.raises(DreamkitError, match=message) as caught:
        Folder(str(root)).open(toys.card(classes=2))
    assert str(root / "dog" / "b.png") in str(caught.value)


def test_a_level_too_high_or_too_low(toys, folders, tmp_path):
    for split in ("train", "val"):
        folders("cat", "dog", root=f"data/{split}")
    with pytest.raises(DreamkitError, match=r"'train', 'val' hold class folders .*/data/val"):
        Folder(str(tmp_path / "data")).open(toys.card(classes=2))
    folders("cat", "dog", root="outer/images")
    with pytest.raises(DreamkitError, match=r"did you mean .*/outer/images\?"):
        Folder(str(tmp_path / "outer")).open(toys.card(classes=2))
    with pytest.raises(DreamkitError, match=r"no class folder in it, it holds 1 images"):
        Folder(str(tmp_path / "data" / "val" / "cat")).open(toys.card(classes=2))


def test_images_without_class_folders_have_no_labels(toys, folders):
    flat = folders("cat") / "cat"
    images = Folder(str(flat), labelled=False).open(toys.card())
    assert found(images) == {0: NO_LABEL}


# --- pixels -----------------------------------------------------------------------------------


def pixels_of(folder, toys, save, channels=3):
    (folder / "a").mkdir()
    save(folder / "a")
    card = toys.card() if channels == 3 else toys.card(size=(1, 8, 8), mean=(0.5,), std=(0.5,))
    return Folder(str(folder), labelled=False).open(card).batch([0])[0][0]


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("name", ["0.png", "0.tif", "0.pgm"])
def test_sixteen_bits_of_grey(toys, tmp_path, name, channels):
    values = np.full((8, 8), 257 * 100, np.uint16)
    values[0, :3] = 0, 257, 65535

    def save(folder):
        if name.endswith("pgm"):
            head = b"P5\n8 8\n65535\n"
            (folder / name).write_bytes(head + values.astype(">u2").tobytes())
        else:
            Image.fromarray(values).save(folder / name)

    stored = pixels_of(tmp_path, toys, save, channels)
    assert stored.shape[0] == channels
    assert (stored[:, 0, :4] == torch.tensor([0, 1, 255, 100])).all()


@pytest.mark.parametrize(("kind", "word"), [(np.float32, "floats"), (np.int32, "32-bit")])
def test_values_without_a_white_are_refused_by_name(toys, tmp_path, kind, word):
    with pytest.raises(DreamkitError, match=rf"x\.tif cannot be read: it holds {word}"):
        pixels_of(
            tmp_path,
            toys,
            lambda folder: Image.fromarray(np.ones((8, 8), kind)).save(folder / "x.tif"),
        )


def palette(folder):
    image = Image.new("P", (8, 8), 1)
    image.putpalette([0, 0, 0, 10, 20, 30])
    image.save(folder / "0.png", transparency=b"\xff\x00")


def moving(folder):
    first, second = (Image.new("RGB", (8, 8), (10 * i, 20 * i, 30 * i)) for i in (1, 2))
    first.save(folder / "0.gif", save_all=True, append_images=[second])


@pytest.mark.parametrize(
    ("save", "expected"),
    [
        (palette, (10, 20, 30)),
        (moving, (10, 20, 30)),
        (lambda f: Image.new("RGBA", (8, 8), (10, 20, 30, 0)).save(f / "0.png"), (10, 20, 30)),
        (lambda f: Image.new("LA", (8, 8), (10, 99)).save(f / "0.png"), (10, 10, 10)),
        (lambda f: Image.new("1", (8, 8), 1).save(f / "0.png"), (255, 255, 255)),
        (lambda f: Image.new("CMYK", (8, 8), (245, 235, 225, 0)).save(f / "0.tif"), (10, 20, 30)),
    ],
    ids=["palette", "gif", "rgba", "la", "bits", "cmyk"],
)
def test_other_kinds_of_pictures(toys, tmp_path, save, expected):
    stored = pixels_of(tmp_path, toys, save)
    assert stored[:, 3, 3].tolist() == list(expected)
