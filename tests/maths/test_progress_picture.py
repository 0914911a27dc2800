"""The picture of the dreams so far: when it is drawn, what it shows, and to whom."""

from __future__ import annotations

import io
import sys
from types import ModuleType

import pytest
import torch
from PIL import Image
from rich.console import Console

from dreamkit import distributed
from dreamkit.card import Card
from dreamkit.registry import Term
from dreamkit.regularizers.bn_feature import BNFeature
from dreamkit.report.figures import thumbnails
from dreamkit.report.notebook import LivePicture
from dreamkit.report.run_log import MemoryLog
from dreamkit.stages import progress_picture
from dreamkit.stages.dreaming import dream_into_store
from dreamkit.stages.progress_picture import CELLS, ProgressPicture
from dreamkit.store.dreams import DreamStore
from dreamkit.store.run_directory import RunDirectory
from dreamkit.synthesizers.deepinversion import DeepInversion
from dreamkit.synthesizers.engine import Engine
from dreamkit.synthesizers.stage import Stage
from dreamkit.types import DreamsPictured, StoredImages, Synthesis

CARD = Card("c", (1, 8, 8), (0.5,), (0.5,), 1000, "test")


class Clock:
    """Stands still until it is set."""

    now = 0.0

    def __call__(self):
        return self.now


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def log():
    return MemoryLog()


@pytest.fixture
def pictures(log):
    seen = []
    log.listen(lambda event: seen.append(event) if isinstance(event, DreamsPictured) else None)
    return seen


@pytest.fixture
def picture(tmp_path, log, clock, pictures):
    return ProgressPicture(DreamStore(tmp_path / "dreams", {}), CARD, log, clock)


def batch(value, count=4, first=0):
    images = torch.full((count, 1, 8, 8), value, dtype=torch.uint8)
    return StoredImages(images, torch.arange(first, first + count), torch.zeros(count, 3))


def values(event):
    """Return the grey values of the pictured images; 128 is between them."""
    with Image.open(io.BytesIO(event.png)) as picture:
        return {value for _, value in picture.getcolors(2**24)} - {128}


def test_a_batch_at_work_is_seen_every_few_seconds(picture, clock, pictures, tmp_path):
    images, labels = torch.full((4, 1, 8, 8), 1.0), torch.arange(4)
    picture.see(images, labels)
    assert pictures == []
    clock.now = 5.0
    picture.see(images, labels)
    picture.see(-images, labels)
    assert [values(event) for event in pictures] == [{255}]
    clock.now = 10.0
    picture.see(-images, labels)
    assert [values(event) for event in pictures] == [{255}, {0}]
    assert pictures[-1].path == tmp_path / "dreams.png"
    assert pictures[-1].path.read_bytes() == pictures[-1].png


def test_a_batch_at_work_may_be_of_any_size(picture, clock, pictures):
    clock.now = 5.0
    picture.see(torch.zeros(3, 1, 4, 6, requires_grad=True), torch.arange(3))
    assert len(pictures) == 1


def test_finished_batches_take_the_place_of_the_one_at_work(picture, clock, pictures):
    clock.now = 5.0
    picture.see(torch.full((4, 1, 8, 8), 1.0), torch.arange(4))
    picture.add(0, batch(10))
    assert values(pictures[-1]) == {10}, "the first is drawn at once"
    picture.add(1, batch(20))
    assert len(pictures) == 2, "more are drawn when it is time"
    clock.now = 60.0
    picture.see(torch.full((4, 1, 8, 8), 1.0), torch.arange(4))
    assert len(pictures) == 2
    picture.add(2, batch(30))
    assert values(pictures[-1]) == {10, 20, 30}
    picture.add(3, batch(40))
    picture.catch_up()
    picture.catch_up()
    assert len(pictures) == 4
    assert values(pictures[-1]) == {10, 20, 30, 40}


