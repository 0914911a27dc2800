"""Reading what a checkpoint holds, without importing or running anything that it names."""

from __future__ import annotations

import pickle
import pickletools
import re
import warnings
import zipfile
from _compat_pickle import IMPORT_MAPPING, NAME_MAPPING
from collections import OrderedDict
from pathlib import Path
from typing import IO, Any

import safetensors.torch
import torch

from dreamkit.errors import DreamkitError
from dreamkit.teachers.file_kinds import strange_kind
from dreamkit.wording import first_line

CURE = (
    "Save the state dict alone, in the environment that wrote it: "
    "torch.save(model.state_dict(), path) or, better, "
    "safetensors.torch.save_file(model.state_dict(), path)"
)
_DEEDS = re.compile(
    r"(os|posix|nt|sys|subprocess|shutil|socket|importlib|runpy|ctypes|pty|webbrowser|io|_io|pip"
    r"|pickle|urllib)\..*|builtins\.(eval|exec|compile|open|__import__|breakpoint"
    r"|input)|torch\.(load|hub\..*|jit\..*)"
)
"""What no training leaves in a checkpoint. None of it would run; its reader had better know."""
_FILLED = re.compile(
    r"Can only (?P<how>SETITEM|append).* got <class '(?P<named>[^']+)'>", re.DOTALL
)
"""How torch says that it met items of a list or of a mapping of a class of its own."""


class StandIn:
    """Takes the place of an object whose class is not torch's; it does nothing.

    Args:
        inside: ignored.
    """

    def __init__(self, *inside: Any) -> None:
        pass

    def __new__(cls, *inside: Any) -> Any:
        """Return one for any arguments."""
        return super().__new__(cls)

    def __setstate__(self, state: Any) -> None:
        """Leave the object's state unread."""


class _ListStandIn(StandIn):
    """For lists of a class of their own."""

    def __new__(cls, *inside: Any) -> Any:
        """Return a list to be filled."""
        return []


class _MappingStandIn(StandIn):
    """For mappings of a class of their own: what they hold may be a state dict."""

    def __new__(cls, *inside: Any) -> Any:
        """Return a mapping to be filled."""
        return OrderedDict()


def named(stand_in: StandIn) -> str:
    """Return the name of the class that an object would have."""
    kind = type(stand_in)
    return f"{kind.__module__}.{kind.__qualname__}"


def read_checkpoint(path: Path) -> Any:
    """Return what a file of weights holds: safetensors, or what ``torch.save`` writes.

    Tensors, numbers, texts and containers are read by torch's restricted unpickler. Any other
    object is a ``StandIn``: its class is neither imported nor called.

    Raises:
        DreamkitError: the file is not readable as weights, or asks to run what no checkpoint needs.
    """
    try:
        kind = strange_kind(path)
        if kind is None and _is_safetensors(path):
            return safetensors.torch.load_file(path)
        if kind is None:
            return _unpickled(path)
    except pickle.UnpicklingError as error:
        if _reason(error).startswith("Unsupported operand"):
            raise DreamkitError(
                f"{path}: it is pickled by another protocol than torch.save's own, which torch "
                f"loads by running its code alone. {CURE}, without pickle_protocol"
            ) from error
        raise DreamkitError(
            f"{path}: refused: it pickles more than data ({first_line(_reason(error))}), and "
            f"loading that would run its code. {CURE}"
        ) from error
    except DreamkitError:
        raise
    except Exception as error:  # a damaged file fails in as many ways as it has bytes
        reason = first_line(error) or type(error).__name__
        if isinstance(error, KeyError):  # a byte that is no operation of pickle's
            reason = "neither torch.save nor safetensors wrote it"
        raise DreamkitError(f"{path}: cannot be read as weights: {reason}") from error
    raise DreamkitError(f"{path} is {kind}")


def _is_safetensors(path: Path) -> bool:
    """Whether a file begins as safetensors does, whatever it is called."""
    with path.open("rb") as file:
        size, brace = int.from_bytes(file.read(8), "little"), file.read(1)
    return path.suffix == ".safetensors" or (brace == b"{" and size < path.stat().st_size)


def _unpickled(path: Path) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # on pickle protocols; what matters is said below
        # By its bytes: of a path, torch goes by the suffix.
        with path.open("rb") as file:
            try:
                return torch.load(file, map_location="cpu", weights_only=True)
            except pickle.UnpicklingError:
                classes = dict.fromkeys(sorted(_named_classes(path)), StandIn)
            while True:
                file.seek(0)
                stand_ins: list[Any] = [_stand_in(*c, base) for c, base in classes.items()]
                try:
                    with torch.serialization.safe_globals(stand_ins):
                        return torch.load(file, map_location="cpu", weights_only=True)
                except pickle.UnpicklingError as error:
                    if not _filled_otherwise(classes, error):
                        raise


def _filled_otherwise(
    classes: dict[tuple[str, str], type[StandIn]], error: pickle.UnpicklingError
) -> bool:
    """Note that a class is one of lists or of mappings, if that is what the unpickler met."""
    filled = _FILLED.search(_reason(error))
    if filled is None:
        return False
    kind = _ListStandIn if filled["how"].startswith("append") else _MappingStandIn
    for (module, name), base in classes.items():
        if f"{module}.{name}" == filled["named"] and base is StandIn:
            classes[module, name] = kind
            return True
    return False


def _reason(error: pickle.UnpicklingError) -> str:
    """Return the unpickler's own words: torch puts advice to run the code before them."""
    return str(error).rpartition("WeightsUnpickler error:")[2].strip()


def _stand_in(module: str, name: str, base: type[StandIn]) -> type[Any]:
    """Return a class of that name, to be allowed in place of the true one.

    Raises:
        DreamkitError: it is no class of data.
    """
    whole = f"{module}.{name}"
    if _DEEDS.fullmatch(whole):
        raise pickle.UnpicklingError(f"it asks for {whole}")
    return type(name, (base,), {"__module__": module, "__qualname__": name})


def _named_classes(path: Path) -> set[tuple[str, str]]:
    """Return module and name of whatever a file would import."""
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            content = next(name for name in archive.namelist() if name.endswith("/data.pkl"))
            with archive.open(content) as file:
                return _globals(file)
    with path.open("rb") as file:
        for _ in range(3):  # its magic number, version and byte order
            _globals(file)
        return _globals(file)


def _globals(pickled: IO[bytes]) -> set[tuple[str, str]]:
    """Return what one pickle would import, and leave the file behind it."""
    found = set()
    for operation, argument, _ in pickletools.genops(pickled):
        if operation.name == "GLOBAL":
            module, _, name = str(argument).partition(" ")
            # As torch reads files of Python 2.
            module, name = NAME_MAPPING.get(
                (module, name), (IMPORT_MAPPING.get(module, module), name)
            )
            found.add((module, name))
    return found
