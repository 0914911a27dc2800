"""What the rooms pass to one another: small dataclasses and the base of each kind of entry.

Images are either *stored* (uint8, 0 to 255) or *normalised* (float, (pixel/255 - mean) / std per
channel, as the teacher was trained on). Shapes are (N, C, H, W) throughout.
"""

from dreamkit.types.channels import ChannelCall, ChannelRule
from dreamkit.types.deployment import Exporter
from dreamkit.types.distillation import DistillationLoss
from dreamkit.types.events import (
    BatchDreamed,
    DreamsPictured,
    Event,
    Noted,
    Recorded,
    RoundPruned,
    RunFailed,
    RunFinished,
    RunStarted,
)
from dreamkit.types.images import (
    NO_LABEL,
    Images,
    ImageSource,
    Labelled,
    StoredImages,
    WithNotes,
    notes_of,
)
from dreamkit.types.incremental import Heads, IncrementalLoss, IncrementalNeed, IncrementalStep
from dreamkit.types.inversion import (
    BatchPlan,
    Dream,
    Dreamer,
    Estimate,
    InversionStep,
    Need,
    OnImages,
    OnStep,
    Parameterisation,
    Regularizer,
    Synthesis,
    Synthesizer,
    TakingTurns,
    Watchable,
    with_images,
)
from dreamkit.types.latency import LatencyBackend, LatencyTable, LayerShape, Timing
from dreamkit.types.layer_statistics import ImageStatistics, LayerStatistics, NormMeans
from dreamkit.types.models import Teacher, TeacherSource
from dreamkit.types.pruning import (
    ChannelGroup,
    Chunk,
    Criterion,
    Member,
    PruningStep,
    Saved,
    Selection,
    SelectionStep,
)
from dreamkit.types.quantization import (
    FileLook,
    Quantization,
    QuantizationStep,
    Quantizer,
    Simulation,
)
from dreamkit.types.runs import Application, Outcome, RunContext, RunLog
from dreamkit.types.tracking import Tracker

__all__ = [
    "NO_LABEL",
    "Application",
    "BatchDreamed",
    "BatchPlan",
    "ChannelCall",
    "ChannelGroup",
    "ChannelRule",
    "Chunk",
    "Criterion",
    "DistillationLoss",
    "Dream",
    "Dreamer",
    "DreamsPictured",
    "Estimate",
    "Event",
    "Exporter",
    "FileLook",
    "Heads",
    "ImageSource",
    "ImageStatistics",
    "Images",
    "IncrementalLoss",
    "IncrementalNeed",
    "IncrementalStep",
    "InversionStep",
    "Labelled",
    "LatencyBackend",
    "LatencyTable",
    "LayerShape",
    "LayerStatistics",
    "Member",
    "Need",
    "NormMeans",
    "Noted",
    "OnImages",
    "OnStep",
    "Outcome",
    "Parameterisation",
    "PruningStep",
    "Quantization",
    "QuantizationStep",
    "Quantizer",
    "Recorded",
    "Regularizer",
    "RoundPruned",
    "RunContext",
    "RunFailed",
    "RunFinished",
    "RunLog",
    "RunStarted",
    "Saved",
    "Selection",
    "SelectionStep",
    "Simulation",
    "StoredImages",
    "Synthesis",
    "Synthesizer",
    "TakingTurns",
    "Teacher",
    "TeacherSource",
    "Timing",
    "Tracker",
    "Watchable",
    "WithNotes",
    "notes_of",
    "with_images",
]
