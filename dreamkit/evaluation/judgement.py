"""One verifier's whole judgement of a set of images."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from dreamkit.evaluation.classifier_score import ClassifierScore, classifier_score
from dreamkit.evaluation.cross_model import observe
from dreamkit.evaluation.frechet_distance import frechet_distance
from dreamkit.types import Images, Teacher


@dataclass(frozen=True)
class Judgement:
    """What a verifier says of a set of images.

    Args:
        accuracy: on the labels they carry, in [0, 1]; None where they carry none.
        score: its classifier score.
        frechet_distance: to the reference at the layer; None without a reference.
        features: how many the layer has, None without a reference.
        biased: too few images, or reference images, for a covariance of full rank.
    """

    accuracy: float | None
    score: ClassifierScore
    frechet_distance: float | None = None
    features: int | None = None
    biased: bool = False

    def metrics(self) -> dict[str, float]:
        """Return the numbers by the last part of their metric's name."""
        known = {
            "accuracy": self.accuracy,
            "classifier_score": self.score.mean,
            "classifier_score_std": self.score.std,
            "frechet_distance": self.frechet_distance,
        }
        return {name: value for name, value in known.items() if value is not None}


def judge_by(
    verifier: Teacher,
    images: Images,
    reference: Images | None,
    layer: str | None,
    splits: int,
    seed: int,
    device: torch.device,
    advance: Callable[[int], None] = lambda images: None,
) -> Judgement:
    """Show images, and real ones beside them, to a verifier; it is moved to ``device``.

    Args:
        verifier: left as it was but for its place.
        images: what is judged.
        reference: real images of the same size; None leaves the Fréchet distance out.
        layer: where features are taken; needed with a reference.
        splits: of the classifier score.
        seed: shuffles the images before they are split.
        device: where to work.
        advance: told how many images are done.
    """
    verifier.model.to(device)
    seen = observe(verifier, images, device, layer if reference is not None else None, advance)
    score = classifier_score(seen.logits, splits, torch.Generator().manual_seed(seed))
    if reference is None:
        return Judgement(seen.accuracy, score)
    done = len(images)
    real = observe(verifier, reference, device, layer, lambda count: advance(done + count))
    assert seen.features is not None
    assert real.features is not None
    return Judgement(
        seen.accuracy,
        score,
        frechet_distance(seen.features, real.features),
        len(real.features.mean),
        seen.features.short or real.features.short,
    )
