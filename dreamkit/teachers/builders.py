"""Functions of the user's that build a network: finding, calling and comparing what they return."""

from __future__ import annotations

import contextlib
import copy
import inspect
import math
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parameter import is_lazy

from dreamkit.errors import DreamkitError, OptionError
from dreamkit.importing import failure, import_file, import_named, lies_here
from dreamkit.model_state import eval_mode
from dreamkit.teachers.logits import logits_in
from dreamkit.teachers.weights import check_file
from dreamkit.wording import and_more

_FORMS = "write package.module:function or path/file.py:function"


def check_builder(reference: str) -> None:
    """Refuse a reference to a builder that cannot be one. Nothing is imported.

    Raises:
        OptionError: it is written otherwise.
        MissingPath: there is no such file.
    """
    place, colon, name = reference.rpartition(":")
    if not colon or not place or not name.isidentifier():
        raise OptionError("builder", f"{_FORMS} (got {reference!r})")
    if place.endswith(".py"):
        check_file("builder", place)
    is_file = place.endswith(".ipynb") or Path(place).expanduser().is_file()
    if not place.endswith(".py") and (
        is_file or not all(part.isidentifier() for part in place.split("."))
    ):
        what = "is no Python file (.py)" if is_file else "is no name of a module"
        raise OptionError("builder", f"{place} {what}: {_FORMS}")


def reference_from_anywhere(reference: str) -> str:
    """Return a reference that does not depend on the working folder, to what has been imported."""
    place, _, name = reference.rpartition(":")
    if place.endswith(".py"):
        return f"{Path(place).expanduser().resolve()}:{name}"
    if lies_here(place):
        return f"{import_named(place).__file__}:{name}"
    return reference


def import_builder(reference: str) -> Callable[..., Any]:
    """Import ``package.module:function`` or ``path/file.py:function``.

    Raises:
        DreamkitError: there is no such module, file or function.
    """
    place, _, name = reference.rpartition(":")
    try:
        with _printing_aside():
            module = import_file(place) if place.endswith(".py") else import_named(place)
    except (Exception, SystemExit) as error:  # importing runs the user's code
        where = ""
        if isinstance(error, ModuleNotFoundError):
            where = (
                f"; looked for beside the file, in the working folder ({Path.cwd()}) and on "
                "sys.path: PYTHONPATH=FOLDER adds a folder"
            )
        raise DreamkitError(
            f"the builder's module {place} cannot be imported: {failure(error, place)}{where}",
            ("builder",),
        ) from error
    function = getattr(module, name, None)
    if not callable(function) or isinstance(function, nn.Module):
        there = [
            each
            for each, value in vars(module).items()
            if callable(value) and getattr(value, "__module__", None) == module.__name__
        ]
        found = f" (it has {', '.join(there)})" if there else ""
        raise DreamkitError(f"{place} has no function '{name}'{found}", ("builder",))
    return function  # type: ignore[no-any-return]


def call_builder(reference: str, arguments: Mapping[str, Any]) -> nn.Module:
    """Return what a builder makes.

    Args:
        reference: ``package.module:function`` or ``path/file.py:function``.
        arguments: keyword arguments, of which it gets copies.

    Raises:
        DreamkitError: it cannot be imported or called so, fails, or returns no module.
    """
    function = import_builder(reference)
    _check_arguments(reference, function, arguments)
    try:
        with _printing_aside():
            model = function(**copy.deepcopy(dict(arguments)))
    except DreamkitError:
        raise
    except (Exception, SystemExit) as error:  # the user's function may raise anything
        told = failure(error, reference.rpartition(":")[0])
        raise DreamkitError(f"the builder {reference} failed: {told}", ("builder",)) from error
    if isinstance(model, nn.Module):
        return model
    made = type(model).__name__
    if isinstance(model, tuple | list):
        made += f" ({', '.join(type(part).__name__ for part in model)})"
    raise DreamkitError(
        f"the builder {reference} returned {made}, not a module: return the network alone",
        ("builder",),
    )


def _check_arguments(
    reference: str, function: Callable[..., Any], arguments: Mapping[str, Any]
) -> None:
    """Refuse arguments that a builder does not take, or that it lacks."""
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):  # of C, or too clever
        return
    try:
        signature.bind(**arguments)
    except TypeError as error:
        takes = ", ".join(map(str, signature.parameters.values())) or "none"
        raise DreamkitError(
            f"the builder {reference} cannot be called so: {error}; its arguments are: {takes}. "
            "Write them as arguments: {name: value}",
            ("arguments",),
        ) from error


@contextlib.contextmanager
def _printing_aside() -> Iterator[None]:
    """Let what the user's code prints go to stderr: stdout may be read by a program."""
    with contextlib.redirect_stdout(sys.stderr):
        yield


@dataclass(frozen=True)
class Origin:
    """Where the weights that a builder returns come from.

    Args:
        trained: whether they are taken for trained ones.
        text: for the model's card.
        said: sentences that a run says of them.
    """

    trained: bool
    text: str
    said: tuple[str, ...] = ()


def origin_of(built: nn.Module, again: nn.Module, input_size: tuple[int, int, int]) -> Origin:
    """Return where a builder's weights come from: random ones differ from one build to the next.

    Weights of one value, as of a new BatchNorm, tell nothing.

    Args:
        built: by the builder.
        again: by the same builder, under another seed.
        input_size: (channels, height, width), to see whether what differs has any effect.
    """
    others = dict(again.named_parameters())
    own, drawn = [], []
    for name, weight in built.named_parameters():
        other = others.get(name)
        if is_lazy(weight) or other is None or not _same(weight, other):
            drawn.append(name)
        elif weight.numel() > 1 and bool((weight != weight.flatten()[0]).any()):
            own.append(name)
    if not own:
        return Origin(False, "random weights")
    said = []
    if _is_new(built):
        said.append(
            "the builder's network has BatchNorm statistics of mean 0 and variance 1 throughout, "
            "as one that was never trained"
        )
    text = "the builder's own weights"
    if drawn:
        layers = and_more(list(dict.fromkeys(name.rpartition(".")[0] or name for name in drawn)))
        said.append(f"every build draws new random weights of {layers}")
        if not _same_outputs(built, again, input_size):
            return Origin(False, f"{text}, but random ones in {layers}", tuple(said))
    return Origin(True, text, tuple(said))


def _same(weight: Tensor, other: Tensor) -> bool:
    return weight.shape == other.shape and torch.equal(weight, other)


def _is_new(model: nn.Module) -> bool:
    """Whether no BatchNorm layer of a model has ever seen an image."""
    means = [m.running_mean for m in model.modules() if isinstance(m, _BatchNorm)]
    variances = [m.running_var for m in model.modules() if isinstance(m, _BatchNorm)]
    known = [t for t in (*means, *variances) if t is not None and not is_lazy(t)]
    return (
        bool(known)
        and all(bool((mean == 0).all()) for mean in means if mean is not None)
        and all(bool((variance == 1).all()) for variance in variances if variance is not None)
    )


@torch.no_grad()
def _same_outputs(built: nn.Module, again: nn.Module, size: tuple[int, int, int]) -> bool:
    """Whether two models do the same with an image."""
    image = torch.linspace(-1, 1, math.prod(size)).view(1, *size)
    try:
        with eval_mode(built), eval_mode(again):
            ours, theirs = logits_in(built(image), None), logits_in(again(image), None)
    except Exception:  # what is asked of a network is asked of it elsewhere
        return False
    return ours is not None and theirs is not None and torch.equal(ours[1], theirs[1])
