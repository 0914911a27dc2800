"""Reading state dicts safely, and fitting them to a model."""

from __future__ import annotations

import pickle
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import safetensors.torch
import torch
from torch import Tensor, nn

from dreamkit.errors import DreamkitError, MissingPath, WeightsMismatch, WeightsUnavailable
from dreamkit.flat_state import hash_state
from dreamkit.model_state import load_state, tensors_of
from dreamkit.wording import first_line

WEIGHT_SUFFIXES = frozenset({".safetensors", ".pth", ".pt", ".th", ".bin", ".ckpt"})
_SHOWN_KEYS = 4
M = TypeVar("M")


def is_weights_file(weights: str | None) -> bool:
    """Return whether a ``weights`` option is a path rather than a name on a hub."""
    return weights is not None and Path(weights).suffix in WEIGHT_SUFFIXES


def check_file(option: str, path: str) -> None:
    """Refuse a path that is no file.

    Raises:
        MissingPath: naming the option.
    """
    if not Path(path).is_file():
        raise MissingPath(option, f"no such file: {path}")


def hash_weights(model: nn.Module) -> str:
    """Return the SHA-256 over a model's state dict: names, dtypes, shapes and values."""
    return hash_state(tensors_of(model))


def read_state_dict(path: str, key: str | None = None, prefix: str = "") -> dict[str, Tensor]:
    """Read a state dict from safetensors or a PyTorch checkpoint, without running its code.

    Args:
        path: the file.
        key: dotted key under which the state dict lies in the checkpoint, e.g. ``state_dict``.
        prefix: removed from the front of every key that has it, e.g. ``module.``.

    Raises:
        DreamkitError: the file is not readable as weights, holds pickled code, or has no
            state dict at ``key``.
    """
    content = _read(path)
    for step in key.split(".") if key else ():
        if not isinstance(content, Mapping) or step not in content:
            found = ", ".join(map(str, list(content)[:8])) if isinstance(content, Mapping) else ""
            raise DreamkitError(f"{path}: no key '{step}' (of key: {key}); it holds: {found}")
        content = content[step]
    tensors = isinstance(content, Mapping) and dict(content)
    if not tensors or not all(isinstance(v, Tensor) for v in tensors.values()):
        keys = ", ".join(map(str, list(content)[:8])) if isinstance(content, Mapping) else ""
        raise DreamkitError(
            f"{path}: not a state dict; give 'key' (a dotted path) if it lies deeper. "
            f"It holds: {keys or type(content).__name__}"
        )
    return {str(name).removeprefix(prefix): tensor for name, tensor in tensors.items()}


def _read(path: str) -> Any:
    try:
        if Path(path).suffix == ".safetensors":
            return safetensors.torch.load_file(path)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # on pickle protocols; what matters is said below
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise DreamkitError(
            f"{path}: refused: it pickles more than tensors, and loading that would run its code. "
            "Save the state dict alone: torch.save(model.state_dict(), path) or, better, "
            "safetensors.torch.save_file(model.state_dict(), path)"
        ) from error
    except Exception as error:  # a damaged file fails in as many ways as it has bytes
        reason = first_line(error) or type(error).__name__
        raise DreamkitError(f"{path}: cannot be read as weights: {reason}") from error


def load_into(model: nn.Module, state: Mapping[str, Tensor], origin: str) -> None:
    """Load a state dict that must fit exactly.

    Raises:
        WeightsMismatch: naming the first keys that are missing, unexpected or of another shape.
    """
    own = tensors_of(model)
    # BatchNorm's step counter is absent from old checkpoints and means nothing in eval mode.
    missing = [k for k in own if k not in state and not k.endswith("num_batches_tracked")]
    unexpected = [k for k in state if k not in own]
    shapes = [
        f"{k} {tuple(state[k].shape)}, model has {tuple(own[k].shape)}"
        for k in own
        if k in state and state[k].shape != own[k].shape
    ]
    complaints = [
        f"{len(keys)} {what}: {', '.join(keys[:_SHOWN_KEYS])}"
        + (", ..." if len(keys) > _SHOWN_KEYS else "")
        for what, keys in (
            ("missing", missing),
            ("unexpected", unexpected),
            ("of other shape", shapes),
        )
        if keys
    ]
    if complaints:
        raise WeightsMismatch(f"{origin} does not fit the model: {'; '.join(complaints)}")
    load_state(model, state, strict=False)


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
