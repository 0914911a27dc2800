"""Features that a student shares with its teacher: where they are, and how far apart."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from dreamkit.copying import copied
from dreamkit.errors import DreamkitError
from dreamkit.model_state import seeded
from dreamkit.stages.teaching import StudentTraining
from dreamkit.teachers.without_batch_norm import vision_transformer
from dreamkit.training.augmenter import Augmentation
from dreamkit.training.distillation import Distillation, Distiller
from dreamkit.training.feature_points import (
    FeaturePoint,
    Waist,
    _at_equal_depth,
    _sees_tokens,
    comparison_points,
    feature_points,
    patch_grid,
)
from dreamkit.training.losses.feature_distance import FeatureDistance, at_one_resolution
from dreamkit.types import StoredImages

CPU = torch.device("cpu")


class Residual(nn.Module):
    """A stem, a block with a sum around it, a downsampling one with a sum, a classifier."""

    def __init__(self, width=4):
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, padding=1)
        self.inner = nn.Sequential(
            nn.Conv2d(4, width, 1), nn.ReLU(), nn.Conv2d(width, width, 3, padding=1, groups=width)
        )
        self.outer = nn.Conv2d(width, 4, 1)
        self.down, self.shortcut = nn.Conv2d(4, 6, 3, 2, 1), nn.Conv2d(4, 6, 1, 2)
        self.drop = nn.Dropout(0.5)
        self.classifier = nn.Linear(6, 5)

    def forward(self, x):
        x = torch.relu(self.stem(x))
        x = x + self.outer(torch.relu(self.inner(x)))
        x = torch.relu(self.down(x) + self.shortcut(x))
        return self.classifier(self.drop(x.mean((2, 3))))


def network(width=4, seed=0):
    with seeded(seed):
        return Residual(width).eval()


def noise(count=2):
    return torch.randn(count, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def test_points_are_where_all_goes_through_one_tensor():
    # Inside a block a path leads around; the first layer is given the images; of two layers that
    # are given the same, one counts.
    model = network()
    found = [point.name for point in feature_points(model, model, {}, noise())]
    assert found == ["inner.0", "down", "classifier"]


def test_points_of_a_plain_network_are_its_layers():
    plain = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 5, 3), nn.Flatten())
    plain.append(nn.Linear(80, 3))
    found = [point.name for point in feature_points(plain, plain, {}, noise())]
    assert found == ["2", "4"]


def test_a_layer_that_is_called_twice_is_no_point():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.again = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1)

        def forward(self, x):
            return self.again(self.again(self.first(x))).mean((2, 3))

    assert feature_points(Twice(), Twice(), {}, noise()) == []


def test_half_of_what_a_split_makes_is_no_point():
    class Split(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem, self.part, self.last = (nn.Conv2d(c, 4, 1) for c in (3, 2, 6))

        def forward(self, x):
            first, second = self.stem(x).chunk(2, 1)
            return self.last(torch.cat([first, self.part(second)], 1)).mean((2, 3))

    assert [point.name for point in feature_points(Split(), Split(), {}, noise())] == ["last"]


def test_a_network_without_a_graph_has_no_points():
    class Apart(nn.Sequential):
        def forward(self, x):
            return super().forward(x).detach()

    apart = Apart(nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 8), nn.Flatten())
    assert feature_points(apart, apart, {}, noise()) == []


def test_distance_is_over_what_is_kept_and_a_share_of_the_variance():
    teacher = nn.Sequential(nn.Conv2d(3, 3, 1, bias=False), nn.Conv2d(3, 2, 1), nn.Flatten())
    student = nn.Sequential(nn.Conv2d(3, 2, 1), nn.Conv2d(2, 2, 1), nn.Flatten())
    with torch.no_grad():
        teacher[0].weight.copy_(torch.eye(3).view(3, 3, 1, 1))
        student[0].weight.copy_(torch.eye(3)[[0, 2]].view(2, 3, 1, 1))
        student[0].bias.zero_()
    images = torch.tensor([[1.0, 50, 2], [3, -50, 4]]).view(2, 3, 1, 1)
    kept = {"0.weight": [[0, 2], None, None, None], "1.weight": [None, [0, 2], None, None]}
    (point,) = feature_points(teacher, student, kept, images)
    distance = FeatureDistance(student, teacher, [point])
    with distance.watched():
        teacher(images), student(images)
    assert distance.taken().item() == 0
    with torch.no_grad():
        student[0].bias.copy_(torch.tensor([1.0, 0.0]))  # one of two channels is off by 1
    with distance.watched():
        teacher(images), student(images)
    # Kept are 1, 2, 3 and 4: variance 1¼; the error is 1 in half of them.
    assert distance.taken().item() == pytest.approx(0.5 / 1.25)


@pytest.mark.parametrize("value", [0.5, 0.0])
def test_a_feature_that_is_the_same_everywhere_says_nothing(value):
    teacher = nn.Sequential(nn.Conv2d(3, 2, 1), nn.Conv2d(2, 2, 1), nn.Flatten())
    with torch.no_grad():
        teacher[0].weight.zero_()
        teacher[0].bias.fill_(value)
    student, images = copied(teacher), noise()
    with torch.no_grad():
        student[0].bias.add_(1e-3)
    student.requires_grad_(True)
    distance = FeatureDistance(student, teacher, feature_points(teacher, student, {}, images))
    with distance.watched():
        teacher(images), student(images)
    found = distance.taken()
    found.backward()
    assert found.item() == 0
    assert all(bool(p.grad.isfinite().all()) for p in student.parameters() if p.grad is not None)


def test_behind_a_regressor_every_channel_of_the_teacher_is_of_mean_0_and_variance_1():
    def compared(scales):
        teacher = nn.Sequential(nn.Conv2d(3, 3, 1), nn.Conv2d(3, 2, 1), nn.Flatten())
        student = nn.Sequential(nn.Conv2d(3, 2, 1), nn.Conv2d(2, 2, 1), nn.Flatten())
        with torch.no_grad():
            teacher[0].weight.copy_(torch.diag(torch.tensor(scales)).view(3, 3, 1, 1))
            teacher[0].bias.fill_(7.0)
            student[0].weight.copy_(torch.eye(3)[:2].view(2, 3, 1, 1))
            student[0].bias.zero_()
        regressor = nn.Conv2d(2, 3, 1)
        with torch.no_grad():
            regressor.weight.copy_(torch.eye(3)[:, :2].view(3, 2, 1, 1))
            regressor.bias.zero_()
        images = torch.tensor([[1.0, 1, 2], [-1, -1, 4]]).view(2, 3, 1, 1)
        point = FeaturePoint("1", 1, None, "1", (2, 3), (1, 1))
        distance = FeatureDistance(student, teacher, [point], {"1": regressor})
        with distance.watched():
            teacher(images), student(images)
        return distance.taken().item()

    # The first two are what they are to be; the third channel, which varies by 1, is told nothing.
    assert compared([2.0, 300.0, 1.0]) == pytest.approx(1 / 3, rel=1e-4)
    assert compared([2.0, 300.0, 0.0]) == pytest.approx(0.0, abs=1e-5)  # it never varies


def trainer(toys, teacher, student, **options):
    how = Distillation(
        **({"steps": 60, "batch_size": 8, "lr": 0.01, "optimizer": "adamw"} | options)
    )
    return Distiller(student, teacher, toys.card(classes=5), how, CPU, 0, 60)


def taught(toys, teacher, weight):
    """Return how far features are from the teacher's, on noise, after training on other images."""
    student = copied(teacher).requires_grad_(True)
    with torch.no_grad():
        student.inner[0].weight[:2] = 0
    made, images = trainer(toys, teacher, student, features=weight, dropout=False), toys.images(8)
    for _ in range(60):
        made.step(images.batch(range(8)))
    made.finish([images])
    distance = FeatureDistance(student, teacher, feature_points(teacher, student, {}, noise()))
    with distance.watched(), torch.no_grad():
        student(noise(8)), teacher(noise(8))
    return float(distance.taken())


