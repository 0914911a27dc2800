"""What a file or folder is that holds no weights which can be read, and what to do about it."""

from __future__ import annotations

import tarfile
import zipfile
from collections.abc import Iterable
from pathlib import Path

_RESAVED = "and save its state dict: torch.save(model.state_dict(), 'weights.pth')"
_BY_SUFFIX = {
    ".onnx": f"an ONNX file: load the network that it was exported from, {_RESAVED}",
    ".pb": f"a graph of TensorFlow: convert it to a PyTorch network, {_RESAVED}",
    ".caffemodel": f"a network of Caffe: convert it to a PyTorch network, {_RESAVED}",
    ".mlmodel": f"a network of Core ML: load the network that it was exported from, {_RESAVED}",
}
_CONVERT = f"convert it to a PyTorch network, {_RESAVED}"
_UNPACK = "unpack it, and give the path of the weights that are in it"
_BY_FIRST_BYTES = (
    (0, b"\x89HDF\r\n\x1a\n", f"an HDF5 file, as Keras writes them: {_CONVERT}"),
    (4, b"TFL3", f"a TensorFlow Lite file: {_CONVERT}"),
    (0, b"GGUF", "a GGUF file, whose weights are quantised: give those of the float network"),
    (0, b"\x93NUMPY", "an array of NumPy: save a state dict, {name: tensor}, with torch.save"),
    (
        0,
        b"version https://git-lfs",
        "a pointer of Git LFS in place of the file: run 'git lfs pull' in its repository",
    ),
    (0, b"\x1f\x8b", f"packed by gzip: {_UNPACK}"),
    (0, b"BZh", f"packed by bzip2: {_UNPACK}"),
    (0, b"\xfd7zXZ\x00", f"packed by xz: {_UNPACK}"),
    (0, b"\x28\xb5\x2f\xfd", f"packed by zstd: {_UNPACK}"),
    (0, b"7z\xbc\xaf\x27\x1c", f"a 7z archive: {_UNPACK}"),
    (0, b"Rar!", f"a RAR archive: {_UNPACK}"),
)
_LEGACY = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."
"""How files begin that torch.save wrote before it made zip archives."""
_FIRST = 512


def strange_kind(path: Path) -> str | None:
    """Return what a path is if it holds no weights that can be read, and the cure; else None.

    Only its first bytes are read, and what archives list of their contents.

    Args:
        path: exists.

    Raises:
        OSError: it cannot be read.
    """
    if path.is_dir():
        return _kind_of_folder(path)
    with path.open("rb") as file:
        first = file.read(_FIRST)
    if not first:
        return "empty: a download or a copy was cut short"
    for offset, magic, kind in _BY_FIRST_BYTES:
        if first[offset:].startswith(magic):
            return kind
    if first.startswith(b"PK"):
        return _kind_of_zip(path)
    if first[257:262] == b"ustar":
        return _kind_of_tar(path)
    if first.startswith(b"\x80") and not first.startswith(_LEGACY):
        return (
            "written by pickle, not by torch.save, and to load it would run its code: if you "
            "trust it, load it with pickle, and save {name: tensor} with torch.save"
        )
    return _kind_of_text(first, path) or _BY_SUFFIX.get(path.suffix)


def _kind_of_text(first: bytes, path: Path) -> str | None:
    text = first.removeprefix(b"\xef\xbb\xbf").lstrip()
    if text.startswith(b"<"):
        return "a web page or XML, as servers send it in place of a file: download it again"
    if text.startswith(b"{") and path.suffix == ".json":
        if path.name.endswith(".index.json"):
            return f"the index of weights that lie in several files: {_joined('FOLDER')}"
        return "a JSON file, which holds no weights"
    return None


def _joined(folder: str) -> str:
    return (
        "write them into one, with torch and glob imported: "
        f"state = {{}}; [state.update(safetensors.torch.load_file(f)) for f in glob.glob("
        f"'{folder}/*.safetensors')]; torch.save(state, 'weights.pth')"
    )


def _kind_of_zip(path: Path) -> str | None:
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
    except (zipfile.BadZipFile, NotImplementedError, ValueError, UnicodeDecodeError):
        return "cut short or damaged: copy or download it again"
    inside = {name.partition("/")[2] for name in names}
    if "constants.pkl" in inside:
        return (
            "a TorchScript archive, of which loading runs the code: if you trust it, write "
            "torch.save(torch.jit.load(path, map_location='cpu').state_dict(), 'weights.pth')"
        )
    if "archive_format" in inside or "serialized_exported_program.json" in {*names, *inside}:
        return (
            "a program of torch.export: write "
            "torch.save(torch.export.load(path).state_dict, 'weights.pth')"
        )
    if "data.pkl" in inside:
        return None
    if names and all(name.endswith(".npy") for name in names):
        return "arrays of NumPy (.npz): save {name: torch.from_numpy(array)} with torch.save"
    if any(name.endswith(".weights.h5") for name in names):
        return f"a network of Keras: {_CONVERT}"
    return f"an archive ({_few(names)}): {_UNPACK}"


def _kind_of_tar(path: Path) -> str | None:
    try:
        with tarfile.open(path) as archive:
            names = archive.getnames()
    except (tarfile.TarError, EOFError, ValueError):
        return "cut short or damaged: copy or download it again"
    if {"pickle", "storages", "tensors"} <= set(names):
        return (
            "of PyTorch before 0.2, which wrote tar archives: if you trust it, write "
            "torch.save(torch.load(path, weights_only=False), 'weights.pth')"
        )
    return f"an archive ({_few(names)}): {_UNPACK}"


def _kind_of_folder(folder: Path) -> str:
    names = sorted(entry.name for entry in folder.iterdir())
    found = set(names)
    if "artifact.json" in found:
        return "a folder with a saved student: its source is 'student' (source: student, path: ...)"
    if "artifact.json" in _names_in(folder / "student"):
        return (
            "the directory of a run: the source of its student is 'student' "
            f"(source: student, path: {folder / 'student'})"
        )
    if any(name.endswith(".index.json") for name in names):
        return f"a folder with weights in several files: {_joined(str(folder))}"
    if "saved_model.pb" in found:
        return f"a folder of TensorFlow: {_CONVERT}"
    if ".metadata" in found:
        return (
            "a folder of torch.distributed.checkpoint: write it into one file by python -m "
            f"torch.distributed.checkpoint.format_utils dcp_to_torch {folder} weights.pth"
        )
    if "data.pkl" in found:
        return "the unpacked archive of a checkpoint: give the archive itself"
    return f"a folder ({_few(names)}): give the path of the weights themselves"


def _names_in(folder: Path) -> set[str]:
    return {entry.name for entry in folder.iterdir()} if folder.is_dir() else set()


def _few(names: Iterable[str], shown: int = 4) -> str:
    several = list(names)
    return ", ".join(several[:shown]) + (", ..." if len(several) > shown else "") or "empty"
