"""Class-incremental learning: its losses by hand, its trainer, and sets of images put together."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn import functional as F

from dreamkit.errors import DreamkitError, OptionError
from dreamkit.joined_images import JoinedImages
from dreamkit.model_state import frozen
from dreamkit.registry import Term
from dreamkit.stages.retention import confusion_matrix
from dreamkit.store.source import Dreams
from dreamkit.training.augmenter import Augmentation
from dreamkit.training.batches import Shifted, drawn_by_class, labels_of
from dreamkit.training.incremental import (
    FirstOutputs,
    IncrementalTrainer,
    IncrementalTraining,
    check_losses,
)
from dreamkit.training.losses.cross_entropy import CrossEntropy
from dreamkit.training.losses.feature_distillation import FeatureDistillation
from dreamkit.training.losses.head_cross_entropy import HeadCrossEntropy
from dreamkit.training.losses.local_cross_entropy import LocalCrossEntropy
from dreamkit.training.losses.lwf_mc import LwFMC
from dreamkit.training.losses.old_distillation import OldDistillation
from dreamkit.training.losses.replay_cross_entropy import ReplayCrossEntropy
from dreamkit.training.losses.replay_distillation import ReplayDistillation
from dreamkit.types import NO_LABEL, Heads, IncrementalStep, StoredImages

LN2, LN3 = math.log(2), math.log(3)
CPU = torch.device("cpu")


def step(**changes):
    """Two old classes and one new; one image of each kind.

    On the new image the network says (¼, ¼, ½), and (¼, ¾) it said among old classes. On the old
    one it says (½, ¼, ¼), where it said (¾, ¼).
    """
    known = {
        "logits": torch.tensor([[0, 0, LN2]]),
        "old_logits": torch.tensor([[0, LN3]]),
        "labels": torch.tensor([2]),
        "replay_logits": torch.tensor([[LN2, 0, 0]]),
        "replay_old_logits": torch.tensor([[LN3, 0]]),
        "replay_labels": torch.tensor([0]),
    }
    return IncrementalStep(**(known | changes))


def test_cross_entropy_by_hand():
    assert CrossEntropy()(step()).item() == pytest.approx(LN2)


def test_local_cross_entropy_is_among_new_classes_alone():
    assert LocalCrossEntropy()(step()).item() == 0  # there is one new class
    # One old class and two new ones, of which the network says (⅓, ⅔) whatever the old one has.
    for old in (-5.0, 5.0):
        two = step(
            logits=torch.tensor([[old, 0, LN2]]),
            old_logits=torch.tensor([[0.0]]),
            labels=torch.tensor([1]),
        )
        assert LocalCrossEntropy()(two).item() == pytest.approx(LN3)


def test_replay_distillation_by_hand():
    # KL((¾, ¼, 0) ‖ (½, ¼, ¼)) = ¾ ln 1½
    assert ReplayDistillation()(step()).item() == pytest.approx(0.75 * math.log(1.5))
    # At temperature 2 the logits (2 ln 3, 0) and (2 ln 2, 0, 0) give the same, times 4.
    hot = step(
        replay_logits=torch.tensor([[2 * LN2, 0, 0]]),
        replay_old_logits=torch.tensor([[2 * LN3, 0]]),
    )
    expected = 4 * 0.75 * math.log(1.5)
    assert ReplayDistillation(temperature=2)(hot).item() == pytest.approx(expected)


def test_replay_distillation_pushes_new_classes_down():
    logits = torch.zeros(1, 3, requires_grad=True)
    loss = ReplayDistillation()(step(replay_logits=logits, replay_old_logits=torch.zeros(1, 2)))
    loss.backward()
    # The gradient of the cross-entropy part is softmax - target: (⅓ - ½, ⅓ - ½, ⅓).
    assert logits.grad.flatten().tolist() == pytest.approx([-1 / 6, -1 / 6, 1 / 3])


def test_old_distillation_by_hand():
    # Among old classes the network now says (½, ½): KL((¼, ¾) ‖ (½, ½)).
    expected = 0.25 * math.log(0.5) + 0.75 * math.log(1.5)
    assert OldDistillation()(step()).item() == pytest.approx(expected)


def test_replay_cross_entropy_by_hand():
    assert ReplayCrossEntropy()(step()).item() == pytest.approx(LN2)
    with pytest.raises(DreamkitError, match="have no labels"):
        ReplayCrossEntropy()(step(replay_labels=torch.tensor([NO_LABEL])))


def test_lwf_mc_by_hand():
    # Old classes: σ(0) = ½ should be σ(0) = ½ and σ(ln 3) = ¾, ln 2 each; new: σ(ln 2) = ⅔ be 1.
    expected = LN2 + LN2 + math.log(1.5)
    assert LwFMC()(step()).item() == pytest.approx(expected)
    two = step(logits=torch.zeros(2, 3), old_logits=torch.zeros(2, 2), labels=torch.tensor([2, 2]))
    assert LwFMC()(two).item() == pytest.approx(3 * LN2)  # averaged over the images


def heads(inputs, old_inputs=None, weights=((1.0, 0, 0), (0, 1, 0), (0, 0, 1))):
    """Last layers without bias: the old one has the first two rows of the weights."""
    trained = torch.tensor(weights, requires_grad=True)
    was = trained.detach()[:2].clone()
    given = torch.tensor(inputs, requires_grad=True)
    before = given.detach().clone() if old_inputs is None else torch.tensor(old_inputs)
    return Heads(given, before, lambda x: x @ trained.T, lambda x: x @ was.T), trained


def test_feature_distillation_by_hand():
    # Old logits were (1, 0) and (0, 1), of variance ¼; of the first image they are (3, 0) now.
    before = [[1.0, 0, 5], [0, 1, 5]]
    found, trained = heads([[3.0, 0, -7], [0, 1, 5]], before)
    loss = FeatureDistillation()(step(head=found))
    assert loss.item() == pytest.approx((2**2 / 4) / 0.25)
    loss.backward()
    # The third feature weighed nothing in the old classes, so it is free; so is the head.
    assert found.inputs.grad[:, 2].tolist() == [0, 0]
    assert float(found.inputs.grad[0, 0]) > 0
    assert trained.grad is None


def test_head_cross_entropy_by_hand():
    # One new image, of class 2, and one old, of class 0: (¼, ¼, ½) and (½, ¼, ¼). Two classes of
    # three are old, so the old image weighs twice as much.
    found, trained = heads([[0.0, 0, LN2], [LN3, 0, 0]])
    loss = HeadCrossEntropy()(step(head=found))
    assert loss.item() == pytest.approx((LN2 + 2 * math.log(5 / 3)) / 3)
    loss.backward()
    assert found.inputs.grad is None
    assert trained.grad is not None
    with pytest.raises(DreamkitError, match="have no labels"):
        HeadCrossEntropy()(step(head=found, replay_labels=torch.tensor([NO_LABEL])))


@pytest.mark.parametrize("loss", [FeatureDistillation(), HeadCrossEntropy()])
def test_a_step_without_the_heads_that_a_loss_needs_is_named(loss):
    with pytest.raises(DreamkitError, match="needs 'head'"):
        loss(step())


@pytest.mark.parametrize("loss", [ReplayDistillation(), ReplayCrossEntropy()])
def test_a_step_without_the_images_that_a_loss_needs_is_named(loss):
    step = IncrementalStep(torch.zeros(2, 3), torch.zeros(2, 2), torch.tensor([2, 2]))
    with pytest.raises(DreamkitError, match="needs 'replay'"):
        loss(step)


def test_which_losses_look_at_old_classes():
    looking = [ReplayDistillation, ReplayCrossEntropy, HeadCrossEntropy]
    for entry in (*looking, CrossEntropy, OldDistillation, LwFMC, FeatureDistillation):
        assert ("replay" in entry.needs) == (entry in looking)


# --- the trainer ------------------------------------------------------------------------------


def trainer(toys, old, student, losses, head=None, **changes):
    options = IncrementalTraining(
        **({"steps": 4, "batch_size": 4, "lr": 0.1, "precision": "float32"} | changes)
    )
    card = toys.card()
    total = options.total_steps(8)
    return IncrementalTrainer(losses, student, old, card, options, CPU, 1, total, head=head)


def test_the_loss_is_the_weighted_sum_of_its_terms(toys):
    old, student = toys.two_bn(), toys.two_bn(classes=5)
    losses = (
        Term("a", 2.0, ReplayDistillation()),
        Term("b", 0.5, CrossEntropy()),
        Term("c", 3.0, OldDistillation()),
    )
    made = trainer(toys, old, student, losses)
    new, replay = toys.images(4), toys.images(4)
    labels = torch.tensor([3, 4, 3, 4])
    with frozen(old):
        loss = made.loss((new.images, labels), replay.batch(range(4)))
    x, r = (toys.card().normalise(images.images) for images in (new, replay))
    student.eval()
    found = IncrementalStep(student(x), old(x), labels, student(r), old(r), replay.labels)
    expected = sum(term.weight * term.entry(found) for term in losses)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    alone = trainer(toys, old, student, losses[1:])
    with frozen(old):
        loss = alone.loss((new.images, labels))
    expected = sum(term.weight * term.entry(found) for term in losses[1:])
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)


def test_the_heads_are_those_of_both_networks(toys):
    old, student = toys.two_bn(), toys.two_bn(classes=5)
    seen = []

    class Looks(FeatureDistillation):
        def __call__(self, step):
            seen.append(step)
            return super().__call__(step)

    made = trainer(toys, old, student, (Term("a", 1.0, Looks()),), head="fc")
    with frozen(old):
        made.loss((toys.images(4).images, torch.tensor([3, 4, 3, 4])), toys.images(4).batch([0, 1]))
    (step,) = seen
    for logits, expected in (
        (step.head.logits_of(step.head.inputs), (step.logits, step.replay_logits)),
        (step.head.old_logits_of(step.head.old_inputs), (step.old_logits, step.replay_old_logits)),
    ):
        torch.testing.assert_close(logits, torch.cat(expected))


def test_a_network_that_goes_on_after_its_last_layer_is_refused(toys):
    class Scaled(torch.nn.Module):
        def __init__(self, model):
            super().__init__()
            self.model = model

        def forward(self, x):
            return 2 * self.model(x)

    old, student = Scaled(toys.two_bn()), Scaled(toys.two_bn(classes=5))
    made = trainer(toys, old, student, (Term("a", 1.0, FeatureDistillation()),), head="model.fc")
    with frozen(old), pytest.raises(DreamkitError, match="goes on after its last layer") as caught:
        made.loss((toys.images(4).images, torch.tensor([3, 4, 3, 4])))
    assert caught.value.path == ("losses",)


def test_what_losses_look_at_is_there():
    replay, plain = Dreams(), IncrementalTraining()
    features = (Term("feature_distillation", 1.0, FeatureDistillation()),)
    check_losses(features, replay, plain)
    check_losses(features, None, plain)
    with pytest.raises(OptionError, match="no loss looks at images of old classes"):
        check_losses((Term("a", 1.0, CrossEntropy()),), replay, plain)
    with pytest.raises(OptionError, match="cannot be null"):
        check_losses((Term("a", 1.0, HeadCrossEntropy()),), None, plain)
    with pytest.raises(OptionError, match="by a hook: set compile to false"):
        check_losses(features, replay, IncrementalTraining(compile=True))


@pytest.mark.parametrize("freeze", [True, False])
def test_batch_norm_keeps_its_statistics_where_it_is_frozen(toys, freeze):
    old, student = toys.two_bn(), toys.two_bn(classes=5)
    before = {name: value.clone() for name, value in student.state_dict().items()}
    made = trainer(toys, old, student, (Term("a", 1.0, CrossEntropy()),), freeze_bn=freeze)
    with frozen(old):
        made.step((toys.images(4).images, torch.tensor([3, 4, 3, 4])))
    after = student.state_dict()
    for name in ("bn1.running_mean", "bn2.running_var"):
        assert torch.equal(after[name], before[name]) == freeze
    assert not torch.equal(after["bn1.weight"], before["bn1.weight"])
    assert not torch.equal(after["fc.weight"], before["fc.weight"])


def test_parts_of_a_step_add_up_to_it(toys):
    states = []
    for accumulate in (1, 2):
        old, student = toys.two_bn(), toys.two_bn(classes=5)
        losses = (Term("a", 1.0, ReplayDistillation()), Term("b", 1.0, CrossEntropy()))
        made = trainer(toys, old, student, losses, accumulate=accumulate, clip_norm=None)
        with frozen(old):
            new = (toys.images(4).images, torch.tensor([3, 4, 3, 4]))
            made.step(new, toys.images(4).batch(range(4)))
        states.append(student.state_dict())
    for name, value in states[0].items():
        torch.testing.assert_close(states[1][name], value)


def test_the_gradient_is_clipped(toys, monkeypatch):
    seen = []
    real = torch.nn.utils.clip_grad_norm_
    monkeypatch.setattr(
        torch.nn.utils, "clip_grad_norm_", lambda p, norm: seen.append(norm) or real(p, norm)
    )
    old, student = toys.two_bn(), toys.two_bn(classes=5)
    made = trainer(toys, old, student, (Term("a", 1.0, CrossEntropy()),))
    with frozen(old):
        made.step((toys.images(4).images, torch.tensor([3, 4, 3, 4])))
    assert seen == [0.1]


@pytest.mark.parametrize("option", ["mixup", "cutmix"])
def test_mixed_images_have_no_place(option):
    with pytest.raises(ValueError, match=f"augmentation.{option}"):
        IncrementalTraining(augmentation=Augmentation(**{option: 1.0}))


def test_first_outputs(toys):
    model, x = toys.two_bn(classes=5), torch.randn(2, 3, 8, 8)
    assert torch.equal(FirstOutputs(model, 3)(x), model(x)[:, :3])


# --- sets of images ---------------------------------------------------------------------------


def numbered(count, first=0, labels=None):
    values = torch.arange(first, first + count, dtype=torch.uint8)
    images = values.view(-1, 1, 1, 1).expand(-1, 3, 2, 2)
    return StoredImages(images, torch.zeros(count).long() if labels is None else labels)


def test_joined_sets_keep_the_order_that_is_asked_for():
    whole = JoinedImages([numbered(3), Shifted(numbered(2, 10), 7), numbered(1, 20)])
    assert len(whole) == 6
    stored, labels = whole.batch([5, 0, 4, 3, 2, 0])
    assert stored[:, 0, 0, 0].tolist() == [20, 0, 11, 10, 2, 0]
    assert labels.tolist() == [0, 0, 7, 7, 0, 0]


def test_images_of_each_class_are_drawn():
    labels = torch.tensor([2, 0, 2, 2, 0, 1])
    generator = torch.Generator().manual_seed(0)
    some = drawn_by_class(numbered(6, labels=labels), 2, generator)
    stored, found = some.batch(range(len(some)))
    assert sorted(found.tolist()) == [0, 0, 1, 2, 2]
    assert torch.equal(labels[stored[:, 0, 0, 0].long()], found)


def test_labels_are_read_where_they_are_not_told():
    class Untold:
        def __len__(self):
            return 3

        def batch(self, indices):
            return torch.zeros(len(indices), 1, 2, 2), torch.tensor(list(indices)) * 2

    assert labels_of(Untold()).tolist() == [0, 2, 4]
    assert labels_of(Shifted(numbered(2), 5)).tolist() == [5, 5]


def test_confusion_matrix_by_hand():
    labels, predicted = torch.tensor([0, 0, 1, 2, 2]), torch.tensor([0, 1, 1, 2, 0])
    assert confusion_matrix(predicted, labels, 4) == [
        [1, 1, 0, 0],
        [0, 1, 0, 0],
        [1, 0, 1, 0],
        [0, 0, 0, 0],
    ]


def test_eq_11_is_lowest_where_nothing_is_forgotten():
    # A network that says of the old image what it said, and of the new one its class.
    sure = torch.tensor([[0.0, LN3, 30]])
    ideal = step(logits=sure, replay_logits=torch.tensor([[LN3, 0, -30]]))
    for entry in (ReplayDistillation(), CrossEntropy(), OldDistillation()):
        assert entry(ideal).item() == pytest.approx(0, abs=1e-6)
        assert entry(step()).item() > 0.1
    assert F.softmax(sure, 1)[0, 2] > 0.99
