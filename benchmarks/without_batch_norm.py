"""What regularizers are worth that need no BatchNorm.

Teachers are the bundled ones without BatchNorm, a vision transformer and ConvNeXts, and those with
it, inverted as if they had none. Their statistics judge too: the distance of dreams from them, as a
multiple of chance, which no term but ``bn_feature`` sees. All dreams are judged by another network,
and by how much of the test images students know that were taught on the dreams. On digits the judge
is a small network that was trained on the real ones (the extra ``demo`` brings them); on CIFAR-10
it is the bundled ResNet-20.

    python benchmarks/without_batch_norm.py
    python benchmarks/without_batch_norm.py --teachers digits_vit --methods gram
    python benchmarks/without_batch_norm.py --features 0      # students learn by logits alone
    python benchmarks/without_batch_norm.py --teachers --test cifar10/test
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from statistics import mean

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F

import dreamkit
from dreamkit.errors import TeacherMismatch
from dreamkit.registry import Term
from dreamkit.regularizers.bn_feature import BNFeature
from dreamkit.regularizers.feature_prior import FeaturePrior
from dreamkit.regularizers.gram import Gram
from dreamkit.regularizers.l2 import L2Norm
from dreamkit.regularizers.patch_similarity import PatchSimilarity
from dreamkit.regularizers.tv import TotalVariation
from dreamkit.sources.digits import Digits
from dreamkit.sources.folder import Folder
from dreamkit.stages.batches import as_stored
from dreamkit.stages.statistics_distance import overall
from dreamkit.synthesizers.automatic_terms import PATCHES
from dreamkit.synthesizers.deepinversion import DeepInversion
from dreamkit.synthesizers.engine import Engine
from dreamkit.synthesizers.inversion_loss import check_terms
from dreamkit.synthesizers.stage import Stage
from dreamkit.teachers.cifar_networks import build_network
from dreamkit.teachers.small_resnet import SmallResNet
from dreamkit.training.augmenter import Augmentation
from dreamkit.training.batches import in_order
from dreamkit.training.distillation import Distillation, Distiller
from dreamkit.types import BatchPlan, Images, Regularizer, StoredImages, Teacher

DIGITS = ("digits_vit", "digits_convnext", "digits_resnet8")
CIFAR = "cifar10_convnext"
Judge = Callable[[Tensor], Tensor]
"""From stored images to logits."""


@dataclass(frozen=True)
class Budget:
    """How much is done for a row: dreams, and the students taught on them."""

    images: int
    steps: int
    lessons: int
    students: int


BUDGETS = {"digits": Budget(512, 200, 300, 2), "cifar10": Budget(1024, 100, 800, 1)}
BATCH = 256
CPU = torch.device("cpu")
Terms = tuple[Term[Regularizer], ...]
METHODS: dict[str, Terms] = {
    "cross-entropy alone": (),
    "DeepDream: tv 2.5e-5, l2 3e-8": (
        Term("tv", 2.5e-5, TotalVariation()),
        Term("l2", 3e-8, L2Norm()),
    ),
    "patch_similarity 0.1 (auto)": PATCHES,
    "feature_prior 10": (Term("feature_prior", 10.0, FeaturePrior()),),
    **{
        f"patch_similarity 0.1, feature_prior {weight}": (
            *PATCHES,
            Term("feature_prior", float(weight), FeaturePrior()),
        )
        for weight in (1, 10, 30)
    },
    "gram 0.1, between images": (Term("gram", 0.1, Gram(within=0.0)),),
    "gram 0.1, within an image": (Term("gram", 0.1, Gram(between=0.0)),),
    "tv 0.01, l1": (Term("tv", 0.01, TotalVariation("l1")),),
    "patch_similarity 0.1, gram 0.1 between, tv 0.01": (
        Term("patch_similarity", 0.1, PatchSimilarity()),
        Term("gram", 0.1, Gram(within=0.0)),
        Term("tv", 0.01, TotalVariation("l1")),
    ),
    "bn_feature 30": (Term("bn_feature", 30.0, BNFeature()),),
}


def verifier(teacher: Teacher) -> Judge:
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
    return lambda stored: model(teacher.card.normalise(stored))


@torch.no_grad()
def _accuracy(model: Judge, images: Tensor, labels: Tensor) -> float:
    return float((model(images).argmax(1) == labels).float().mean())


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--teachers", nargs="*", choices=DIGITS, default=list(DIGITS))
    parser.add_argument("--methods", metavar="TEXT", default="", help="those with this in the name")
    parser.add_argument("--seed", type=int, default=0, help="of dreams and students")
    parser.add_argument(
        "--features", type=float, default=Distillation().features, help="weight in what is taught"
    )
    parser.add_argument(
        "--test", metavar="DIR", help=f"class folders of CIFAR-10's test images: {CIFAR} too"
    )
    return parser.parse_args()


def main() -> None:
    """Print a row for each teacher and method."""
    options = parse()
    torch.set_num_threads(1)
    teachers = {name: dreamkit.load_teacher(f"bundled:{name}") for name in options.teachers}
    judges = dict.fromkeys(teachers, verifier(dreamkit.load_teacher("bundled:digits_resnet8")))
    if options.test is not None:
        teachers[CIFAR] = dreamkit.load_teacher(f"bundled:{CIFAR}")
        judges[CIFAR] = _bundled("cifar10_resnet20")
    print("| teacher | terms | verifier | student | distance |\n| --- | --- | --- | --- | --- |")
    for name, teacher in teachers.items():
        source = Folder(options.test) if name == CIFAR else Digits("test")
        for method, terms in METHODS.items():
            if options.methods not in method or not _fit(terms, teacher):
                continue
            budget = BUDGETS[name.partition("_")[0]]
            dreams, far = dreamed(teacher, terms, budget, options.seed)
            known = _accuracy(judges[name], dreams.images, dreams.labels)
            real = source.open(teacher.card)
            student = taught(teacher, dreams, real, budget, options.seed, options.features)
            print(f"| {name} | {method} | {known:.3f} | {student:.3f} | {far} |", flush=True)


def _bundled(name: str) -> Judge:
    judge = dreamkit.load_teacher(f"bundled:{name}")
    return lambda stored: judge.model(judge.card.normalise(stored))


def _fit(terms: Terms, teacher: Teacher) -> bool:
    try:
        check_terms(terms, teacher)
    except TeacherMismatch:
        return False
    return True


def dreamed(teacher: Teacher, terms: Terms, budget: Budget, seed: int) -> tuple[StoredImages, str]:
    """Return dreams with their classes, and their distance to the teacher's statistics."""
    options = DeepInversion(
        regularizers=terms,
        images=budget.images,
        batch_size=BATCH,
        stages=(Stage(budget.steps),),
        flip=teacher.card.input_size[0] > 1,
        engine=Engine("float32", compile=False),
    )
    images, labels, far = [], [], []
    with options.session(teacher, CPU, seed=seed) as dreamer:
        for batch in range(budget.images // BATCH):
            plan = BatchPlan(batch, 0, BATCH, seed=1000 * seed + batch)
            stored, quality = as_stored(dreamer.dream(plan, lambda step, terms: None), teacher)
            images.append(stored.images)
            labels.append(stored.labels)
            far.append(overall(quality.statistics_distance))
    distances = [distance for distance in far if distance is not None]
    distance = f"{mean(distances):.2f}" if distances else ""
    return StoredImages(torch.cat(images), torch.cat(labels)), distance


def taught(
    teacher: Teacher, dreams: StoredImages, real: Images, budget: Budget, first: int, weight: float
) -> float:
    """Return the accuracy of a ResNet taught on dreams: mean of seeds."""
    found = []
    coloured = teacher.card.input_size[0] > 1
    how = Distillation(
        steps=budget.lessons,
        batch_size=64,
        weight_decay=5e-4,
        features=weight,
        augmentation=Augmentation(crop=4, flip=True) if coloured else Augmentation(),
    )
    for seed in range(first, first + budget.students):
        torch.manual_seed(seed)
        student = (
            build_network("resnet20")
            if coloured
            else SmallResNet(depth=8, num_classes=10, in_channels=1, width=16)
        )
        lessons = Distiller(student, teacher.model, teacher.card, how, CPU, seed, how.steps)
        for _ in range(budget.lessons):
            lessons.step(dreams.batch(torch.randint(len(dreams), (64,)).tolist()))
        lessons.finish([dreams])
        right = [
            _accuracy(student, teacher.card.normalise(stored), labels) * len(labels)
            for stored, labels in in_order(real, 1000)
        ]
        found.append(sum(right) / len(real))
    return mean(found)


if __name__ == "__main__":
    main()
