"""Taking a network in: all that is asked of a teacher or a student, found out by a few passes.

A user's network may do anything. Whatever dreaming, pruning and training rely on is held here, once
and before anything is written; what can be put right is, and said, and the rest is refused with
what would help.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from dreamkit.errors import TeacherMismatch
from dreamkit.model_state import eval_mode, tensors_of
from dreamkit.teachers.doubts import doubt, doubt_training
from dreamkit.teachers.learning import hold_in_training, hold_to_gradient
from dreamkit.teachers.logits import (
    TakeLogits,
    ambiguous,
    copy_input,
    described,
    logits_in,
    why_no_logits,
)
from dreamkit.teachers.readying import made_ready
from dreamkit.teachers.trying import add_hook, blank_noise, call
from dreamkit.types import Teacher
from dreamkit.wording import one_line

Note = Callable[[str], None]
_STATISTICS = ("running_mean", "running_var")


def admit(
    teacher: Teacher,
    note: Note = lambda text: None,
    role: str | None = None,
    judge: bool = False,
    learnt: bool = True,
) -> Teacher:
    """Return a teacher or student as the rest of the program may rely on it.

    Its network is a copy in eval mode, of plain modules with float32 weights. It takes batches of
    the card's size, returns logits (N, classes) for them in eval and in training mode, leaves its
    input as it is, and lets gradients through to it.

    Args:
        teacher: on the device where it will work.
        note: told what was put right, and what is doubtful.
        role: what the network is called in messages; None for its card's name.
        learnt: it is said so where it looks as if it had not learnt; false for a student to be.
        judge: it only says what it sees, so that gradients and training are not asked of it.

    Raises:
        TeacherMismatch: it does not, and cannot be made to; the message says what would help.
    """
    card = teacher.card
    role = role or card.name
    for text in (*teacher.notes, *card.doubts()):
        note(f"{role}: {text}")
    model = made_ready(teacher.model, card.input_size, note, role)
    if judge:
        take_logits(model, card.input_size, card.num_classes, note, role)
        return dataclasses.replace(teacher, model=model, notes=())
    examine(model, card.input_size, card.num_classes, note, role)
    if card.trained and learnt:
        doubt_training(model, note, role)
    return dataclasses.replace(teacher, model=model, notes=())


def examine(
    model: nn.Module,
    input_size: tuple[int, int, int],
    classes: int | None,
    note: Note,
    role: str,
    likely: int | None = None,
) -> int:
    """Hold a network that was made ready to all that ``admit`` promises.

    Args:
        model: as ``made_ready`` returns it; gets hooks, where it needs them.
        input_size: (channels, height, width).
        classes: how many logits it should have; None takes what it has, two or more.
        note: told what was put right, and what is doubtful.
        role: what the network is called in messages.
        likely: as of ``take_logits``.

    Returns:
        How many logits it has.

    Raises:
        TeacherMismatch: as of ``admit``.
    """
    _refuse_quantised(model, role)
    classes = take_logits(model, input_size, classes, note, role, likely)
    hold_to_gradient(model, input_size, note, role)
    hold_in_training(model, input_size, classes, note, role)
    doubt(model, note, role)
    return classes


def take_logits(
    model: nn.Module,
    input_size: tuple[int, int, int],
    classes: int | None,
    note: Note,
    role: str,
    likely: int | None = None,
) -> int:
    """Let a network return logits alone and leave its input as it is; return how many classes.

    Args:
        model: gets hooks, where it needs them.
        input_size: (channels, height, width).
        classes: how many it should have; None takes what it has, two or more.
        note: told what was put right, and what is doubtful.
        role: what the network is called in messages.
        likely: how many it is said to have, where that may be wrong: tells which of several
            outputs are the logits.

    Raises:
        TeacherMismatch: it does not run, or returns no logits, or none that are finite.
    """
    _refuse_values(model, role)
    images = blank_noise(model, input_size)
    with torch.no_grad(), eval_mode(model):
        _protect_input(model, images, note, role)
        output = call(model, images, role)
        place, logits = _chosen(output, classes, likely, role)
        if not isinstance(output, Tensor) or output.shape != logits.shape:
            where = f"'{place}' of the {type(output).__name__}" if place else "the only number"
            note(f"{role}: {where} that it returns is taken as the logits")
        if place or output.dtype != logits.dtype or output.shape != logits.shape:
            add_hook(model, TakeLogits(logits.shape[1]), role)
        _take_single(model, images[:1], logits.shape[1], note, role)
        _doubt_outputs(logits, call(model, images, role), note, role)
    return logits.shape[1]


def _chosen(output: Any, classes: int | None, likely: int | None, role: str) -> tuple[str, Tensor]:
    """Return where in an output for two images the logits stand, and themselves."""
    if classes is None and likely is not None and logits_in(output, likely) is not None:
        classes = likely
    if classes is None and ambiguous(output):
        raise TeacherMismatch(
            f"{role} returns {described(output)} for 2 images, and more than one may be its "
            "logits: let a module wrap it whose forward returns them alone"
        )
    found = logits_in(output, classes)
    if found is None:
        raise TeacherMismatch(why_no_logits(output, classes, role))
    if not torch.isfinite(found[1]).all():
        raise TeacherMismatch(
            f"{role} returns values that are not finite for random images of its size: look "
            "at its weights, its mean and its std"
        )
    return found


def _doubt_outputs(logits: Tensor, again: Tensor, note: Note, role: str) -> None:
    """Say so if outputs of two passes differ, or are probabilities."""
    if not torch.allclose(again, logits, rtol=1e-3, atol=1e-4):
        note(
            f"{role}: its outputs for the same images change from pass to pass in eval mode "
            "(dropout that stays on?): dreams and measurements will too"
        )
    if _probabilities(logits):
        note(
            f"{role}: what it returns are probabilities already (rows that sum to 1), where "
            "the cross-entropy and temperatures want logits: take the softmax out, or return "
            "torch.log of it"
        )


def refusal_of_size(teacher: Teacher, size: tuple[int, int]) -> str | None:
    """Return why a teacher takes no images of (height, width); None if it does."""
    card = teacher.card
    images = blank_noise(teacher.model, (card.input_size[0], *size))
    try:
        with torch.no_grad(), eval_mode(teacher.model):
            shape = tuple(teacher.model(images).shape)
    except Exception as error:  # anyone's code
        return one_line(error)
    wanted = (2, card.num_classes)
    return None if shape == wanted else f"it returns {shape} for 2 images, not {wanted}"


def _take_single(model: nn.Module, image: Tensor, classes: int, note: Note, role: str) -> None:
    """Let a network return logits (1, classes) for one image, of which some lose an axis."""
    output = call(model, image, role)
    if isinstance(output, Tensor) and output.shape == (1, classes):
        return
    if not isinstance(output, Tensor) or output.shape != (classes,):
        raise TeacherMismatch(
            f"{role} returns {described(output)} for one image, and logits of shape (1, {classes}) "
            "are wanted: let its forward return (N, classes) for any number of images"
        )
    add_hook(model, TakeLogits(classes), role)
    note(f"{role}: for one image it returns {described(output)}, taken as (1, {classes})")


def _protect_input(model: nn.Module, images: Tensor, note: Note, role: str) -> None:
    """Find out whether a network writes on its input, and give it copies if so."""
    shown = images.clone()
    call(model, shown, role)
    if not torch.equal(shown, images):
        model.register_forward_pre_hook(copy_input)
        note(f"{role}: it changes the images it is given in place; it is given copies")


def _refuse_quantised(model: nn.Module, role: str) -> None:
    for name, module in model.named_modules():
        if ".quantized" in type(module).__module__:
            raise TeacherMismatch(
                f"{role}: '{name}' is quantised, and no gradient passes it: give the network as it "
                "was before, in floating point"
            )


def _refuse_values(model: nn.Module, role: str) -> None:
    """Refuse weights that are not finite, or not there, and variances that are none."""
    # Other buffers may be masks of -inf.
    trained: dict[str, Tensor] = dict(model.named_parameters())
    trained |= {k: v for k, v in tensors_of(model).items() if k.endswith(_STATISTICS)}
    if any(tensor.is_meta for tensor in trained.values()):
        raise TeacherMismatch(
            f"{role}: its weights are on the device 'meta', where there are no values: load them "
            "(to_empty and load_state_dict, or build it outside torch.device('meta'))"
        )
    for name, tensor in trained.items():
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise TeacherMismatch(f"{role}: '{name}' holds values that are not finite")
        if name.endswith("running_var") and bool((tensor < 0).any()):
            raise TeacherMismatch(
                f"{role}: '{name}' holds negative variances: was it loaded whole?"
            )


def _probabilities(logits: Tensor) -> bool:
    sums = logits.sum(1)
    return bool((logits >= 0).all()) and torch.allclose(sums, torch.ones_like(sums), atol=1e-3)