def test_features_teach_more_of_a_network_than_its_logits_do(toys):
    teacher = network().requires_grad_(False)
    assert taught(toys, teacher, 10.0) < 0.7 * taught(toys, teacher, 0.0)


class Skipping(nn.Module):
    """A network of which a block is left out in training, as some draw it."""

    def __init__(self):
        super().__init__()
        self.stem, self.block, self.last = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1), nn.Linear(4, 5)

    def forward(self, x):
        x = self.stem(x)
        if not self.training:
            x = x + self.block(x)
        return self.last(x.mean((2, 3)))


def test_a_block_that_is_left_out_in_training_is_compared_no_more(toys):
    teacher = toys.fill(Skipping())
    made = trainer(toys, teacher.requires_grad_(False), toys.fill(Skipping()), features=1.0)
    assert [point.name for point in made.features.points] == ["block", "last"]
    assert made.step(toys.images(8).batch(range(8))).isfinite()


def test_a_training_leaves_no_hooks(toys):
    teacher, student = network().requires_grad_(False), network(seed=1)
    before = [toys.state(model)["hooks"] for model in (teacher, student)]
    trainer(toys, teacher, student, features=1.0).step(toys.images(8).batch(range(8)))
    assert [toys.state(model)["hooks"] for model in (teacher, student)] == before


