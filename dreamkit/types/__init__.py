"""What the rooms pass to one another: small dataclasses and the protocols of each kind of entry.

Images are either *stored* (uint8, 0 to 255) or *normalised* (float, (pixel/255 - mean) / std per
channel, as the teacher was trained on). Shapes are (N, C, H, W) throughout.
"""

from dreamkit.types.channels import ChannelCall, ChannelRule
from dreamkit.types.deployment import Exporter
from dreamkit.types.images import NO_LABEL, Images, ImageSource, StoredImages
from dreamkit.types.incremental import IncrementalLoss, IncrementalStep
from dreamkit.types.inversion import (
    BatchPlan,
    Dream,
    Dreamer,
    Estimate,
    InversionStep,
    LayerStatistics,
    OnStep,
    Parameterisation,
    Regularizer,
    Synthesis,
    Synthesizer,
    needs,
)
from dreamkit.types.latency import LatencyBackend, LatencyTable, LayerShape, Timing
from dreamkit.types.models import Teacher, TeacherSource
from dreamkit.types.pruning import ChannelGroup, Criterion, Member, PruningStep
from dreamkit.types.runs import Application, Outcome, RunContext, RunLog, Tracker

__all__ = [
    "NO_LABEL",
    "Application",
    "BatchPlan",
    "ChannelCall",
    "ChannelGroup",
    "ChannelRule",
    "Criterion",
    "Dream",
    "Dreamer",
    "Estimate",
    "Exporter",
    "ImageSource",
    "Images",
    "IncrementalLoss",
    "IncrementalStep",
    "InversionStep",
    "LatencyBackend",
    "LatencyTable",
    "LayerShape",
    "LayerStatistics",
    "Member",
    "OnStep",
    "Outcome",
    "Parameterisation",
    "PruningStep",
    "Regularizer",
    "RunContext",
    "RunLog",
    "StoredImages",
    "Synthesis",
    "Synthesizer",
    "Teacher",
    "TeacherSource",
    "Timing",
    "Tracker",
    "needs",
]
