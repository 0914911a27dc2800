"""What dreaming and training ask of a network: gradients, and logits in training mode."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from dreamkit.copying import copied
from dreamkit.errors import TeacherMismatch
from dreamkit.model_state import frozen, seeded
from dreamkit.out_of_memory import is_out_of_memory
from dreamkit.teachers.logits import TakeLogits, copy_input, described, logits_in
from dreamkit.teachers.trying import add_hook, blank_noise, call
from dreamkit.wording import one_line

Note = Callable[[str], None]


def hold_to_gradient(
    model: nn.Module, input_size: tuple[int, int, int], note: Note, role: str
) -> None:
    """Refuse a network that no gradient passes.

    Raises:
        TeacherMismatch: its outputs have no gradient in its images, or none that is finite.
    """
    leaf = blank_noise(model, input_size).requires_grad_()
    gradient: Tensor | None = None
    with torch.enable_grad(), frozen(model):
        logits = call(model, leaf * 1, role)
        try:
            if logits.requires_grad and not logits.is_inference():
                unlike = torch.linspace(-1, 1, logits.shape[1], device=logits.device)
                weighted = (logits * unlike).sum()  # a plain sum of probabilities is constant
                (gradient,) = torch.autograd.grad(weighted, [leaf], allow_unused=True)
        except Exception as error:  # anyone's code
            if is_out_of_memory(error):
                raise
            raise TeacherMismatch(
                f"{role}: its outputs cannot be differentiated by its images: {one_line(error)}"
            ) from error
    if gradient is None:
        raise TeacherMismatch(
            f"{role}: its outputs have no gradient in its images, so that nothing can be dreamed "
            "of it: take torch.no_grad, torch.inference_mode or .detach() out of its forward"
        )
    if not bool(torch.isfinite(gradient).all()):
        raise TeacherMismatch(
            f"{role}: the gradient of its outputs in random images is not finite, so that nothing "
            "can be dreamed of it: look for the root, the norm or the logarithm of 0 in its forward"
        )
    if not bool(gradient.any()):
        note(
            f"{role}: the gradient of its outputs in its images is zero (does it round them, or is "
            "a layer all zeros?): what is dreamed of it will stay noise"
        )


def hold_in_training(
    model: nn.Module, input_size: tuple[int, int, int], classes: int, note: Note, role: str
) -> None:
    """See to it that a network returns logits in training mode too; say so if it cannot.

    Args:
        model: in eval mode; gets a hook, where it needs one.
        input_size: (channels, height, width).
        classes: how many logits it has.
        note: told what was put right, or that it cannot be.
        role: what the network is called in messages.
    """
    trial = copied(model)
    trial.train()
    images = blank_noise(model, input_size)
    shown = images.clone()
    with torch.no_grad(), seeded(0, images.device):
        try:
            output = trial(shown)
        except Exception as error:  # anyone's code
            if is_out_of_memory(error):
                raise
            note(
                f"{role}: in training mode it does not run, so that no student made of it can "
                f"learn: {one_line(error)}"
            )
            return
    if not torch.equal(shown, images):
        model.register_forward_pre_hook(copy_input)
    if isinstance(output, Tensor) and output.shape == (2, classes):
        return
    found = logits_in(output, classes)
    if found is None:
        note(
            f"{role}: in training mode it returns {described(output)}, which holds no logits of "
            f"shape (2, {classes}), so that no student made of it can learn"
        )
        return
    add_hook(model, TakeLogits(classes), role)
    note(f"{role}: in training mode it returns {described(output)}; '{found[0]}' is taught")
