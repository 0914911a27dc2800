"""All that a plugin needs: hooks, the base of each kind of entry, what they see, options, events.

This is the one stable import path for code outside of dreamkit. The promise is that of semantic
versioning for this module, whatever is moved elsewhere in the package:

- What stands in ``__all__`` here, and the hooks in ``plugins/README.md``, work the same in every
  release with the same ``API``, as documented. All other modules may change in any release.
- Compatible, and to be expected: a new name here, hook, event or kind of entry; a new argument of a
  hook; a new field of a step or an event; a new member of a base that has a default.
- What is to go is deprecated first: for one minor version at least it works and warns. ``API``
  changes when it is gone.
- A plugin module may state what it is written for, ``dreamkit_api = "1"``. One that is written for
  another version is left out, by name.

Importing it is cheap: what comes with torch is imported when it is first asked for.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from dreamkit.errors import (
    DreamkitError,
    MissingPath,
    NonFiniteLoss,
    NothingToPrune,
    OptionError,
    TeacherMismatch,
    did_you_mean,
    import_extra,
)
from dreamkit.registry import (
    EntriesOf,
    EntryOf,
    Register,
    Term,
    TermsOf,
    hookimpl,
)

if TYPE_CHECKING:
    from pydantic import Field

    from dreamkit.card import Card
    from dreamkit.report.run_log import MemoryLog
    from dreamkit.stages.dreaming import images_of
    from dreamkit.types import (
        NO_LABEL,
        Application,
        BatchDreamed,
        BatchPlan,
        ChannelCall,
        ChannelGroup,
        ChannelRule,
        Chunk,
        Criterion,
        DistillationLoss,
        Dream,
        Dreamer,
        DreamsPictured,
        Estimate,
        Event,
        Exporter,
        FileLook,
        Heads,
        Images,
        ImageSource,
        IncrementalLoss,
        IncrementalStep,
        InversionStep,
        Labelled,
        LatencyBackend,
        LatencyTable,
        LayerShape,
        LayerStatistics,
        Member,
        NormMeans,
        Noted,
        OnImages,
        OnStep,
        Outcome,
        Parameterisation,
        PruningStep,
        Quantization,
        QuantizationStep,
        Quantizer,
        Recorded,
        Regularizer,
        RoundPruned,
        RunContext,
        RunFailed,
        RunFinished,
        RunLog,
        RunStarted,
        Saved,
        Selection,
        SelectionStep,
        Simulation,
        StoredImages,
        Synthesis,
        Synthesizer,
        Teacher,
        TeacherSource,
        Timing,
        Tracker,
        Watchable,
    )

API = "1"
"""The version of this contract."""

# fmt: off
__all__ = [  # noqa: RUF022
    "API", "hookimpl", "Register",
    # Bases, one for each kind of entry.
    "Application", "ChannelRule", "Criterion", "DistillationLoss", "Exporter", "ImageSource",
    "IncrementalLoss",
    "LatencyBackend", "Parameterisation", "Quantizer", "Regularizer", "Selection", "Synthesizer",
    "TeacherSource", "Tracker",
    # What entries see and return.
    "NO_LABEL", "BatchPlan", "Card", "ChannelCall", "ChannelGroup", "Chunk", "Dream", "Dreamer",
    "Estimate", "FileLook", "Heads", "Images", "IncrementalStep", "InversionStep", "Labelled",
    "LatencyTable", "LayerShape", "LayerStatistics", "Member", "MemoryLog", "NormMeans", "OnImages",
    "OnStep", "Outcome", "PruningStep", "Quantization", "QuantizationStep", "RunContext", "RunLog",
    "Saved", "SelectionStep", "Simulation", "StoredImages", "Synthesis", "Teacher", "Timing",
    "Watchable",
    # What applications are made with.
    "images_of",
    # Events.
    "BatchDreamed", "DreamsPictured", "Event", "Noted", "Recorded", "RoundPruned", "RunFailed",
    "RunFinished", "RunStarted",
    # Options.
    "EntriesOf", "EntryOf", "Field", "Term", "TermsOf",
    # Errors, and what their messages are made with.
    "DreamkitError", "MissingPath", "NonFiniteLoss", "NothingToPrune", "OptionError",
    "TeacherMismatch", "did_you_mean", "import_extra",
]
# fmt: on

_ELSEWHERE = {
    "Field": "pydantic",
    "Card": "dreamkit.card",
    "MemoryLog": "dreamkit.report.run_log",
    "images_of": "dreamkit.stages.dreaming",
}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'dreamkit.plugin' has no attribute {name!r}")
    return getattr(importlib.import_module(_ELSEWHERE.get(name, "dreamkit.types")), name)


def __dir__() -> list[str]:
    return sorted(__all__)
