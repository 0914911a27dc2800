"""The options of structured pruning."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from dreamkit.errors import MissingPath, OptionError
from dreamkit.pruning.selection import Greedy, Limits
from dreamkit.registry import EntryOf, Term, TermsOf
from dreamkit.stages.budget import Target
from dreamkit.stages.compensating import Compensation
from dreamkit.stages.depth import Depth
from dreamkit.stages.ranking import Normalise
from dreamkit.stages.reconstructing import Reconstruction
from dreamkit.stages.sensitivity import Sensitivity
from dreamkit.stages.teaching import Recovery
from dreamkit.training.statistics import Statistics
from dreamkit.types import Criterion, Selection


@dataclass(frozen=True)
class ChannelPruning:
    """How channels are ranked and removed until a target is met.

    Args:
        criteria: the weighted terms of the importance I; the lowest goes first.
        target: what is to be left.
        depth: whole residual blocks go first, as long as channels that save as much do more harm;
            null leaves all blocks.
        compensation: weights of the channels that stay make up for those that go, in every round;
            null leaves them as they are.
        reconstruction: least squares, layer by layer, between what is left and the teacher, before
            the recovery; null leaves the weights as they are until then.
        reconstruct_each: do that in every round, before ``finetune``, so that channels are ranked
            on what the network has become without those that went. It makes anew what the last
            ``finetune`` taught, of which the ranking remains.
        finetune: distillation between two rounds of pruning, with ``adaptive`` on the first of its
            dreams; null prunes without a pause.
        finetune_drop: train after a round only if agreement with the teacher, on images of the
            run, has fallen by more than this share since the last training; null trains after each.
        limits: floors and chunk size.
        sensitivity: a look at each group before anything is cut: what removing a part of it does to
            agreement with the teacher, for the report, and for limits where ``max_drop`` is set;
            null does without.
        importance: what chunks are chosen by: ``criteria``, or what the ``sensitivity`` pass
            ``measured`` of each group, along the order of the criteria.
        selection: how channels are chosen: ``greedy``, the lowest importance first, per channel
            (the paper) or per cost; ``knapsack``, the least importance that saves what a round has
            to (HALP; Shen et al., NeurIPS 2022); or a plugin's.
        step: what is removed between two rankings at the most, a share of the prunable channels
            (``greedy``) or of what each goal counts (``knapsack``, and ``greedy`` per cost).
        ranking_batches: batches of images a ranking is averaged over.
        batch_size: images in each of them, and of those that statistics are taken over.
        statistics: BatchNorm's after every step: ``difference``, the teacher's, moved by what
            student and teacher see differently of the images, and after a ``finetune`` with
            BatchNorm frozen those that it had, moved likewise by what was removed since;
            ``recalibrate``, those of the images, which for dreams are not those of real images;
            ``keep``, those that it has.
        statistics_batches: batches of images that these are taken over.
        normalise: what each criterion's values are divided by, so that weights compare criteria
            of different units: the ``mean`` or the ``max`` of their absolute values over all
            channels, the mean within each ``group`` (for criteria whose size differs from layer
            to layer), or ``none``, which is eq. 10 as it stands.
        latency_table: a table that ``dreamkit lut build`` measured on this target; what it lacks
            is measured during the run.
    """

    criteria: Annotated[tuple[Term[Criterion], ...], TermsOf("criteria")]
    target: Target
    depth: Depth | None = field(default_factory=Depth)
    compensation: Compensation | None = field(default_factory=Compensation)
    reconstruction: Reconstruction | None = None
    reconstruct_each: bool = False
    finetune: Recovery | None = None
    finetune_drop: Annotated[float, Field(ge=0, lt=1)] | None = None
    limits: Limits = field(default_factory=Limits)
    sensitivity: Sensitivity | None = None
    importance: Literal["criteria", "measured"] = "criteria"
    selection: Annotated[Selection, EntryOf("selections")] = field(default_factory=Greedy)
    step: Annotated[float, Field(gt=0, le=1)] = 0.05
    ranking_batches: Annotated[int, Field(ge=1)] = 8
    batch_size: Annotated[int, Field(ge=2)] = 64
    statistics: Statistics = "difference"
    statistics_batches: Annotated[int, Field(ge=1)] = 16
    normalise: Normalise = "mean"
    latency_table: str | None = None

    def __post_init__(self) -> None:
        if not self.criteria:
            raise ValueError("criteria: give at least one criterion")
        if self.reconstruction is None and self.reconstruct_each:
            raise OptionError("reconstruct_each", "set 'reconstruction' too: it says how")
        if self.reconstruction and self.finetune and not self.reconstruct_each:
            raise OptionError(
                "reconstruct_each",
                "set it to true: a fit at the end alone would undo all that 'finetune' taught",
            )
        if self.importance == "measured" and self.sensitivity is None:
            raise OptionError("importance", "set 'sensitivity' too: it is what measures")
        if self.finetune_drop is not None and self.finetune is None:
            raise OptionError("finetune_drop", "set 'finetune' too: it says how to train")
        if self.latency_table is not None and not Path(self.latency_table).is_file():
            raise MissingPath("latency_table", f"no such table: {self.latency_table}")
