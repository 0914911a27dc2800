"""The formula of the Inception score with a classifier of one's choice.

exp(E_x KL(p(y|x) ‖ p(y))) (Salimans et al., NeurIPS 2016, section 4): high where every image shows
one class clearly and all classes occur. It is the Inception score only with that Inception network,
which ``evaluation.fidelity`` has. Scores of different classifiers do not compare.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import log

import torch
from torch import Tensor

from dreamkit.errors import DreamkitError


@dataclass(frozen=True)
class ClassifierScore:
    """A score in [1, K] over splits: their mean and standard deviation (divided by their number).

    A split cannot score more than it has images.
    """

    mean: float
    std: float
    images: int
    splits: int


def classifier_score(logits: Tensor, splits: int, generator: torch.Generator) -> ClassifierScore:
    """Score a classifier's outputs on a set of images.

    Args:
        logits: (N, K).
        splits: how many parts, equal to within one image, are scored on their own.
        generator: shuffles the images first, since many sets are sorted by class.

    Raises:
        DreamkitError: there are fewer images than splits.
    """
    if len(logits) < splits:
        raise DreamkitError(f"{len(logits)} images cannot make {splits} splits", ("splits",))
    order = torch.randperm(len(logits), generator=generator)
    logits = logits.cpu()
    scores = torch.stack([_score(logits[part]) for part in order.tensor_split(splits)])
    return ClassifierScore(
        float(scores.mean()), float(scores.std(correction=0)), len(logits), splits
    )


def _score(logits: Tensor) -> Tensor:
    log_p = logits.double().log_softmax(1)
    marginal = log_p.logsumexp(0) - log(len(log_p))
    return (log_p.exp() * (log_p - marginal)).sum(1).mean().exp()
