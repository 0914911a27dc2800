"""What regularizers are worth that need no BatchNorm, on digits.

Teachers are the bundled ones without BatchNorm, a vision transformer and a ConvNeXt, and the one
with it, inverted as if it had none. Its statistics judge too: the distance of dreams from them, as
a multiple of chance, which no term but ``bn_feature`` sees. All dreams are judged by a small
network that was trained on the real digits (the extra ``demo`` brings them), and by how much of
these two students know that were taught on the dreams.

    python benchmarks/without_batch_norm.py
    python benchmarks/without_batch_norm.py --teachers digits_vit --methods gram
"""

from __future__ import annotations

import argparse
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
from dreamkit.sources.digits import Digits
from dreamkit.stages.batches import as_stored
from dreamkit.stages.statistics_distance import overall
from dreamkit.synthesizers.automatic_terms import PATCHES
from dreamkit.synthesizers.deepinversion import DeepInversion
from dreamkit.synthesizers.engine import Engine
from dreamkit.synthesizers.stage import Stage
from dreamkit.teachers.small_resnet import SmallResNet
from dreamkit.types import BatchPlan, Images, Regularizer, StoredImages, Teacher

TEACHERS = ("digits_vit", "digits_convnext", "digits_resnet8")
IMAGES, BATCH, STEPS = 512, 256, 200
STUDENTS, LESSONS = (0, 1), 300
"""Seeds of the networks that are taught on dreams, and the steps of each."""
Terms = tuple[Term[Regularizer], ...]
METHODS: dict[str, Terms] = {
    "cross-entropy alone": (),
    "DeepDream: tv 2.5e-5, l2 3e-8": (
        Term("tv", 2.5e-5, TotalVariation()),
        Term("l2", 3e-8, L2Norm()),
    ),
    "patch_similarity 0.1 (auto)": PATCHES,
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


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--teachers", nargs="+", choices=TEACHERS, default=list(TEACHERS))
    parser.add_argument("--methods", metavar="TEXT", default="", help="those with this in the name")
    return parser.parse_args()


def main() -> None:
    """Print a row for each teacher and method."""
    options = parse()
    torch.set_num_threads(1)
    teachers = {name: dreamkit.load_teacher(f"bundled:{name}") for name in options.teachers}
    judge = verifier(next(iter(teachers.values())))
    print("| teacher | terms | verifier | student | distance |\n| --- | --- | --- | --- | --- |")
    for name, teacher in teachers.items():
        stated = any(isinstance(m, nn.BatchNorm2d) for m in teacher.model.modules())
        for method, terms in METHODS.items():
            statistics = any(term.name == "bn_feature" for term in terms)
            if options.methods in method and (stated or not statistics):
                dreams, far = dreamed(teacher, terms)
                known = _accuracy(judge, teacher.card.normalise(dreams.images), dreams.labels)
                student = taught(teacher, dreams.images, Digits("test").open(teacher.card))
                print(f"| {name} | {method} | {known:.3f} | {student:.3f} | {far} |", flush=True)


def dreamed(teacher: Teacher, terms: Terms) -> tuple[StoredImages, str]:
    """Return dreams with their classes, and their distance to the teacher's statistics."""
    options = DeepInversion(
        regularizers=terms,
        images=IMAGES,
        batch_size=BATCH,
        stages=(Stage(STEPS),),
        engine=Engine("float32", compile=False),
    )
    images, labels, far = [], [], []
    with options.session(teacher, torch.device("cpu"), seed=0) as dreamer:
        for batch in range(IMAGES // BATCH):
            plan = BatchPlan(batch, 0, BATCH, seed=batch)
            stored, quality = as_stored(dreamer.dream(plan, lambda step, terms: None), teacher)
            images.append(stored.images)
            labels.append(stored.labels)
            far.append(overall(quality.statistics_distance))
    distances = [distance for distance in far if distance is not None]
    distance = f"{mean(distances):.2f}" if distances else ""
    return StoredImages(torch.cat(images), torch.cat(labels)), distance


def taught(teacher: Teacher, dreams: Tensor, real: Images) -> float:
    """Return the accuracy of a ResNet-8 taught the teacher's logits on dreams: mean of seeds."""
    normalised, found = teacher.card.normalise(dreams), []
    stored, labels = real.batch(range(len(real)))
    for seed in STUDENTS:
        torch.manual_seed(seed)
        student = SmallResNet(depth=8, num_classes=10, in_channels=1, width=16)
        optimizer = torch.optim.SGD(
            student.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4, nesterov=True
        )
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, LESSONS)
        for _ in range(LESSONS):
            x = normalised[torch.randint(len(normalised), (64,))]
            with torch.no_grad():
                wanted = teacher.model(x)
            optimizer.zero_grad()
            F.l1_loss(student(x), wanted).backward()
            nn.utils.clip_grad_norm_(student.parameters(), 1.0)
            optimizer.step()
            schedule.step()
        found.append(_accuracy(student.eval(), teacher.card.normalise(stored), labels))
    return mean(found)


if __name__ == "__main__":
    main()
