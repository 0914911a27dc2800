"""How a teacher is inverted when the recipe leaves it to what the teacher has."""

from __future__ import annotations

from collections.abc import Callable
from statistics import fmean

from dreamkit.card import Card
from dreamkit.errors import TeacherMismatch, placed
from dreamkit.parameterisations.fourier import Fourier
from dreamkit.registry import Term
from dreamkit.regularizers.bn_feature import BNFeature
from dreamkit.regularizers.feature_prior import FeaturePrior
from dreamkit.regularizers.natural_spectrum import NaturalSpectrum
from dreamkit.regularizers.patch_similarity import PatchSimilarity
from dreamkit.synthesizers.block_outputs import check_patches, feature_blocks
from dreamkit.synthesizers.inversion_loss import OpenTerms, Terms, check_terms, lack_of_statistics
from dreamkit.synthesizers.norm_means import norm_layers
from dreamkit.types import Parameterisation, Regularizer, Teacher

STATISTICS: tuple[Term[Regularizer], ...] = (Term("bn_feature", 30.0, BNFeature()),)
"""For a teacher with BatchNorm, which stores what its features were in training."""
PATCHES: tuple[Term[Regularizer], ...] = (Term("patch_similarity", 0.1, PatchSimilarity()),)
"""For one without: some patches of an image are alike, and others are not. Of the terms that need
no statistics it is the one whose dreams teach a student most on the whole: of a transformer, of a
ConvNeXt, and of a network inverted as if it had none (``benchmarks/without_batch_norm.py``)."""
SHIFTS: tuple[Term[Regularizer], ...] = (Term("feature_prior", 1.0, FeaturePrior()),)
"""Beside it, for one with LayerNorm or GroupNorm: the nearest to a statistic that such layers tell.
It brings a ConvNeXt's dreams of photographs a third nearer to what another network states."""
PHOTOGRAPHS = 0.46, 0.26
"""Mean and deviation of photographs' pixels in [0, 1]: CIFAR-10's have 0.47 and 0.25, ImageNet's
0.45 and 0.27. A teacher's normalisation need not tell: many transformers' is by 0.5 and 0.5."""

STEEPER = Fourier(decay=1.75)
"""For one without statistics: these hold fine detail back, and no other term does as much. Dreams
of a ConvNeXt of photographs are then half as far from what another network states of real ones."""


def terms_for(
    regularizers: Terms | OpenTerms,
    teacher: Teacher,
    note: Callable[[str], None] = lambda text: None,
) -> Terms:
    """Return the weighted terms to invert a teacher by, which fit it.

    Args:
        regularizers: the recipe's; ``auto`` chooses by what the teacher has.
        teacher: to be inverted.
        note: told what was chosen for a teacher without BatchNorm.

    Raises:
        TeacherMismatch: a term looks at what the teacher does not have, or nothing that it has
            tells pictures from noise.
    """
    if not isinstance(regularizers, str):
        check_terms(regularizers, teacher)
        return regularizers
    lacks = lack_of_statistics(teacher)
    if lacks is None:
        return STATISTICS
    blocks = feature_blocks(teacher)
    if not blocks:
        raise TeacherMismatch(
            f"{teacher.card.name} {lacks}, and no layer that could be seen puts out tokens or "
            "feature maps: nothing but its classes would shape images. Choose a teacher that has "
            "(a ResNet or a vision transformer, say), name the terms (DeepDream: tv and l2), or "
            "train on proxy images ({source: folder, path: ...})",
            ("regularizers",),
        )
    shifts = SHIFTS if norm_layers(teacher) else ()
    terms = (*PATCHES, *shifts, *spectrum_for(teacher.card))
    note(
        f"regularizers: auto is {told(terms)}, as {teacher.card.name} {lacks}; "
        f"seen at {len(blocks)} modules, {blocks[0].name} to {blocks[-1].name}"
    )
    with placed("regularizers"):
        check_patches(teacher, teacher.card.input_size[1:])
    return terms


def spectrum_for(card: Card) -> Terms:
    """Return natural_spectrum for images of three channels: no network has to tell it.

    On CIFAR-10 more of a transformer's dreams are known to another network. To a ConvNeXt's student
    the gain is within chance.
    """
    if card.input_size[0] != 3:
        return ()
    mean, deviation = fmean(card.mean), fmean(card.std)
    of_photographs, spread = PHOTOGRAPHS
    term = NaturalSpectrum(
        mean=round((of_photographs - mean) / deviation, 2),
        deviation=float(f"{spread / deviation:.3g}"),
    )
    return (Term("natural_spectrum", 1.0, term),)


def parameterisation_for(chosen: Parameterisation | None, teacher: Teacher) -> Parameterisation:
    """Return what an inversion's optimizer moves: as the recipe has it, or Fourier coefficients."""
    if chosen is not None:
        return chosen
    return Fourier() if lack_of_statistics(teacher) is None else STEEPER


def told(terms: Terms) -> str:
    """Return terms with their weights, in words."""
    return ", ".join(f"{term.name} {term.weight:g}" for term in terms)
