"""Weights from files: which of what a file holds fits a network, and loading it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from torch import Tensor, nn

from dreamkit.errors import (
    DreamkitError,
    MissingPath,
    OptionError,
    WeightsMismatch,
    WeightsUnavailable,
)
from dreamkit.flat_state import hash_state
from dreamkit.model_state import load_state, tensors_of
from dreamkit.teachers.checkpoint_file import CURE, StandIn, named, read_checkpoint
from dreamkit.teachers.file_kinds import strange_kind
from dreamkit.teachers.key_names import Reading, complaint, fitting, readings
from dreamkit.wording import and_more, first_line

_SUFFIXES = frozenset(
    {".safetensors", ".pth", ".pt", ".th", ".bin", ".ckpt", ".pkl", ".pickle", ".tar", ".h5"}
)
_DEPTH = 3
"""Levels of a checkpoint that are searched for state dicts."""
M = TypeVar("M")
State = dict[str, Any]
"""A state dict as it was found: by name, and perhaps not all of it tensors."""


def is_weights_file(weights: str | None) -> bool:
    """Return whether a ``weights`` option is a path rather than a name on a hub."""
    if weights in {None, "default"}:
        return False
    text = str(weights)
    written_as_one = "/" in text or "\\" in text or text.startswith(("~", "."))
    return written_as_one or Path(text).suffix in _SUFFIXES or Path(text).is_file()


def check_file(option: str, path: str) -> None:
    """Refuse a path that is no file.

    Raises:
        MissingPath: naming the option, and where a relative path was looked for.
    """
    if "://" in path:
        raise OptionError(option, f"{path} is an address: download it, and give the file's path")
    file = Path(path).expanduser()
    if file.is_file():
        return
    if "\\" in path:
        raise MissingPath(option, f"no such file: {path} (paths are written with '/' here)")
    place = "" if file.is_absolute() else f" (looked for in the working folder, {Path.cwd()})"
    raise MissingPath(option, f"no such file: {path}{place}")


def check_weights(option: str, path: str) -> None:
    """Refuse a path that holds no weights, as far as its first bytes tell.

    Raises:
        MissingPath: there is nothing.
        OptionError: it is something else; the message says what, and the cure.
    """
    place = Path(path).expanduser()
    if not place.is_dir():
        check_file(option, path)
    try:
        kind = strange_kind(place)
    except OSError as error:
        raise OptionError(option, f"{path} cannot be read: {error.strerror}") from error
    if kind is not None:
        raise OptionError(option, f"{path} is {kind}")


def hash_weights(model: nn.Module) -> str:
    """Return the SHA-256 over a model's state dict: names, dtypes, shapes and values."""
    return hash_state(tensors_of(model))


def load_file(
    model: nn.Module,
    path: str,
    key: str | None = None,
    prefix: str = "",
    renamed: Callable[[State], State] = dict,
) -> list[str]:
    """Load the state dict of a checkpoint that fits a model; none of the file's code runs.

    Of several in a file it is the one that fits. Names may have prefixes of wrappers, and counters
    of other tools among them.

    Args:
        model: takes the weights, whole.
        path: the file: safetensors, or of ``torch.save``.
        key: dotted path of the state dict in it; found if None.
        prefix: removed from the front of its names; those without it are left out if need be.
        renamed: makes the model's names of a state dict's.

    Returns:
        Sentences that say what was chosen and left out.

    Raises:
        DreamkitError: the file holds no state dict, or several that fit.
        WeightsMismatch: saying what does not fit, and what to write.
    """
    states = find_states(path, read_checkpoint(Path(path).expanduser()), key)
    own = tensors_of(model)
    found = {where: readings(renamed(state), own, prefix) for where, state in states.items()}
    fit = {where: read for where, several in found.items() if (read := fitting(several, own))}
    if len(fit) > 1:
        choice = " or ".join(f"key: {where}" for where in fit)
        raise DreamkitError(f"{path} holds several state dicts that fit: write {choice}{_NO_KEY}")
    if not fit:
        where, several = min(
            found.items(), key=lambda item: min(read.misfits(own) for read in item[1])
        )
        origin = f"{path} (key: {where})" if where and key is None else path
        raise WeightsMismatch(f"{origin} does not fit the model: {complaint(several, own)}")
    ((where, reading),) = fit.items()
    _load(model, reading, path)
    chosen = [] if not where or key is not None else [f"the state dict is that of key: {where}"]
    return [f"{path}: {said}" for said in (*chosen, *reading.said)]


_NO_KEY = (
    " (an option of the sources 'checkpoint' and 'cifar'; for another source save that one alone: "
    "torch.save(torch.load(path)['...'], 'weights.pth'))"
)


