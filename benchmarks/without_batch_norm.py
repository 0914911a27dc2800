"""What regularizers are worth that need no BatchNorm.

Teachers are the bundled ones without BatchNorm, vision transformers and ConvNeXts, and the digits'
ResNet-8, inverted as if it had none. Dreams are judged by three strangers: how many of them another
network knows, how far they are from the statistics that a ResNet stores of the same training
images, as a multiple of chance, and what students know of test images that were taught on them. On
digits the other network is a small one that was trained on real digits (the extra ``demo`` brings
them), and the statistics are the ResNet-8's; on CIFAR-10 the bundled ResNet-20 is both.

    python benchmarks/without_batch_norm.py
    python benchmarks/without_batch_norm.py --teachers digits_vit --methods gram
    python benchmarks/without_batch_norm.py --features 0      # students learn by logits alone
    python benchmarks/without_batch_norm.py --teachers --test cifar10/test
    python benchmarks/without_batch_norm.py ... --images 256 --lessons 0      # without students
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from statistics import mean
from typing import Any

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F

import dreamkit
from dreamkit.errors import TeacherMismatch
from dreamkit.parameterisations.fourier import Fourier
from dreamkit.parameterisations.pixels import Pixels
from dreamkit.registry import Term
from dreamkit.regularizers.bn_feature import BNFeature
from dreamkit.regularizers.feature_prior import FeaturePrior
from dreamkit.regularizers.gram import Gram
from dreamkit.regularizers.l2 import L2Norm
from dreamkit.regularizers.tv import TotalVariation
from dreamkit.sources.digits import Digits
from dreamkit.sources.folder import Folder
from dreamkit.stages.batches import as_stored
from dreamkit.stages.statistics_distance import overall, statistics_distance
from dreamkit.synthesizers.automatic_terms import PATCHES
from dreamkit.synthesizers.bn_statistics import tapped
from dreamkit.synthesizers.deepinversion import DeepInversion
from dreamkit.synthesizers.engine import Engine
from dreamkit.synthesizers.inversion_loss import OpenTerms, check_terms, lack_of_statistics
from dreamkit.synthesizers.stage import Stage
from dreamkit.teachers.cifar_networks import build_network
from dreamkit.teachers.small_resnet import SmallResNet
from dreamkit.training.augmenter import Augmentation
from dreamkit.training.batches import in_order
from dreamkit.training.distillation import Distillation, Distiller
from dreamkit.types import BatchPlan, Images, Regularizer, StoredImages, Teacher

DIGITS = ("digits_vit", "digits_convnext", "digits_resnet8")
CIFAR = ("cifar10_vit", "cifar10_convnext")
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
Options = Mapping[str, Any]
"""Of ``DeepInversion``."""
TV = (Term("tv", 0.01, TotalVariation("l1")),)
BETWEEN = (Term("gram", 0.1, Gram(within=0.0)),)
DREAM = (Term("tv", 2.5e-5, TotalVariation()), Term("l2", 3e-8, L2Norm()))
PUBLISHED: Options = {
    "parameterisation": Pixels(),
    "lr": 0.05,
    "betas": (0.9, 0.999),
    "schedule": "constant",
    "clip": False,
}
"""How DeepInversion's paper optimises images of CIFAR-10's size."""


def prior(weight: float) -> tuple[Term[Regularizer], ...]:
    return (Term("feature_prior", weight, FeaturePrior()),)


METHODS: dict[str, Options] = {
    "cross-entropy alone": {"regularizers": ()},
    "DeepDream as published, on pixels": {"regularizers": DREAM, **PUBLISHED},
    "DeepDream: tv 2.5e-5, l2 3e-8": {"regularizers": DREAM},
    "patch_similarity 0.1 alone": {"regularizers": PATCHES},
    "feature_prior 10": {"regularizers": prior(10)},
    **{
        f"patch_similarity 0.1, feature_prior {weight}": {
            "regularizers": (*PATCHES, *prior(weight))
        }
        for weight in (1, 10, 30)
    },
    "auto": {"regularizers": "auto"},
    "gram 0.1, between images": {"regularizers": BETWEEN},
    "gram 0.1, within an image": {"regularizers": (Term("gram", 0.1, Gram(between=0.0)),)},
    "tv 0.01, l1": {"regularizers": TV},
    "patch_similarity 0.1, gram 0.1 between, tv 0.01": {"regularizers": (*PATCHES, *BETWEEN, *TV)},
    "bn_feature 30": {"regularizers": (Term("bn_feature", 30.0, BNFeature()),)},
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


def told(field: str) -> str:
    return " and ".join(f"{getattr(budget, field)} ({name})" for name, budget in BUDGETS.items())


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
        "--test",
        metavar="DIR",
        help=f"class folders of CIFAR-10's test images: {' and '.join(CIFAR)} too",
    )
    parser.add_argument("--decay", type=float, help="of Fourier's amplitudes; else by the teacher")
    parser.add_argument("--colour-shift", type=float, default=0.0, help="of what each step sees")
    parser.add_argument("--images", type=int, help=f"a multiple of {BATCH}; else {told('images')}")
    parser.add_argument("--steps", type=int, help=f"of dreaming; else {told('steps')}")
    parser.add_argument("--lessons", type=int, help=f"else {told('lessons')}")
    return parser.parse_args()


def main() -> None:
    """Print a row for each teacher and method."""
    options = parse()
    torch.set_num_threads(1)
    teachers = {name: dreamkit.load_teacher(f"bundled:{name}") for name in options.teachers}
    strangers = {"digits": dreamkit.load_teacher("bundled:digits_resnet8")}
    judges = dict.fromkeys(teachers, verifier(strangers["digits"]))
    if options.test is not None:
        teachers |= {name: dreamkit.load_teacher(f"bundled:{name}") for name in CIFAR}
        strangers["cifar10"] = dreamkit.load_teacher("bundled:cifar10_resnet20")
        judges |= dict.fromkeys(CIFAR, _judge(strangers["cifar10"]))
    print("| teacher | terms | verifier | distance | student |\n| --- | --- | --- | --- | --- |")
    for name, teacher in teachers.items():
        source = Folder(options.test) if name in CIFAR else Digits("test")
        for method, how in METHODS.items():
            if options.methods not in method or not _fit(how["regularizers"], teacher):
                continue
            kind = name.partition("_")[0]
            given = {key: getattr(options, key) for key in ("images", "steps", "lessons")}
            asked = {key: value for key, value in given.items() if value is not None}
            budget = replace(BUDGETS[kind], **asked)
            form: dict[str, Any] = {"colour_shift": options.colour_shift}
            if options.decay is not None:
                form["parameterisation"] = Fourier(options.decay)
            dreams = dreamed(teacher, form | dict(how), budget, options.seed)
            far = distance(dreams, strangers[kind])
            known = _accuracy(judges[name], dreams.images, dreams.labels)
            real = source.open(teacher.card)
            learnt = ""
            if budget.lessons:
                student = taught(teacher, dreams, real, budget, options.seed, options.features)
                learnt = f"{student:.3f}"
            print(f"| {name} | {method} | {known:.3f} | {far:.2f} | {learnt} |", flush=True)


def _judge(judge: Teacher) -> Judge:
    return lambda stored: judge.model(judge.card.normalise(stored))


def _fit(terms: OpenTerms, teacher: Teacher) -> bool:
    if isinstance(terms, str):
        return lack_of_statistics(teacher) is not None
    try:
        check_terms(terms, teacher)
    except TeacherMismatch:
        return False
    return True


def dreamed(teacher: Teacher, how: Options, budget: Budget, seed: int) -> StoredImages:
    """Return dreams with their classes."""
    options = DeepInversion(
        **how,
        images=budget.images,
        batch_size=BATCH,
        stages=(Stage(budget.steps),),
        flip=teacher.card.input_size[0] > 1,
        engine=Engine("float32", compile=False),
    )
    images, labels = [], []
    with options.session(teacher, CPU, seed=seed) as dreamer:
        for batch in range(budget.images // BATCH):
            plan = BatchPlan(batch, 0, BATCH, seed=1000 * seed + batch)
            stored, _ = as_stored(dreamer.dream(plan, lambda step, terms: None), teacher)
            images.append(stored.images)
            labels.append(stored.labels)
    return StoredImages(torch.cat(images), torch.cat(labels))


@torch.no_grad()
def distance(dreams: StoredImages, stranger: Teacher) -> float:
    """Return how far dreams are from a network's statistics, as a multiple of chance."""
    found = []
    with tapped(stranger.model, each_image=True) as tap:
        for stored in dreams.images.split(BATCH):
            _, layers = tap(stranger.card.normalise(stored))
            far = overall(statistics_distance(layers))
            assert far is not None  # it has BatchNorm
            found.append(far)
    return mean(found)


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
