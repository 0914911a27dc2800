"""Holding a model against its card."""

from __future__ import annotations

import torch

from dreamkit.card import Card
from dreamkit.errors import TeacherMismatch
from dreamkit.model_state import device_of, eval_mode
from dreamkit.out_of_memory import is_out_of_memory
from dreamkit.types import Teacher
from dreamkit.wording import one_line


def check_fits(student: Card, teacher: Card) -> None:
    """Refuse a student that does not take the teacher's images or have its outputs.

    Raises:
        TeacherMismatch: saying what both take and return.
    """
    ours, theirs = student, teacher
    if (ours.num_classes, ours.input_size) != (theirs.num_classes, theirs.input_size):
        raise TeacherMismatch(
            f"the student {ours.name} takes {ours.input_size} and has {ours.num_classes} outputs; "
            f"the teacher {theirs.name} takes {theirs.input_size} and has {theirs.num_classes}"
        )


@torch.no_grad()
def check_outputs(teacher: Teacher) -> None:
    """Run one blank image through a model that was taken in, and changed since.

    Raises:
        TeacherMismatch: it does not take images of the card's size, or does not return one logit
            for each of the card's classes.
    """
    card = teacher.card
    try:
        with eval_mode(teacher.model):
            logits = teacher.model(
                torch.zeros(1, *card.input_size, device=device_of(teacher.model))
            )
    except Exception as error:  # the model may be anyone's code
        if is_out_of_memory(error):
            raise
        reason = one_line(error)
        raise TeacherMismatch(
            f"{card.name} does not take an image of input_size {card.input_size}: {reason}"
        ) from error
    shape = tuple(getattr(logits, "shape", ()))
    if shape != (1, card.num_classes):
        found = f"shape {shape}" if shape else type(logits).__name__
        raise TeacherMismatch(
            f"{card.name} returns {found} for one image; with num_classes {card.num_classes} it "
            f"should be logits of shape (1, {card.num_classes})"
        )