def find_states(path: str, content: Any, key: str | None = None) -> dict[str, State]:
    """Return the state dicts in a checkpoint by their dotted keys; ``""`` is the whole.

    Args:
        path: of the file, for messages.
        content: as it was read.
        key: of the one that is wanted.

    Raises:
        DreamkitError: there is none; the message says what there is.
    """
    for step in _steps(content, key):
        if not isinstance(content, Mapping) or step not in content:
            raise DreamkitError(f"{path}: no key '{step}' (of key: {key}){_held(content)}")
        content = content[step]
    if _is_state(content):
        return {key or "": dict(content)}
    nested = _nested(content) if key is None else {}
    if nested:
        return nested
    if isinstance(content, StandIn):
        raise DreamkitError(
            f"{path}: refused: it is a pickled network or object, of class {named(content)}, and "
            f"loading that would run its code. {CURE}"
        )
    objects = [*content.values()] if isinstance(content, Mapping) else []
    pickled = any(isinstance(value, StandIn) for value in objects)
    advice = "; give 'key' (a dotted path) if it lies deeper" if objects else ""
    refused = f". Its objects were refused: to load them would run their code. {CURE}"
    rest = _held(content) + (refused if pickled else advice)
    raise DreamkitError(f"{path}: not a state dict, {{name: tensor}}{rest}")


def _steps(content: Any, key: str | None) -> list[str]:
    if not key or (isinstance(content, Mapping) and key in content):
        return [key] if key else []
    return key.split(".")


def _is_state(content: Any) -> bool:
    """Whether it is a state dict: names, and mostly tensors."""
    if not isinstance(content, Mapping) or not all(isinstance(name, str) for name in content):
        return False
    tensors = sum(isinstance(value, Tensor) for value in content.values())
    return 2 * tensors > len(content)


def _nested(content: Any, depth: int = _DEPTH) -> dict[str, State]:
    """Return the state dicts in a mapping, by their dotted keys."""
    found: dict[str, State] = {}
    if not isinstance(content, Mapping) or depth == 0:
        return found
    for name, value in content.items():
        if not isinstance(name, str):
            continue
        if _is_state(value):
            found[name] = dict(value)
        else:
            below = _nested(value, depth - 1)
            found |= {f"{name}.{rest}": state for rest, state in below.items()}
    return found


def _held(content: Any) -> str:
    """Say what there is in place of a state dict."""
    if isinstance(content, Mapping):
        names = [
            f"{name} (an object of {named(value)})" if isinstance(value, StandIn) else str(name)
            for name, value in content.items()
        ]
        return f"; it holds: {and_more(names)}" if names else "; it is empty"
    if isinstance(content, list | tuple):
        return (
            f"; it is a {type(content).__name__} of {len(content)}, and nothing tells which layer "
            "each is of: save model.state_dict()"
        )
    if isinstance(content, Tensor):
        return f"; it is one tensor, of shape {tuple(content.shape)}"
    return f"; it is of type {type(content).__name__}"


def load_into(model: nn.Module, state: Mapping[str, Tensor], origin: str) -> None:
    """Load a state dict that must fit exactly.

    Raises:
        WeightsMismatch: naming the first keys that are missing, unexpected or of another shape.
    """
    own = tensors_of(model)
    reading = Reading(dict(state))
    if reading.misfits(own):
        raise WeightsMismatch(f"{origin} does not fit the model: {complaint([reading], own)}")
    _load(model, reading, origin)


def _load(model: nn.Module, reading: Reading, origin: str) -> None:
    try:
        load_state(model, reading.state, strict=False)
    except RuntimeError as error:  # a network may have a way of loading of its own
        raise WeightsMismatch(f"{origin} does not fit the model: {first_line(error)}") from error


def download(what: str, fetch: Callable[[], M]) -> M:
    """Build a pretrained model, or say what can be done when its weights do not come.

    Raises:
        WeightsUnavailable: the download failed.
    """
    try:
        return fetch()
    except Exception as error:  # each hub client has errors of its own
        reason = first_line(error)
        raise WeightsUnavailable(
            f"the weights of {what} could not be downloaded ({type(error).__name__}: {reason}).\n"
            "  1. With a network (or HTTPS_PROXY set), run the same command again; the weights "
            "are cached after the first time.\n"
            "  2. Fetch the file on another machine and give its path: "
            "weights: path/to/weights.safetensors (or .pth)\n"
            "  3. To try the mechanics with random weights, leave them out: weights: null "
            "(for a teacher: --set teacher.weights=null)",
            ("weights",),
        ) from error