def test_every_batch_has_its_part_of_a_picture_that_is_full(picture, pictures):
    for index in range(16):
        picture.add(index, batch(index * 8, count=40, first=index))
    picture.catch_up()
    assert values(pictures[-1]) == {index * 8 for index in range(16)} - {128}
    with Image.open(io.BytesIO(pictures[-1].png)) as drawn:
        assert drawn.size == (10 * 70 + 6, CELLS // 10 * 70 + 6)


def test_a_run_that_goes_on_shows_what_is_there(tmp_path, log, clock, pictures):
    store = DreamStore(tmp_path / "dreams", {})
    store.write(0, batch(10), 1.0, 0.5, {})
    picture = ProgressPicture(store, CARD, log, clock)
    picture.begin()
    clock.now = 5.0
    picture.see(torch.zeros(4, 1, 8, 8), torch.arange(4))
    assert pictures == []
    picture.add(1, batch(20))
    assert values(pictures[-1]) == {10, 20}


def test_a_run_that_goes_on_shows_a_sample_of_all_that_is_there(tmp_path, log, clock, pictures):
    whole = ProgressPicture(DreamStore(tmp_path / "dreams", {}), CARD, log, clock)
    store = DreamStore(tmp_path / "dreams", {})
    for index in range(16):
        store.write(index, batch(index * 8, count=40, first=index), 1.0, 0.5, {})
        whole.add(index, batch(index * 8, count=40, first=index))
    again = ProgressPicture(store, CARD, log, clock)
    again.begin()
    for picture in (whole, again):
        picture.catch_up()
    assert values(pictures[-1]) == {index * 8 for index in range(16)} - {128}
    assert pictures[-1].png == pictures[-2].png, "as that of a run that was not interrupted"


def test_what_takes_long_to_draw_is_drawn_seldom(tmp_path, log, pictures):
    ticks = iter([0.0, 5.0, 5.0, 7.0, 100.0, 206.9, 207.1, 207.1, 207.1])
    picture = ProgressPicture(DreamStore(tmp_path / "dreams", {}), CARD, log, lambda: next(ticks))
    for drawn in (1, 1, 1, 2):  # two seconds are a hundredth of 200
        picture.see(torch.zeros(4, 1, 8, 8), torch.arange(4))
        assert len(pictures) == drawn


def test_other_ranks_draw_nothing(tmp_path, log, clock, pictures, monkeypatch):
    monkeypatch.setattr(distributed, "is_first", lambda: False)
    picture = ProgressPicture(DreamStore(tmp_path / "dreams", {}), CARD, log, clock)
    clock.now = 5.0
    picture.see(torch.zeros(4, 1, 8, 8), torch.arange(4))
    picture.add(0, batch(10))
    picture.catch_up()
    assert pictures == []
    assert not (tmp_path / "dreams.png").exists()


def test_a_picture_that_cannot_be_written_does_not_end_the_run(tmp_path, log, clock, pictures):
    (tmp_path / "file").touch()
    picture = ProgressPicture(DreamStore(tmp_path / "file" / "dreams", {}), CARD, log, clock)
    picture.add(0, batch(10))
    clock.now = 60.0
    picture.add(1, batch(20))
    (note,) = log.notes
    assert "no more pictures" in note
    assert pictures == []


def test_thumbnails_average_and_keep_the_shape():
    images = torch.zeros(2, 3, 8, 4, dtype=torch.uint8)
    images[:, :, ::2] = 100
    small = thumbnails(images, 4)
    assert small.shape == (2, 3, 4, 2)
    assert small.unique().tolist() == [50]
    assert thumbnails(images, 8) is images


# --- within a run -----------------------------------------------------------------------------


def synthesis(images, batch_size):
    terms = (Term("bn_feature", 1.0, BNFeature()),)
    engine = Engine(precision="float32", compile=False)
    stages = (Stage(2, size=4), Stage(2))
    return Synthesis(DeepInversion(terms, images, stages, batch_size, engine=engine), {})


def test_a_run_draws_what_it_is_at(toys, tmp_path, monkeypatch):
    monkeypatch.setattr(progress_picture, "SECONDS", 0.0)
    monkeypatch.setattr(progress_picture, "SHARE", 1e9)
    context, seen = toys.context(tmp_path), []
    context.log.listen(lambda event: seen.append(event))
    content = dream_into_store(toys.teacher(toys.two_bn()), synthesis(4, 2), context)
    drawn = [event for event in seen if isinstance(event, DreamsPictured)]
    assert len(drawn) == 2 * 2 + 2, "each step of the first batch, and each batch"
    with Image.open(tmp_path / "dreams.png") as picture:
        shown = {pixel for _, pixel in picture.getcolors(2**24)}
    assert {
        tuple(p) for p in content.batch(range(4))[0].permute(0, 2, 3, 1).reshape(-1, 3).tolist()
    } <= shown


def test_dreams_are_the_same_whether_anyone_looks(toys, tmp_path, monkeypatch):
    teacher = toys.teacher(toys.two_bn())
    before = dream_into_store(teacher, synthesis(4, 2), toys.context(tmp_path / "a")).batch(
        range(4)
    )
    monkeypatch.setattr(progress_picture, "SECONDS", 0.0)
    monkeypatch.setattr(progress_picture, "SHARE", 1e9)
    after = dream_into_store(teacher, synthesis(4, 2), toys.context(tmp_path / "b")).batch(range(4))
    assert torch.equal(before[0], after[0])


def test_a_run_that_came_to_nothing_leaves_no_picture(tmp_path):
    directory = RunDirectory(tmp_path / "run", "name: a\n")
    directory.claim()
    for place in ("dreams.png", "steps/1/dreams.png"):
        (tmp_path / "run" / place).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "run" / place).write_bytes(b"")
    directory.release()
    directory.withdraw()
    assert not (tmp_path / "run").exists()


# --- to whom ----------------------------------------------------------------------------------


def test_a_line_tells_once_where_it_lies(tmp_path):
    told = io.StringIO()
    live = LivePicture(Console(file=told))
    for _ in range(2):
        live(DreamsPictured(path=tmp_path / "dreams.png", png=b""))
    assert told.getvalue() == f"picture of the dreams so far: {tmp_path / 'dreams.png'}\n"


def test_no_line_names_a_file_that_goes_with_the_call(tmp_path):
    told = io.StringIO()
    LivePicture(Console(file=told), kept=False)(DreamsPictured(path=tmp_path / "d", png=b""))
    assert told.getvalue() == ""


def test_a_notebook_shows_it_in_place(tmp_path, monkeypatch):
    shown, told = [], io.StringIO()

    class Cell:
        def update(self, picture):
            shown.append(("update", picture))

    cells = ModuleType("IPython.display")
    cells.Image = lambda data, format: (data, format)
    cells.display = lambda picture, display_id: shown.append(("display", picture)) or Cell()
    monkeypatch.setitem(sys.modules, "IPython.display", cells)
    console = Console(file=told)
    console.is_jupyter = True
    live = LivePicture(console, kept=False)
    for png in (b"1", b"2"):
        live(DreamsPictured(path=tmp_path / "dreams.png", png=png))
    assert shown == [("display", (b"1", "png")), ("update", (b"2", "png"))]
    assert told.getvalue() == ""
