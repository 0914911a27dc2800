"""Inception score and FID, the standard ones, as the library torch-fidelity computes them.

Salimans et al., NeurIPS 2016; Heusel et al., NeurIPS 2017; with the TensorFlow Inception network of
2015. Published figures are of 50,000 images and 10 splits; fewer images bias both.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from dreamkit.errors import DreamkitError, import_extra
from dreamkit.model_state import seeded
from dreamkit.types import Images
from dreamkit.wording import first_line

EXTRA = "fidelity"
WEIGHTS_FILE = "weights-inception-2015-12-05-6726825d.pth"
WEIGHTS_URL = f"https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/{WEIGHTS_FILE}"
_EXTRACTOR = "inception-v3-compat"
_BATCH = 64


@dataclass(frozen=True)
class FidelityScores:
    """The Inception score over splits, and FID where there are reference images."""

    inception_score: float
    inception_score_std: float
    fid: float | None


class _Pictures(Dataset[Tensor]):
    """Stored images as torch-fidelity takes them: uint8 (3, H, W); one channel is repeated."""

    def __init__(self, images: Images) -> None:
        self.images = images

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Tensor:
        image = self.images.batch([index])[0][0]
        return image if len(image) == 3 else image.expand(3, -1, -1)


def check_fidelity(channels: int) -> None:
    """Make sure, before anything is dreamed, that the scores can be computed.

    torch-fidelity downloads its Inception weights (91 MB) on first use.

    Raises:
        DreamkitError: the library is missing, its weights are neither here nor to be had, or the
            images are neither grey nor RGB.
    """
    if channels not in {1, 3}:
        raise DreamkitError(f"Inception takes grey or RGB images, not {channels} channels")
    library = import_extra("torch_fidelity", EXTRA)
    extractors = import_extra("torch_fidelity.registry", EXTRA).FEATURE_EXTRACTORS_REGISTRY
    layers = ["2048", "logits_unbiased"]
    try:
        extractors[_EXTRACTOR](_EXTRACTOR, layers)
    except Exception as error:  # no network, a damaged file, no room on the disk
        reason = first_line(error)
        version = getattr(library, "__version__", "of unknown version")
        raise DreamkitError(
            f"the Inception weights of torch-fidelity {version} cannot be had "
            f"({type(error).__name__}: {reason}). Fetch {WEIGHTS_URL} on a machine with a network "
            f"and put it at {weights_path()}"
        ) from error


def weights_path() -> Path:
    """Return where torch-fidelity looks for its Inception weights before it downloads them."""
    return Path(torch.hub.get_dir()) / "checkpoints" / WEIGHTS_FILE


def fidelity_scores(
    images: Images, reference: Images | None, splits: int, device: torch.device, seed: int
) -> FidelityScores:
    """Return the Inception score of images, and their FID to reference images.

    Inception resizes what it gets to 299×299 itself, as the TensorFlow original does.

    Args:
        images: at least one for each split, grey or RGB.
        reference: real images; None leaves FID out.
        splits: of the Inception score.
        device: works on CUDA there, else on the CPU.
        seed: shuffles the images before they are split.

    Raises:
        DreamkitError: there are fewer images than splits, or too few for a covariance.
    """
    if len(images) < splits:
        raise DreamkitError(f"{len(images)} images cannot make {splits} splits", ("splits",))
    if reference is not None and min(len(images), len(reference)) < 2:
        raise DreamkitError("FID needs at least two images on either side", ("reference",))
    library = import_extra("torch_fidelity", EXTRA)
    with seeded(seed):
        found: dict[str, Any] = library.calculate_metrics(
            input1=_Pictures(images),
            input2=None if reference is None else _Pictures(reference),
            isc=True,
            fid=reference is not None,
            isc_splits=splits,
            batch_size=_BATCH,
            cuda=device.type == "cuda",
            rng_seed=seed % 2**32,
            samples_shuffle=True,
            cache=False,
            save_cpu_ram=True,  # reads in this process; images may be mapped from disk
            verbose=False,
        )
    fid = found.get(library.KEY_METRIC_FID)
    return FidelityScores(
        float(found[library.KEY_METRIC_ISC_MEAN]),
        float(found[library.KEY_METRIC_ISC_STD]),
        None if fid is None else float(fid),
    )
