"""What regularizers are worth that need no BatchNorm, on a teacher whose statistics are known.

The bundled digits teacher has BatchNorm, and is inverted as if it had none. Its statistics judge:
the distance of dreams from them, as a multiple of chance, which no term but ``bn_feature`` sees. So
does a small network trained on the real digits (the extra ``demo`` brings them).

    python benchmarks/without_batch_norm.py
"""

from __future__ import annotations

from statistics import mean

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F

import dreamkit
from dreamkit.registry import Term
from dreamkit.regularizers.bn_feature import BNFeature
from dreamkit.regularizers.gram import Gram
from dreamkit.regularizers.l2 import L2Norm
from dreamkit.regularizers.patch_similarity import PatchSimilarity
from dreamkit.regularizers.tv import TotalVariation
from dreamkit.stages.batches import as_stored
from dreamkit.stages.statistics_distance import overall
from dreamkit.synthesizers.automatic_terms import UNLIKE
from dreamkit.synthesizers.deepinversion import DeepInversion
from dreamkit.synthesizers.engine import Engine
from dreamkit.synthesizers.stage import Stage
from dreamkit.types import BatchPlan, Regularizer, Teacher

IMAGES, STEPS, SEEDS = 64, 240, (0, 1, 2)
Terms = tuple[Term[Regularizer], ...]
METHODS: dict[str, Terms] = {
    "cross-entropy alone": (),
    "DeepDream: tv 2.5e-5, l2 3e-8": (
        Term("tv", 2.5e-5, TotalVariation()),
        Term("l2", 3e-8, L2Norm()),
    ),
    "patch_similarity 0.1": (Term("patch_similarity", 0.1, PatchSimilarity()),),
    "gram 0.1, between images (auto)": UNLIKE,
    "gram 0.1, within an image": (Term("gram", 0.1, Gram(between=0.0)),),
    "tv 0.01, l1": (Term("tv", 0.01, TotalVariation("l1")),),
    "patch_similarity 0.1, gram 0.1 between, tv 0.01": (
        Term("patch_similarity", 0.1, PatchSimilarity()),
        Term("gram", 0.1, Gram(within=0.0)),
        Term("tv", 0.01, TotalVariation("l1")),
    ),
    "bn_feature 30": (Term("bn_feature", 30.0, BNFeature()),),
}


def verifier(teacher: Teacher) -> nn.Module:
    """Return a network of another kind, trained on 1,300 real digits, and say how good it is."""
    torch.manual_seed(0)
    pixels, labels = load_digits(return_X_y=True)
    images = teacher.card.normalise(torch.tensor(pixels / 16 * 255).byte().view(-1, 1, 8, 8))
    classes, order = torch.tensor(labels), torch.randperm(len(labels))
    seen, held_out = order[:1300], order[1300:]
    model = nn.Sequential(
        *(nn.Conv2d(1, 24, 3, padding=1), nn.GELU()),
        *(nn.Conv2d(24, 48, 3, padding=1, stride=2), nn.GELU()),
        *(nn.Flatten(), nn.Linear(48 * 16, 10)),
    )
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3, weight_decay=0.01)
    for _ in range(15):
        for batch in seen[torch.randperm(len(seen))].split(64):
            noisy = images[batch] + 0.1 * torch.randn(len(batch), 1, 8, 8)
            optimizer.zero_grad()
            F.cross_entropy(model(noisy), classes[batch]).backward()
            optimizer.step()
    print(
        f"the verifier knows {_accuracy(model, images[held_out], classes[held_out]):.3f} of digits"
    )
    return model


@torch.no_grad()
def _accuracy(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    return float((model(images).argmax(1) == labels).float().mean())


def main() -> None:
    """Print a row for each method: means over seeds."""
    torch.set_num_threads(1)
    teacher = dreamkit.load_teacher("bundled:digits_resnet8")
    judge = verifier(teacher)
    print("| terms | verifier | distance |\n| --- | --- | --- |")
    for name, terms in METHODS.items():
        options = DeepInversion(
            regularizers=terms,
            images=IMAGES,
            batch_size=IMAGES,
            stages=(Stage(STEPS),),
            engine=Engine("float32", compile=False),
        )
        known, far = [], []
        for seed in SEEDS:
            with options.session(teacher, torch.device("cpu"), seed=seed) as dreamer:
                plan = BatchPlan(0, 0, IMAGES, seed)
                dream = dreamer.dream(plan, lambda step, terms: None)
            stored, quality = as_stored(dream, teacher)
            known.append(_accuracy(judge, teacher.card.normalise(stored.images), stored.labels))
            far.append(overall(quality.statistics_distance) or float("nan"))
        print(f"| {name} | {mean(known):.3f} | {mean(far):.2f} |", flush=True)


if __name__ == "__main__":
    main()