def test_a_network_without_a_place_to_compare_is_taught_by_logits_alone(toys):
    other, told = nn.Sequential(nn.Conv2d(3, 5, 8), nn.Flatten()), []
    how = Distillation(steps=1, batch_size=8, features=1.0)
    card, images = toys.card(classes=5), toys.images(8)
    made = Distiller(other, network(), card, how, CPU, 0, 1, told.append)
    assert made.features is None
    assert told[0].startswith("features has no effect")
    made.step(images.batch(range(8)))


class Plain(nn.Module):
    """Other layers than ``Residual``'s, of which two are at its first resolution."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 7, 3, padding=1), nn.Conv2d(7, 5, 3, padding=1)
        self.third, self.norm = nn.Conv2d(5, 6, 3, 2, 1), nn.BatchNorm2d(6)
        self.out = nn.Linear(6, 5)

    def forward(self, x):
        x = torch.relu(self.second(torch.relu(self.first(x))))
        return self.out(torch.relu(self.norm(self.third(x))).mean((2, 3)))


def unlike(seed=3):
    with seeded(seed):
        return Plain()


def test_another_network_is_compared_at_equal_shares_of_the_way():
    found = comparison_points(network(), unlike(), {}, noise())
    assert [(point.name, point.layer, point.widths) for point in found] == [
        ("inner.0", "second", (7, 4)),
        ("down", "third", (5, 4)),
        ("classifier", "out", (6, 6)),
    ]


@pytest.mark.parametrize(
    ("own", "theirs", "paired"),
    [
        ([0.1, 0.5, 0.9], [0.0, 0.2, 0.4, 0.6, 0.8, 0.95], [(0, 0), (1, 2), (2, 5)]),
        ([0.0, 0.2, 0.4, 0.6, 0.8, 0.95], [0.1, 0.5, 0.9], [(0, 0), (2, 1), (5, 2)]),
        ([0.3, 0.6], [0.0, 0.1, 0.33, 0.66], [(0, 2), (1, 3)]),  # not by their numbers
        ([0.1, 0.45, 0.5], [0.0, 0.1, 0.2, 0.52], [(0, 1), (2, 3)]),  # the nearer has it
        ([0.9], [0.1, 0.8], [(0, 1)]),
        ([], [0.5], []),
    ],
)
def test_pairs_are_as_far_on_the_way_as_one_another(own, theirs, paired):
    lists = [
        [(f"{number}", Waist(noise().shape, 1, way)) for number, way in enumerate(ways)]
        for ways in (own, theirs)
    ]
    pairs = _at_equal_depth(*lists)
    assert [(int(one[0]), int(other[0])) for one, other in pairs] == paired


def test_tokens_are_compared_as_maps_without_those_that_precede_patches(toys):
    with seeded(0):
        teacher = vision_transformer(5, 3, 8, 2, 8, 3, 2).eval()
    found = comparison_points(teacher, unlike(), {}, noise())
    assert [(p.name, p.layer, p.maps) for p in found[:-1]] == [
        ("blocks.0.norm2", "second", (1, -1)),
        ("blocks.1.norm2", "third", (1, -1)),
    ]
    assert (found[-1].name, found[-1].layer, found[-1].maps) == ("head", "out", None)
    places = torch.arange(16.0).view(1, 16, 1)
    tokens = torch.cat([torch.full((1, 1, 1), 99.0), places], 1)  # the class first
    own, wanted = at_one_resolution(torch.zeros(1, 3, 2, 2), tokens, (1, -1))
    assert own.shape == (1, 3, 2, 2)
    assert wanted.flatten().tolist() == [2.5, 4.5, 10.5, 12.5]  # of four patches each
    last = torch.arange(8.0).view(1, 2, 2, 2)
    assert torch.equal(at_one_resolution(last, last, (-1, 1))[0], last.movedim(-1, 1))


def test_a_transformer_is_compared_with_its_like_after_attention_and_after_mlps():
    with seeded(0):
        teacher, student = (vision_transformer(5, 3, 8, 2, 8, 3, 2).eval() for _ in range(2))
    names = [point.name for point in comparison_points(teacher, student, {}, noise())]
    norms = [f"blocks.{block}.norm{half}" for block in range(3) for half in (1, 2)]
    assert names == [*norms, "norm", "head"]


@pytest.mark.parametrize(
    ("tokens", "grid"), [(64, (8, 0)), (65, (8, 1)), (201, (14, 5)), (1, None), (80, None)]
)
def test_how_many_tokens_are_a_square_of_patches(tokens, grid):
    assert patch_grid(tokens) == grid


@pytest.mark.parametrize(
    ("shape", "given", "told"),
    [
        (8, (2, 9, 8), True),
        (8, (2, 4, 4, 8), True),
        (8, (2, 8, 4, 4), False),
        (8, (2, 8, 8, 8), False),  # channels cannot be told from columns
        ((6, 4, 8), (2, 6, 4, 8), False),
        (8, (2, 8), False),
    ],
)
def test_what_norms_of_tokens_are(shape, given, told):
    assert _sees_tokens(nn.LayerNorm(shape), torch.zeros(given)) is told


def test_a_students_features_come_to_be_those_of_a_transformer(toys):
    with seeded(0):
        teacher = vision_transformer(5, 3, 8, 2, 8, 3, 2).eval().requires_grad_(False)
    how = Distillation(steps=60, batch_size=8, lr=0.01, optimizer="adamw", features=5.0)
    made = Distiller(unlike(), teacher, toys.card(classes=5), how, CPU, 0, 60)
    batch = toys.images(8).batch(range(8))
    first = float(made.step(batch))
    for _ in range(40):
        last = float(made.step(batch))
    assert last < 0.6 * first


def test_a_network_like_the_teacher_is_compared_layer_by_layer():
    teacher, student = network(), network(seed=1)
    found = comparison_points(teacher, student, {}, noise())
    assert [point.layer for point in found] == ["inner.0", "down", "classifier"]
    assert found == feature_points(teacher, student, {}, noise())


def unlike_trainer(toys, told, weight=5.0):
    how = Distillation(steps=60, batch_size=8, lr=0.01, optimizer="adamw", features=weight)
    teacher = network().requires_grad_(False)
    card = toys.card(classes=5)
    return Distiller(unlike(), teacher, card, how, CPU, 0, 60, told.append)


def test_regressors_are_trained_with_the_student_and_are_no_part_of_it(toys):
    told: list[str] = []
    made = unlike_trainer(toys, told)
    before = [p.detach().clone() for p in made.regressors.parameters()]
    shapes = [(4, 7, 1, 1), (4,), (4, 5, 1, 1), (4,), (6, 6), (6,)]
    assert [tuple(p.shape) for p in before] == shapes
    assert told == [
        "features are compared at 3 places of the teacher, inner.0 to classifier, through linear "
        "maps that are trained along"
    ]
    names = set(made.student.state_dict())
    batch = toys.images(8).batch(range(8))
    first = float(made.step(batch))
    for _ in range(40):
        last = float(made.step(batch))
    assert last < 0.5 * first
    assert all(
        not torch.equal(p, q) for p, q in zip(before, made.regressors.parameters(), strict=True)
    )
    assert set(made.student.state_dict()) == names


def test_an_interrupted_training_goes_on_with_its_regressors(toys):
    batch = toys.images(8).batch(range(8))
    whole = unlike_trainer(toys, [])
    for _ in range(3):
        whole.step(batch)
    kept = {name: tensor.clone() for name, tensor in whole.state().items()}
    whole.step(batch)
    again = unlike_trainer(toys, [])
    again.restore(kept)
    again.step(batch)
    mine, theirs = whole.state(), again.state()
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(mine[name], theirs[name]) for name in mine)


def test_compiled_steps_see_the_same_features(toys, monkeypatch):
    real = torch.compile
    monkeypatch.setattr(  # as it is traced, without the minutes that code takes to be made
        torch, "compile", lambda function, **how: real(function, backend="eager", **how)
    )
    batch, losses, notes = toys.images(8).batch(range(8)), [], []
    for compiled in (False, True):
        how = Distillation(
            steps=4, batch_size=8, lr=0.05, features=10.0, dropout=False, compile=compiled
        )
        student = network(seed=1)
        made = Distiller(student, network(), toys.card(), how, CPU, 0, 4, note=notes.append)
        losses.append([float(made.step(batch)) for _ in range(4)])
        assert made.features is not None
        assert not student.inner[0]._forward_pre_hooks
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
    assert losses[0][3] < losses[0][0]
    assert notes == []  # it did not fall back to eager


@pytest.mark.parametrize("dropout", [True, False])
def test_dropout_is_the_networks_own_or_none(toys, dropout):
    student = network()
    trainer(toys, network(), student, dropout=dropout)
    assert student.drop.training is dropout


def test_norms_learn_their_statistics_without_dropout_too(toys):
    student = toys.two_bn()
    how = Distillation(steps=1, batch_size=8, dropout=False)
    Distiller(student, toys.two_bn(), toys.card(), how, CPU, 0, 1)
    norms = [m for m in student.modules() if isinstance(m, nn.BatchNorm2d)]
    assert norms
    assert all(norm.training for norm in norms)


def test_training_on_windows_shows_no_more_than_their_size(toys):
    teacher, student = network().requires_grad_(False), network(seed=1)
    made = trainer(toys, teacher, student, augmentation=Augmentation(size=8))
    seen = []
    student.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].shape[2:]))
    card = toys.card(size=(3, 12, 12), classes=5)
    made = Distiller(student, teacher, card, made.options, CPU, 0, 60)
    seen.clear()
    made.step(toys.images(8, size=(3, 12, 12)).batch(range(8)))
    assert set(seen) == {(8, 8)}


@pytest.mark.parametrize(
    ("size", "said"),
    [(9, "windows of 9 pixels do not fit images of 8 by 8"), (8, "does not take windows")],
)
def test_windows_that_do_not_fit_are_refused(toys, size, said):
    fixed = nn.Sequential(nn.Flatten(), nn.Linear(3 * 12 * 12, 5))
    side = 8 if size == 9 else 12
    how = Distillation(steps=1, batch_size=8, augmentation=Augmentation(size=size))
    with pytest.raises(DreamkitError, match=said):
        Distiller(fixed, fixed, toys.card(size=(3, side, side), classes=5), how, CPU, 0, 1)


def test_windows_that_a_network_asserts_against_are_refused(toys):
    class Fixed(nn.Conv2d):
        def forward(self, x):
            torch._assert(x.shape[-1] == 12, "wrong image height")  # as vision transformers do
            return super().forward(x).mean((2, 3))

    fixed = Fixed(3, 5, 1)
    how = Distillation(steps=1, batch_size=8, augmentation=Augmentation(size=8))
    with pytest.raises(DreamkitError, match=r"does not take windows.*wrong image height"):
        Distiller(fixed, fixed, toys.card(size=(3, 12, 12), classes=5), how, CPU, 0, 1)


def test_windows_that_do_not_fit_are_refused_before_anything_is_dreamed(toys, tmp_path):
    images = StoredImages(*toys.images(4).batch(range(4)))
    options = Distillation(steps=1, batch_size=2, augmentation=Augmentation(size=9))
    context = toys.context(tmp_path)
    teacher = toys.teacher(network(), toys.card(classes=5))
    training = StudentTraining(teacher, images, context, options, None, "recovery", "recovery")
    with pytest.raises(DreamkitError, match="windows of 9 pixels do not fit") as refused:
        training.first_images(network())
    assert refused.value.path == ("recovery", "augmentation", "size")
