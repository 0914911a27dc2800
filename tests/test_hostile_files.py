"""Files from others, damaged or made to harm: read, or refused with a message."""

from __future__ import annotations

import copy
import hashlib
import io
import json
import struct
import zlib
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

import dreamkit
from dreamkit import students
from dreamkit.card import Card
from dreamkit.errors import DreamkitError
from dreamkit.plugins import build_registries
from dreamkit.pruning.graph import ChannelGraph
from dreamkit.recipe import build_entry
from dreamkit.sources.folder import Folder
from dreamkit.store.artifact import SPECIFICATION, WEIGHTS, write_artifact
from dreamkit.teachers.checkpoint_file import read_checkpoint
from dreamkit.teachers.weights import find_states

MUTATED = settings(
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
CARD = Card("digits", (3, 8, 8), (0.5,) * 3, (0.5,) * 3, 10, "a test")


def damaged(data: st.DataObject, content: bytes) -> bytes:
    """Overwrite, cut, double or drop a few stretches of a file."""
    changed = bytearray(content)
    for _ in range(data.draw(st.integers(1, 4), label="changes")):
        if not changed:
            break
        # Headers are where the numbers stand that others believe.
        end = data.draw(st.sampled_from([min(64, len(changed)), len(changed)]), label="up to")
        first = data.draw(st.integers(0, end - 1), label="at")
        size = data.draw(st.integers(1, 8), label="bytes")
        action = data.draw(st.sampled_from(["write", "cut", "double", "drop"]), label="action")
        if action == "write":
            changed[first : first + size] = data.draw(st.binary(min_size=size, max_size=size))
        elif action == "cut":
            del changed[first:]
        elif action == "double":
            changed[first:first] = changed[first : first + size]
        else:
            del changed[first : first + size]
    return bytes(changed)


def read_or_refused(read, path: Path) -> bool:
    """Read a file; return whether it is read, or refused with an error that names it."""
    refusal = None
    try:
        read(path)
    except DreamkitError as error:
        refusal = str(error)
    return refusal is None or str(path) in refusal


# --- images -----------------------------------------------------------------------------------


def read_image(path: Path) -> None:
    images, _ = Folder(str(path.parents[1]), labelled=False).open(CARD).batch([0])
    assert images.shape == (1, 3, 8, 8)
    assert images.dtype == torch.uint8


def an_image(tmp_path: Path, name: str, content: bytes) -> Path:
    path = tmp_path / "images" / "all" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


def encoded(kind: str) -> bytes:
    pixels = torch.randint(0, 256, (12, 16, 3), generator=torch.Generator().manual_seed(0))
    buffer = io.BytesIO()
    Image.fromarray(pixels.to(torch.uint8).numpy()).save(buffer, kind)
    return buffer.getvalue()


def any_image(data, tmp_path) -> bool:
    kind = data.draw(st.sampled_from(["png", "jpeg", "bmp", "webp", "tiff", "ppm"]), label="kind")
    suffix = {"jpeg": "jpg"}.get(kind, kind)
    path = an_image(tmp_path, f"a.{suffix}", damaged(data, encoded(kind)))
    try:
        return read_or_refused(read_image, path)
    finally:
        path.unlink()


@settings(MUTATED, max_examples=100)
@given(data=st.data())
def test_any_image_is_decoded_or_refused(data, tmp_path):
    assert any_image(data, tmp_path)


@pytest.mark.slow
@settings(MUTATED, max_examples=5000)
@given(data=st.data())
def test_five_thousand_images_are_decoded_or_refused(data, tmp_path):
    assert any_image(data, tmp_path)


def png(width: int, height: int) -> bytes:
    """Return a PNG of black pixels: a thousandth of what it takes once decoded."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        check = struct.pack(">I", zlib.crc32(kind + content))
        return struct.pack(">I", len(content)) + kind + content + check

    header = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    rows = zlib.compress(bytes(1 + (width + 7) // 8) * height)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")
    )


@pytest.mark.parametrize(
    ("width", "height", "reason"),
    [
        (20_000, 20_000, "decompression bomb"),
        # Small by itself, and 8 × 16 million pixels once its shorter side is 8.
        (1, 2_000_000, "too long and narrow"),
        (2_000_000, 1, "too long and narrow"),
    ],
)
def test_images_that_take_much_more_room_than_their_files(tmp_path, width, height, reason):
    path = an_image(tmp_path, "bomb.png", png(width, height))
    assert path.stat().st_size < 100_000
    with pytest.raises(DreamkitError, match=reason) as caught:
        read_image(path)
    assert "bomb.png" in str(caught.value)


# --- weights ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def weight_files(tmp_path_factory) -> dict[str, bytes]:
    import safetensors.torch

    state = {"a.weight": torch.randn(3, 4), "a.bias": torch.zeros(3), "n": torch.tensor(3)}
    folder = tmp_path_factory.mktemp("weights")
    safetensors.torch.save_file(state, folder / "w.safetensors")
    torch.save(state, folder / "w.pth")
    torch.save(state, folder / "old.pth", _use_new_zipfile_serialization=False)
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def any_weights(data, tmp_path, files) -> bool:
    name = data.draw(st.sampled_from(sorted(files)), label="file")
    path = tmp_path / name
    path.write_bytes(damaged(data, files[name]))
    return read_or_refused(lambda file: find_states(str(file), read_checkpoint(file)), path)


@settings(MUTATED, max_examples=150)
@given(data=st.data())
def test_any_weights_are_read_or_refused(data, tmp_path, weight_files):
    assert any_weights(data, tmp_path, weight_files)


@pytest.mark.slow
@settings(MUTATED, max_examples=5000)
@given(data=st.data())
def test_five_thousand_weights_are_read_or_refused(data, tmp_path, weight_files):
    assert any_weights(data, tmp_path, weight_files)


# --- students ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def student(tmp_path_factory) -> Path:
    """Return a student of which half the channels of a layer are gone."""
    builder = {"source": "cifar", "model": "resnet20", "num_classes": 10}
    model = build_entry(build_registries(), "teachers", builder).build()
    graph = ChannelGraph(model, (3, 32, 32))
    graph.remove({"layer1.0.conv1": range(8, 16)})
    pruning_record = graph.pruning_record
    folder = tmp_path_factory.mktemp("student")
    write_artifact(folder, model, CARD, builder, pruning_record.to_json())
    return folder


def any_student(data, tmp_path, student, mutate) -> bool:
    """Load a student whose specification or weights were changed."""
    specification = json.loads((student / SPECIFICATION).read_text())
    weights = (student / WEIGHTS).read_bytes()
    folder = tmp_path / "student"
    folder.mkdir(exist_ok=True)
    if data.draw(st.booleans(), label="the specification"):
        mutate(data, specification)
        text = json.dumps(specification, skipkeys=True)
        if data.draw(st.booleans(), label="as bytes"):
            (folder / SPECIFICATION).write_bytes(damaged(data, text.encode(errors="replace")))
        else:
            (folder / SPECIFICATION).write_text(text, encoding="utf-8", errors="replace")
    else:
        weights = damaged(data, weights)
        if data.draw(st.booleans(), label="with its hash"):
            specification["weights_sha256"] = hashlib.sha256(weights).hexdigest()
        (folder / SPECIFICATION).write_text(json.dumps(specification))
    (folder / WEIGHTS).write_bytes(weights)
    return read_or_refused(dreamkit.load_student, folder)


@pytest.fixture
def once(monkeypatch):
    """Look for plugins once, not for every student."""
    made = build_registries()
    monkeypatch.setattr(students, "build_registries", lambda: copy.copy(made))


@settings(MUTATED, max_examples=100)
@given(data=st.data())
def test_any_student_is_loaded_or_refused(data, tmp_path, student, mutate, once):
    assert any_student(data, tmp_path, student, mutate)


@pytest.mark.slow
@settings(MUTATED, max_examples=5000)
@given(data=st.data())
def test_five_thousand_students_are_loaded_or_refused(data, tmp_path, student, mutate, once):
    assert any_student(data, tmp_path, student, mutate)


def test_the_student_itself_is_loaded(student):
    model = dreamkit.load_student(student)
    assert model.layer1[0].conv1.out_channels == 8
    assert model(torch.zeros(1, 3, 32, 32)).shape == (1, 10)
