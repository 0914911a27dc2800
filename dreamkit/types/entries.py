"""What a class must have to be an entry of a kind."""

from __future__ import annotations

import inspect
from dataclasses import fields, is_dataclass
from typing import get_args

from dreamkit.types.channels import ChannelRule
from dreamkit.types.deployment import Exporter
from dreamkit.types.distillation import DistillationLoss
from dreamkit.types.images import ImageSource
from dreamkit.types.incremental import IncrementalLoss, IncrementalNeed
from dreamkit.types.inversion import Need, Parameterisation, Regularizer, Synthesizer
from dreamkit.types.latency import LatencyBackend
from dreamkit.types.models import TeacherSource
from dreamkit.types.needs import check_needs
from dreamkit.types.pruning import Criterion, Selection
from dreamkit.types.quantization import Quantizer
from dreamkit.types.runs import Application
from dreamkit.types.tracking import Tracker

BASES: dict[str, type] = {
    "regularizers": Regularizer,
    "synthesizers": Synthesizer,
    "parameterisations": Parameterisation,
    "teachers": TeacherSource,
    "sources": ImageSource,
    "criteria": Criterion,
    "channel_rules": ChannelRule,
    "losses": IncrementalLoss,
    "distillation_losses": DistillationLoss,
    "selections": Selection,
    "latency_backends": LatencyBackend,
    "applications": Application,
    "exporters": Exporter,
    "quantizers": Quantizer,
    "trackers": Tracker,
}
"""The base class of each kind of entry, whose defaults an entry has where it says nothing."""

NEEDS = {"regularizers": get_args(Need), "losses": get_args(IncrementalNeed)}
"""What entries of a kind may declare that they need."""


def check_entry(kind: str, cls: type) -> None:
    """Refuse a class that lacks what entries of a kind have.

    A class that has all of it need not derive from the kind's base.

    Raises:
        TypeError: naming what it lacks, or what is wrong with its ``needs``.
    """
    base = BASES.get(kind)
    if base is None:
        return
    if issubclass(cls, base):
        lacking = sorted(getattr(cls, "__abstractmethods__", ()))
        mend = ""
    else:
        lacking = sorted(_members(base) - _members(cls))
        mend = f": derive it from dreamkit.plugin.{base.__name__}"
    if lacking:
        raise TypeError(f"{cls.__name__} has no {', '.join(map(repr, lacking))}{mend}")
    if is_dataclass(cls):
        for hidden in (f.name for f in fields(cls) if isinstance(f.default, property)):
            raise TypeError(
                f"{cls.__name__}.{hidden} is a property of {base.__name__}: an option of that name "
                "needs a default"
            )
    if kind in NEEDS:
        check_needs(cls, NEEDS[kind])


def _members(cls: type) -> set[str]:
    """Return the names that a class and those above it define or annotate."""
    above = [above for above in inspect.getmro(cls) if above is not object]
    names = {name for c in above for name in (*vars(c), *vars(c).get("__annotations__", ()))}
    return {name for name in names if name == "__call__" or not name.startswith("_")}
