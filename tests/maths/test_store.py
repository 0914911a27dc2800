"""The dream store on disk: what it holds, what it refuses, and that writes are whole."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from torchvision.datasets import ImageFolder

from dreamkit.card import Card
from dreamkit.errors import OptionError, RunDirectoryError, StoreError
from dreamkit.flat_state import hash_state
from dreamkit.store import shard
from dreamkit.store.atomic import write_atomically, write_json
from dreamkit.store.calibration_sets import write_calibration_set
from dreamkit.store.dreams import DreamStore, holds_dreams
from dreamkit.store.picture_files import export_dreams
from dreamkit.store.run_directory import RunDirectory, read_report, stored_preset
from dreamkit.store.shard import Header, read_header
from dreamkit.store.source import Dreams
from dreamkit.types import StoredImages

SETTINGS = {"seed": 1, "teacher_sha256": "t", "synthesis": {"images": 4, "size": [8, 8]}}


def content(first=0, count=2, channels=3):
    total = count * channels * 4 * 5
    pixels = ((torch.arange(total) + 17 * first) % 256).to(torch.uint8)
    logits = torch.linspace(-3, 3, count * 3).view(count, 3)
    return StoredImages(pixels.view(count, channels, 4, 5), torch.arange(count) % 3, logits)


def filled(folder, count=2):
    store = DreamStore(folder, SETTINGS)
    for index in range(count):
        store.write(
            index, content(index), seconds=1.5, loss=0.25, statistics_distance={"bn": 2.0 + index}
        )
    return store


def all_images(store):
    images = store.open()
    return images.batch(range(len(images)))[0]


def leftovers(folder):
    return [p.name for p in folder.rglob("*") if ".tmp" in p.name]


# --- shards -----------------------------------------------------------------------------------


def test_shard_content_and_dtypes(tmp_path):
    filled(tmp_path)
    shard = safetensors.torch.load_file(tmp_path / "shard-000001.safetensors")
    expected = content(1)
    assert {k: v.dtype for k, v in shard.items()} == {
        "images": torch.uint8,
        "labels": torch.int64,
        "teacher_logits": torch.float16,
    }
    assert torch.equal(shard["images"], expected.images)
    assert torch.equal(shard["labels"], expected.labels)
    assert torch.equal(shard["teacher_logits"], expected.teacher_logits.half())


def test_a_shard_tells_what_it_is_and_vouches_for_its_tensors(tmp_path):
    filled(tmp_path)
    assert sorted(os.listdir(tmp_path)) == ["shard-000000.safetensors", "shard-000001.safetensors"]
    path = tmp_path / "shard-000001.safetensors"
    assert read_header(path) == Header(
        kind="shard",
        index=1,
        settings=SETTINGS,
        choices={},
        images=2,
        seconds=1.5,
        loss=0.25,
        statistics_distance={"bn": 3.0},
        carried=False,
        reason=None,
        sha256=hash_state(safetensors.torch.load_file(path)),
    )


def test_read_again(tmp_path):
    filled(tmp_path, 3)
    store = DreamStore(tmp_path)
    assert len(store) == 6
    assert 2 in store
    assert 3 not in store
    assert store.seconds == pytest.approx(4.5)
    opened = store.open()
    assert len(opened) == 6
    assert opened.shape == (3, 4, 5)
    assert opened.labels.tolist() == [0, 1] * 3
    assert opened.teacher_logits.dtype == torch.float16
    assert torch.equal(opened.teacher_logits[2:4], content(1).teacher_logits.half())
    assert torch.equal(all_images(store), torch.cat([content(i).images for i in range(3)]))


def test_batches_cross_shards_in_any_order(tmp_path):
    images, labels = filled(tmp_path, 3).open().batch([5, 0, 2])
    expected = [content(2).images[1], content(0).images[0], content(1).images[0]]
    assert torch.equal(images, torch.stack(expected))
    assert labels.tolist() == [1, 0, 0]


def test_loads_in_the_order_of_batches_not_of_writing(tmp_path):
    store = DreamStore(tmp_path, SETTINGS)
    for index in (2, 0, 1):
        store.write(index, content(index), 1.0, 0.0, {})
    expected = torch.cat([content(i).images for i in range(3)])
    assert torch.equal(all_images(store), expected)
    assert torch.equal(all_images(DreamStore(tmp_path)), expected)


def test_distances_are_averaged_over_images(tmp_path):
    store = DreamStore(tmp_path, SETTINGS)
    assert store.statistics_distance == {}
    store.write(0, content(count=3), 1.0, 0.0, {"bn1": 10.0, "bn2": 1.0})
    store.write(1, content(count=1), 1.0, 0.0, {"bn1": 2.0, "bn2": 5.0})
    expected = {"bn1": (3 * 10 + 1 * 2) / 4, "bn2": (3 * 1 + 1 * 5) / 4}
    assert store.statistics_distance == pytest.approx(expected)
    store.write(2, content(count=5), 1.0, 0.0, {})  # unknown: left out
    assert store.statistics_distance == pytest.approx(expected)
    assert DreamStore(tmp_path).statistics_distance == pytest.approx(expected)


def test_a_damaged_shard_is_named(tmp_path):
    filled(tmp_path)
    path = tmp_path / "shard-000001.safetensors"
    blob = bytearray(path.read_bytes())
    blob[-1] ^= 1
    path.write_bytes(blob)
    with pytest.raises(StoreError, match=r"shard-000001\.safetensors is damaged"):
        DreamStore(tmp_path).open()


def test_a_shard_that_vanishes_is_named(tmp_path):
    store = filled(tmp_path)
    (tmp_path / "shard-000000.safetensors").unlink()
    with pytest.raises(StoreError, match=r"shard-000000.safetensors cannot be read"):
        store.open()
    assert sorted(DreamStore(tmp_path).shards) == [1]


@pytest.mark.parametrize(
    "metadata",
    [None, {"dreamkit": "{}"}, {"dreamkit": "5 0 {}"}, {"other": "5"}],
    ids=repr,
)
def test_a_foreign_file_is_no_shard(tmp_path, metadata):
    path = tmp_path / "shard-000000.safetensors"
    safetensors.torch.save_file({"images": torch.zeros(1)}, path, metadata)
    assert DreamStore(tmp_path, SETTINGS).damaged() == [path.name]
    with pytest.raises(StoreError, match=r"shard-000000.safetensors is damaged"):
        DreamStore(tmp_path).open()


def test_a_shard_of_another_format_is_refused(tmp_path, monkeypatch):
    with monkeypatch.context() as patched:
        patched.setattr(shard, "FORMAT", 4)
        filled(tmp_path)
    with pytest.raises(StoreError, match="is of format 4, and this version of dreamkit reads 6"):
        DreamStore(tmp_path)


def test_a_store_of_the_format_before_is_refused_and_left_as_it_is(tmp_path):
    told = {"format": 4, "sha256": "0", "settings": SETTINGS, "index": 0, "carried": False}
    path = tmp_path / "shard-000000.safetensors"
    safetensors.torch.save_file(
        {"images": torch.zeros(1)}, path, {"dreamkit": json.dumps(told, sort_keys=True)}
    )
    (tmp_path / "manifest.json").write_text('{"format": 4}')
    for settings in (None, SETTINGS):
        with pytest.raises(StoreError, match=r"is of format 4, and this version .* reads 6"):
            DreamStore(tmp_path, settings).mend()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["manifest.json", path.name]


def test_a_renamed_shard_does_not_stand_for_another_batch(tmp_path):
    filled(tmp_path, 1)
    (tmp_path / "shard-000000.safetensors").rename(tmp_path / "shard-000003.safetensors")
    store = DreamStore(tmp_path, SETTINGS)
    assert len(store) == 0
    assert store.damaged() == ["shard-000003.safetensors"]


def test_a_changed_byte_is_found_wherever_it_is(tmp_path):
    filled(tmp_path, 1)
    path = tmp_path / "shard-000000.safetensors"
    blob = path.read_bytes()
    for place in range(len(blob)):
        path.write_bytes(blob[:place] + bytes([blob[place] ^ 4]) + blob[place + 1 :])
        assert DreamStore(tmp_path, SETTINGS).damaged() == [path.name], place


def test_thousands_of_shards_open_without_being_read(tmp_path, monkeypatch):
    filled(tmp_path, 3)
    monkeypatch.setattr(safetensors.torch, "load_file", fail)
    assert len(DreamStore(tmp_path)) == 6


def test_a_shard_is_verified_once(tmp_path, monkeypatch):
    filled(tmp_path, 3)
    hashed = []

    def counted(state):
        hashed.append(1)
        return hash_state(state)

    monkeypatch.setattr(shard, "hash_state", counted)
    store = DreamStore(tmp_path, SETTINGS)
    store.mend()
    store.open()
    store.read(1)
    store.write(3, content(3), 1.0, 0.0, {})
    store.open()
    assert len(hashed) == 4  # the last for the header of the new one


def test_no_dreams(tmp_path):
    with pytest.raises(StoreError, match="holds no dreams"):
        DreamStore(tmp_path)
    with pytest.raises(StoreError, match="holds no dreams"):
        DreamStore(tmp_path, SETTINGS).open()


def test_other_settings_are_refused_naming_those_that_differ(tmp_path):
    filled(tmp_path)
    other = SETTINGS | {"seed": 2, "extra": 1}
    with pytest.raises(StoreError, match=r"\(extra, seed\)"):
        DreamStore(tmp_path, other)


def test_settings_that_differ_only_before_json_are_the_same(tmp_path):
    filled(tmp_path)
    tuples = SETTINGS | {"synthesis": {"images": 4, "size": (8, 8)}}
    assert len(DreamStore(tmp_path, tuples)) == 4
    with pytest.raises(StoreError, match=r"\(seed\)"):  # and not synthesis too
        DreamStore(tmp_path, tuples | {"seed": 2})


# --- whole or not at all ----------------------------------------------------------------------


def fail(*args, **kwargs):
    raise OSError(28, "No space left on device")


@pytest.mark.parametrize(
    ("owner", "name"), [(Path, "replace"), (os, "fsync")], ids=["replace", "fsync"]
)
def test_a_failing_write_leaves_the_old_file_and_no_other(tmp_path, monkeypatch, owner, name):
    path = tmp_path / "x.json"
    write_atomically(path, b"old")
    monkeypatch.setattr(owner, name, fail)
    with pytest.raises(RunDirectoryError, match="No space left"):
        write_atomically(path, b"new")
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["x.json"]


def test_an_interrupted_write_leaves_no_other_file(tmp_path, monkeypatch):
    def interrupt(descriptor):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupt)
    with pytest.raises(KeyboardInterrupt):
        write_atomically(tmp_path / "x.json", b"new")
    assert os.listdir(tmp_path) == []


def test_write_json(tmp_path):
    write_json(tmp_path / "x.json", {"a": [1, 2.5], "b": None})
    assert json.loads((tmp_path / "x.json").read_text()) == {"a": [1, 2.5], "b": None}
    assert os.listdir(tmp_path) == ["x.json"]


@pytest.mark.parametrize("at", [0, 1], ids=["the shard", "the state"])
def test_a_batch_that_cannot_be_written_is_not_in_the_store(tmp_path, monkeypatch, at):
    store = DreamStore(tmp_path, SETTINGS)
    store.write(0, content(0), 1.0, 0.0, {}, {"w": torch.zeros(1)})
    calls = []
    replace = Path.replace

    def fail_once(self, target):
        calls.append(target)
        if len(calls) == at + 1:
            fail()
        return replace(self, target)

    monkeypatch.setattr(Path, "replace", fail_once)
    with pytest.raises(RunDirectoryError, match="No space left"):
        store.write(1, content(1), 1.0, 0.0, {}, {"w": torch.ones(1)})
    assert 1 not in store
    assert leftovers(tmp_path) == []
    again = DreamStore(tmp_path, SETTINGS)
    assert len(again) == 2
    assert torch.equal(all_images(again), content(0).images)
    assert again.read_state()["w"].item() == 0


# --- export -----------------------------------------------------------------------------------


@pytest.mark.parametrize("channels", [1, 3])
def test_export_is_read_by_image_folder_with_equal_pixels(tmp_path, channels):
    store = DreamStore(tmp_path / "dreams", SETTINGS)
    store.write(0, content(0, 4, channels), 1.0, 0.0, {})
    store.write(1, content(9, 2, channels), 1.0, 0.0, {})
    assert export_dreams(store, tmp_path / "out", None) == 6
    expected = all_images(store)
    # Labels are 0 1 2 0 | 0 1, and ImageFolder lists class by class, in order of file name.
    order = [0, 3, 4, 1, 5, 2]
    found = ImageFolder(str(tmp_path / "out"))
    assert found.classes == ["0", "1", "2"]
    assert found.targets == [0, 0, 0, 1, 1, 2]
    for (image, _), number in zip(found, order, strict=True):
        pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)
        assert torch.equal(pixels, expected[number].expand(3, 4, 5))


def test_a_calibration_set_is_what_the_network_takes_with_how_to_normalise(tmp_path):
    images, card = content(0, 5), Card("it", (3, 4, 5), (0.5, 0.25, 0.0), (0.5, 1, 2), 3, "here")
    assert write_calibration_set(images, tmp_path / "npy", card, "npy") == 5
    array = np.load(tmp_path / "npy" / "images.npy")
    assert (array.dtype, array.shape) == (np.float32, (5, 3, 4, 5))
    pixel = images.images[4, 1, 2, 3].item()
    assert array[4, 1, 2, 3] == pytest.approx((pixel / 255 - 0.25) / 1, abs=1e-6)
    assert np.load(tmp_path / "npy" / "labels.npy").tolist() == [0, 1, 2, 0, 1]
    told = json.loads((tmp_path / "npy" / "normalisation.json").read_text())
    assert (told["mean"], told["std"], told["size"]) == ([0.5, 0.25, 0.0], [0.5, 1, 2], [3, 4, 5])
    assert (told["images"], told["normalised"], told["layout"]) == (5, True, "NCHW")
    write_calibration_set(images, tmp_path / "tensors", card, "tensors")
    found = safetensors.torch.load_file(tmp_path / "tensors" / "dreams.safetensors")
    assert torch.equal(found["images"], images.images)
    assert torch.equal(found["labels"], images.labels)
    write_calibration_set(images, tmp_path / "png", card, "imagefolder")
    assert len(ImageFolder(str(tmp_path / "png"))) == 5
    for kind in ("tensors", "png"):
        told = json.loads((tmp_path / kind / "normalisation.json").read_text())
        assert told["normalised"] is False
    for kind in ("npy", "tensors", "imagefolder"):
        with pytest.raises(StoreError, match="not empty"):
            write_calibration_set(images, tmp_path / "npy", card, kind)


def test_export_names_classes_so_that_their_order_is_the_teachers(tmp_path):
    store = DreamStore(tmp_path / "dreams", SETTINGS)
    logits = torch.zeros(3, 12)
    labels = torch.tensor([2, 10, 0])
    store.write(0, StoredImages(content(0, 3).images, labels, logits), 1.0, 0.0, {})
    names = [f"c/{12 - i}" for i in range(12)]  # not alphabetical, and no name for a folder
    export_dreams(store, tmp_path / "out", names)
    assert sorted(os.listdir(tmp_path / "out")) == ["00_c_12", "02_c_10", "10_c_2"]


def test_export_refuses_a_folder_that_is_not_empty(tmp_path):
    store = filled(tmp_path / "dreams")
    out = tmp_path / "out"
    out.mkdir()
    (out / "mine.txt").write_text("keep")
    with pytest.raises(StoreError, match="not empty"):
        export_dreams(store, out, None)
    assert os.listdir(out) == ["mine.txt"]


# --- what is lost or damaged ------------------------------------------------------------------


def flip_a_bit(path):
    blob = bytearray(path.read_bytes())
    blob[-3] ^= 1
    path.write_bytes(blob)


def test_shards_of_several_runs_are_refused(tmp_path):
    filled(tmp_path / "a")
    DreamStore(tmp_path / "b", SETTINGS | {"seed": 9}).write(2, content(2), 1.0, 0.0, {})
    name = "shard-000002.safetensors"
    (tmp_path / "b" / name).replace(tmp_path / "a" / name)
    with pytest.raises(StoreError, match=r"made with other settings \(seed\)"):
        DreamStore(tmp_path / "a", SETTINGS)
    with pytest.raises(StoreError, match=rf"several runs: {name} .* \(seed\)"):
        DreamStore(tmp_path / "a")


def test_what_the_machine_chose_is_read_again(tmp_path):
    store = DreamStore(tmp_path, SETTINGS)
    store.choices = {"precision": "float32"}
    store.write(0, content(0), 1.5, 0.25, {})
    assert DreamStore(tmp_path, SETTINGS).choices == {"precision": "float32"}


def test_what_another_rank_wrote_is_taken_in(tmp_path):
    mine, others = DreamStore(tmp_path, SETTINGS), DreamStore(tmp_path, SETTINGS)
    mine.write(0, content(0), 1.0, 0.0, {})
    others.write(1, content(1), 1.0, 0.0, {})
    others.skip(2, 2, "it overflowed")
    mine.refresh(range(4))
    assert sorted(mine.shards) == [0, 1]
    assert mine.skipped[2].reason == "it overflowed"
    assert torch.equal(all_images(mine), torch.cat([content(i).images for i in range(2)]))


def test_a_skipped_batch_is_tried_again_without_its_file(tmp_path):
    store = filled(tmp_path, 1)
    store.skip(1, 2, "it overflowed")
    again = DreamStore(tmp_path, SETTINGS)
    assert not again.lacks(4)
    assert (again.skipped[1].reason, again.skipped[1].images) == ("it overflowed", 2)
    (tmp_path / again.skipped[1].file).unlink()
    assert DreamStore(tmp_path, SETTINGS).lacks(4)


def test_a_store_without_dreams_is_withdrawn(tmp_path):
    store = DreamStore(tmp_path / "dreams", SETTINGS)
    store.skip(0, 2, "it overflowed")
    assert not holds_dreams(tmp_path / "dreams")
    store.withdraw()
    assert os.listdir(tmp_path) == []
    store = filled(tmp_path / "dreams", 1)
    store.skip(1, 2, "it overflowed")
    store.withdraw()
    assert len(os.listdir(tmp_path / "dreams")) == 2


@pytest.mark.parametrize("part", [slice(100), slice(0), slice(-1)], ids=["begun", "empty", "cut"])
def test_a_shard_cut_short_is_set_aside(tmp_path, part):
    filled(tmp_path, 2)
    path = tmp_path / "shard-000001.safetensors"
    path.write_bytes(path.read_bytes()[part])
    store = DreamStore(tmp_path, SETTINGS)
    store.mend()
    assert sorted(store.shards) == [0]
    assert "shard-000001.safetensors is damaged: it is set aside" in store.notes[0]
    assert (tmp_path / "shard-000001.safetensors.damaged").is_file()


def test_a_damaged_shard_is_set_aside(tmp_path):
    filled(tmp_path, 3)
    flip_a_bit(tmp_path / "shard-000001.safetensors")
    store = DreamStore(tmp_path, SETTINGS)
    assert store.damaged() == ["shard-000001.safetensors"]
    store.mend()
    assert sorted(store.shards) == [0, 2]
    assert "shard-000001.safetensors is damaged: it is set aside" in store.notes[0]
    assert (tmp_path / "shard-000001.safetensors.damaged").is_file()
    store.write(1, content(1), 1.0, 0.0, {})
    expected = torch.cat([content(i).images for i in range(3)])
    assert torch.equal(all_images(DreamStore(tmp_path)), expected)


def test_what_later_batches_build_on_is_not_set_aside(tmp_path):
    store = DreamStore(tmp_path, SETTINGS)
    for index in range(2):
        store.write(index, content(index), 1.0, 0.0, {}, {"w": torch.ones(1)})
    flip_a_bit(tmp_path / "shard-000000.safetensors")
    with pytest.raises(StoreError, match="remove the folder: later batches build on it"):
        DreamStore(tmp_path, SETTINGS).mend()
    assert (tmp_path / "shard-000000.safetensors").is_file()


def test_a_batch_without_what_it_carries_on_is_dreamed_again(tmp_path):
    store = DreamStore(tmp_path, SETTINGS)
    for index in range(2):
        store.write(index, content(index), 1.0, 0.0, {}, {"w": torch.full((1,), 5.0 + index)})
        if index == 0:
            first = (tmp_path / "state-000001.safetensors").read_bytes()
    (tmp_path / "state-000001.safetensors").write_bytes(first)  # killed before it was removed
    assert DreamStore(tmp_path, SETTINGS).read_state()["w"].item() == 6
    (tmp_path / "state-000002.safetensors").unlink()  # killed before it was written
    again = DreamStore(tmp_path, SETTINGS)
    assert sorted(again.shards) == [0]
    assert again.read_state()["w"].item() == 5


# --- as a source ------------------------------------------------------------------------------


def card(channels):
    return Card("toy", (channels, 4, 5), (0.5,) * channels, (0.5,) * channels, 3, "tests")


def test_dreams_of_an_earlier_run(tmp_path):
    filled(tmp_path / "dreams")
    for path in (tmp_path, tmp_path / "dreams"):
        images = Dreams(str(path)).open(card(3))
        assert len(images) == 4
        chosen, labels = images.batch([3, 0])
        assert torch.equal(chosen, torch.stack([content(1).images[1], content(0).images[0]]))
        assert labels.tolist() == [1, 0]


def test_dreams_that_are_not_there_or_do_not_fit(tmp_path):
    with pytest.raises(OptionError, match="no dreams") as caught:
        Dreams(str(tmp_path))
    assert caught.value.option == "path"
    filled(tmp_path / "dreams")
    with pytest.raises(StoreError, match="3 channels"):
        Dreams(str(tmp_path)).open(card(1))


# --- run directories --------------------------------------------------------------------------


def test_a_run_directory_is_claimed_by_one_recipe(tmp_path):
    folder = tmp_path / "run"
    first = RunDirectory(folder, "name: a\n")
    assert not folder.exists(), "nothing is written before claim"
    assert not first.started
    first.claim()
    assert first.recipe() == "name: a\n"
    assert RunDirectory(folder, "name: a\n").started
    with pytest.raises(RunDirectoryError, match="another recipe"):
        RunDirectory(folder, "name: b\n")


def test_a_folder_of_other_files_is_refused(tmp_path):
    (tmp_path / "thesis.tex").write_text("")
    with pytest.raises(RunDirectoryError, match="not empty and not a run"):
        RunDirectory(tmp_path, "name: a\n")


def test_claim_that_fails_leaves_nothing(tmp_path, monkeypatch):
    directory = RunDirectory(tmp_path / "run", "name: a\n")
    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(RunDirectoryError, match="No space"):
        directory.claim()
    assert os.listdir(tmp_path) == []


def test_the_report_marks_a_run_as_finished(tmp_path):
    directory = RunDirectory(tmp_path / "run", "name: a\n")
    directory.claim()
    assert not directory.finished
    with pytest.raises(RunDirectoryError, match="no finished run"):
        read_report(tmp_path / "run")
    directory.write_report({"metrics": {"x": 1}})
    assert directory.finished
    assert read_report(tmp_path / "run") == {"metrics": {"x": 1}}


# --- what a synthesizer carries on ------------------------------------------------------------


def test_a_state_lies_beside_the_batches_and_the_last_one_counts(tmp_path):
    store = DreamStore(tmp_path, SETTINGS)
    assert store.read_state() == {}
    for index in range(2):
        state = {"generator.w": torch.full((3,), float(index))}
        store.write(index, content(index), 1.0, 0.5, {}, state)
    assert [p.name for p in tmp_path.glob("state-*")] == ["state-000002.safetensors"]
    found = DreamStore(tmp_path, SETTINGS).read_state()
    assert torch.equal(found["generator.w"], torch.ones(3))


def test_a_state_whose_batches_are_gone_is_refused(tmp_path):
    store = DreamStore(tmp_path, SETTINGS)
    for index in range(2):
        store.write(index, content(index), 1.0, 0.5, {}, {"w": torch.zeros(1)})
    (tmp_path / "shard-000000.safetensors").unlink()
    with pytest.raises(StoreError, match="batch 0 is gone"):
        DreamStore(tmp_path, SETTINGS).read_state()


def test_a_damaged_state_is_refused(tmp_path):
    store = DreamStore(tmp_path, SETTINGS)
    store.write(0, content(0), 1.0, 0.5, {}, {"w": torch.zeros(8)})
    path = tmp_path / "state-000001.safetensors"
    blob = bytearray(path.read_bytes())
    blob[-1] ^= 1
    path.write_bytes(blob)
    with pytest.raises(StoreError, match="SHA-256"):
        DreamStore(tmp_path, SETTINGS).read_state()
    with pytest.raises(StoreError, match="remove the folder"):
        DreamStore(tmp_path, SETTINGS).mend()


def test_a_skipped_batch_does_not_break_the_chain(tmp_path):
    store = DreamStore(tmp_path, SETTINGS)
    store.write(0, content(0), 1.0, 0.5, {}, {"w": torch.zeros(1)})
    store.skip(1, 2, "it overflowed")
    store.write(2, content(2), 1.0, 0.5, {}, {"w": torch.ones(1)})
    assert torch.equal(DreamStore(tmp_path, SETTINGS).read_state()["w"], torch.ones(1))


def test_nothing_is_withdrawn_from_a_folder_that_vanished(tmp_path):
    directory = RunDirectory(tmp_path / "run", "name: a\n")
    directory.claim()
    shutil.rmtree(tmp_path / "run")
    directory.withdraw()
    directory.release()
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("kept", ["checkpoints/pruning.safetensors", "latency_lut.json"])
def test_what_is_finished_is_not_withdrawn(tmp_path, kept):
    directory = RunDirectory(tmp_path / "run", "name: a\n")
    directory.claim()
    (tmp_path / "run" / kept).parent.mkdir(exist_ok=True)
    (tmp_path / "run" / kept).touch()
    directory.withdraw()
    directory.release()
    assert (tmp_path / "run" / kept).is_file()
    with pytest.raises(RunDirectoryError) as refused:
        RunDirectory(tmp_path / "run", "name: b\n")
    assert "dreams" not in refused.value.message, "there are none to be used again"


def test_another_recipe_is_told_by_what_differs(tmp_path):
    directory = RunDirectory(tmp_path / "run", "name: a\nseed: 1\nteacher: {x: [1, 2]}\n", "big")
    directory.claim()
    directory.release()
    assert stored_preset(tmp_path / "run") == "big"
    assert RunDirectory(tmp_path / "run", directory.recipe_yaml.partition("\n")[2]).started
    with pytest.raises(RunDirectoryError, match=r"differs in seed, teacher\.x\[1\]\); choose"):
        RunDirectory(tmp_path / "run", "name: a\nseed: 2\nteacher: {x: [1, 3]}\n")


def test_files_of_others_stay_when_a_run_is_withdrawn(tmp_path):
    directory = RunDirectory(tmp_path / "run", "name: a\n")
    directory.claim()
    for name in ("log.jsonl", "notes.txt", "submit.sh"):
        (tmp_path / "run" / name).touch()
    (tmp_path / "run" / "dreams").mkdir()
    directory.withdraw((tmp_path / "run" / "submit.sh").unlink)
    directory.release()
    assert [f.name for f in (tmp_path / "run").iterdir() if f.name[0] != "."] == ["notes.txt"]


def test_what_came_to_nothing_is_withdrawn(tmp_path):
    directory = RunDirectory(tmp_path / "run", "name: a\n")
    directory.claim()
    (tmp_path / "run" / "checkpoints").mkdir()
    (tmp_path / "run" / "log.jsonl").touch()
    directory.withdraw()
    directory.release()
    assert not (tmp_path / "run").exists()
