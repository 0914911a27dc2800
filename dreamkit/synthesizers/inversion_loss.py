"""What an inversion minimises: cross-entropy to labels plus weighted regularizers (eq. 2).

Yin et al., "Dreaming to Distill: Data-free Knowledge Transfer via DeepInversion", CVPR 2020. A
function of images, whatever makes them: pixels that are optimised, or a generator.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dreamkit.allocator import freed_memory_kept
from dreamkit.errors import DreamkitError, TeacherMismatch, placed
from dreamkit.evaluation.features import find_layer, penultimate_layer
from dreamkit.model_state import InputTap, eval_mode, inputs_of
from dreamkit.registry import RECORDED, Term
from dreamkit.synthesizers.block_outputs import (
    BlockTap,
    check_patches,
    feature_blocks,
    outputs_of,
)
from dreamkit.synthesizers.bn_statistics import (
    BatchNormTap,
    batch_norm_layers,
    tapped,
)
from dreamkit.synthesizers.engine import borrowed
from dreamkit.synthesizers.norm_means import NormTap, means_of, norm_layers
from dreamkit.synthesizers.smoothed_statistics import SmoothedStatistics
from dreamkit.teachers.trying import blank_noise
from dreamkit.types import NO_LABEL, InversionStep, LayerStatistics, Regularizer, Teacher

Terms = Sequence[Term[Regularizer]]
OpenTerms = tuple[Term[Regularizer], ...] | Literal["auto"]
"""As a recipe has them; ``auto`` leaves them to what the teacher has."""


class InversionLoss:
    """The loss's weighted terms, bound to a frozen teacher.

    Args:
        teacher: frozen.
        regularizers: the terms beside the cross-entropy.
        tap: of the teacher, where a term needs its statistics.
        features: sees the input of the teacher's last linear layer, where a term needs it.
        student: what a term lets the teacher compete with; it must be frozen while the loss is
            evaluated. Without it, terms that need it are left out.
        cross_entropy: weight of the classification term.
        blocks: sees what the teacher's blocks put out, where a term needs it.
        norms: sees what its LayerNorm and GroupNorm layers make of a batch, likewise.
    """

    def __init__(
        self,
        teacher: nn.Module,
        regularizers: Terms,
        tap: BatchNormTap | None,
        features: InputTap | None,
        student: nn.Module | None,
        cross_entropy: float = 1.0,
        blocks: BlockTap | None = None,
        norms: NormTap | None = None,
    ) -> None:
        self.teacher = teacher
        self.regularizers = regularizers
        self.tap = tap
        self.features = features
        self.student = student
        self.cross_entropy = cross_entropy
        self.blocks = blocks
        self.norms = norms
        self.smoothed: SmoothedStatistics | None = None
        """Statistics of earlier batches, to be matched together with this one's."""

    def __call__(
        self,
        images: Tensor,
        labels: Tensor,
        arithmetic: AbstractContextManager[Any] | None = None,
        shown: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """Return the weighted terms on images, each of shape ().

        Args:
            images: (N, C, H, W), normalised.
            labels: (N,); ``NO_LABEL`` where the teacher may see any class.
            arithmetic: sets the networks' precision.
            shown: what the networks see in their place; terms of the pixels look at ``images``.
        """
        seen = images if shown is None else shown
        student_logits: Tensor | None = None
        features: Tensor | None = None
        statistics: tuple[LayerStatistics, ...] = ()
        if self.norms is not None:
            self.norms.begin()
        # Told by None: older compilers cannot take a context's truth.
        with nullcontext() if arithmetic is None else arithmetic:
            if self.tap is not None:
                logits, statistics = self.tap(seen)
                if self.smoothed is not None:
                    statistics = self.smoothed.blended(statistics)
            else:
                logits = self.teacher(seen)
            if self.features is not None:
                (features,) = self.features.inputs.values()
                features = features.float().flatten(1)
            if self.student is not None:
                student_logits = self.student(seen).float()
        logits = logits.float()
        step = InversionStep(
            images,
            labels,
            logits,
            student_logits,
            statistics,
            features,
            block_outputs=() if self.blocks is None else self.blocks.outputs(),
            norm_means=() if self.norms is None else self.norms.means(),
        )
        # Over all images: one's share of the loss does not grow where others show no class.
        classified = F.cross_entropy(
            step.teacher_logits, labels, reduction="sum", ignore_index=NO_LABEL
        ) / len(labels)
        terms = {"cross_entropy": self.cross_entropy * classified}
        for term in self.regularizers:
            if student_logits is None and "student_logits" in term.entry.needs:
                continue
            value = term.weight * _checked(term, term.entry(step))
            # A name may stand in the recipe more than once; its values add up.
            terms[term.name] = terms[term.name] + value if term.name in terms else value
        return terms


def _checked(term: Term[Regularizer], value: object) -> Tensor:
    """Return what a regularizer returned, which is anyone's code.

    Raises:
        DreamkitError: it is no tensor of shape ().
    """
    if isinstance(value, Tensor) and value.shape == ():
        return value
    what = f"a tensor of shape {tuple(value.shape)}" if isinstance(value, Tensor) else f"{value!r}"
    raise DreamkitError(
        f"the regularizer {term.name} should return a tensor of shape (), not {what}"
    )


def needed(regularizers: Terms) -> frozenset[str]:
    """Return what some terms declare that they need."""
    return frozenset().union(*(term.entry.needs for term in regularizers))


def competing(regularizers: Terms | OpenTerms) -> str | None:
    """Return the name of the first term that lets the teacher compete with a student."""
    if regularizers == "auto":
        return None
    return next((t.name for t in regularizers if "student_logits" in t.entry.needs), None)


def check_terms(regularizers: Terms, teacher: Teacher) -> None:
    """Refuse a teacher without the statistics, features or patches that a term looks at.

    Raises:
        TeacherMismatch: naming the term, and what else could be done.
        DreamkitError: a term has a name that the loss itself has in records.
    """
    for index, term in enumerate(regularizers):
        if term.name in RECORDED:
            raise DreamkitError(
                f"records have the loss's own under '{term.name}': call the regularizer otherwise",
                ("regularizers", index),
            )
        lacks = lack_of_statistics(teacher) if "bn_statistics" in term.entry.needs else None
        if lacks is not None:
            raise TeacherMismatch(
                f"{term.name} matches BatchNorm statistics, and {teacher.card.name} {lacks}. "
                "Choose a teacher that has (a ResNet, say), leave the term out (DeepDream: tv and "
                "l2), or train on proxy images ({source: folder, path: ...})",
                ("regularizers", index),
            )
        if "block_outputs" in term.entry.needs:
            with placed("regularizers", index):
                _check_blocks(term.name, teacher)
        if "norm_means" in term.entry.needs and not norm_layers(teacher):
            raise TeacherMismatch(
                f"{term.name} looks at LayerNorm and GroupNorm layers, and {teacher.card.name} has "
                "none with scale and shift that could be seen; leave the term out",
                ("regularizers", index),
            )
        if "features" in term.entry.needs:
            try:
                penultimate_layer(teacher.model, teacher.card)
            except DreamkitError as error:
                raise TeacherMismatch(
                    f"{term.name} looks at what the last linear layer is given, and "
                    f"{teacher.card.name} calls none; leave the term out",
                    ("regularizers", index),
                ) from error


def _check_blocks(term: str, teacher: Teacher) -> None:
    if not feature_blocks(teacher):
        raise TeacherMismatch(
            f"{term} compares patches, and no layer of {teacher.card.name} puts out tokens or "
            "feature maps that could be seen; leave the term out"
        )
    check_patches(teacher, teacher.card.input_size[1:])


def lack_of_statistics(teacher: Teacher) -> str | None:
    """Return why there are no BatchNorm statistics to match; None where there are."""
    model = teacher.model
    if isinstance(model, torch.jit.ScriptModule):
        return "is TorchScript, whose layers cannot be watched"
    layers = batch_norm_layers(model)
    if not layers:
        return "has no BatchNorm layer that stores statistics"
    with torch.no_grad(), eval_mode(model), tapped(model) as tap:
        _, seen = tap(blank_noise(model, teacher.card.input_size))
    if not seen:
        return f"uses none of its {len(layers)} BatchNorm layers for an image"
    return None


@contextmanager
def bound_loss(
    teacher: Teacher,
    regularizers: Terms,
    student: nn.Module | None,
    cross_entropy: float = 1.0,
) -> Iterator[InversionLoss]:
    """Freeze the teacher, tap its statistics where a term needs them, and keep freed memory.

    All of it is undone.

    Args:
        teacher: on the device where images are.
        regularizers: the terms beside the cross-entropy.
        student: left out of the loss where no term needs it.
        cross_entropy: weight of the classification term.
    """
    wants, model = needed(regularizers), teacher.model
    with ExitStack() as stack:
        stack.enter_context(freed_memory_kept())
        stack.enter_context(borrowed(model, teacher.card.input_size))
        tap = stack.enter_context(tapped(model)) if "bn_statistics" in wants else None
        features = None
        if "features" in wants:
            layer = find_layer(model, teacher.card, None)
            features = stack.enter_context(inputs_of([layer]))
        blocks = None
        if "block_outputs" in wants:
            blocks = stack.enter_context(outputs_of(model, feature_blocks(teacher)))
        norms = None
        if "norm_means" in wants:
            norms = stack.enter_context(means_of(model, norm_layers(teacher)))
        rival = student if "student_logits" in wants else None
        yield InversionLoss(model, regularizers, tap, features, rival, cross_entropy, blocks, norms)
