"""The network that a teacher competes with by ``js_compete``, where the recipe names one."""

from __future__ import annotations

from torch import nn

from dreamkit.errors import placed
from dreamkit.seeds import derived_seed
from dreamkit.synthesizers.inversion_loss import OpenTerms, Terms, competing
from dreamkit.teachers.checking import check_fits
from dreamkit.teachers.intake import admit
from dreamkit.types import Teacher, TeacherSource


def competitor(
    source: TeacherSource | None, regularizers: Terms | OpenTerms, teacher: Teacher, seed: int = 0
) -> nn.Module | None:
    """Return the competitor that a recipe names; None if it names none, or no term has one.

    Args:
        source: of it.
        regularizers: the recipe's.
        teacher: whose images it has to take.
        seed: the run's, of its weights where they are random.

    Raises:
        DreamkitError: it cannot be loaded, or takes other images or puts out other classes.
    """
    if source is None or competing(regularizers) is None:
        return None
    with placed("student"):
        found = admit(source.load(derived_seed(seed, "rival")), role="the competitor")
        check_fits(found.card, teacher.card)
    return found.model
