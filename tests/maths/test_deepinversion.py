"""DeepInversion: fidelity to the equations, and everything a caller relies on."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from dreamkit.card import Card
from dreamkit.errors import DreamkitError, TeacherMismatch
from dreamkit.parameterisations.pixels import Pixels
from dreamkit.registry import Term
from dreamkit.regularizers.bn_feature import BNFeature
from dreamkit.regularizers.js_compete import JSCompete
from dreamkit.regularizers.l2 import L2Norm
from dreamkit.regularizers.tv import TotalVariation
from dreamkit.synthesizers import deepinversion
from dreamkit.synthesizers.deepinversion import DeepInversion
from dreamkit.synthesizers.engine import Engine
from dreamkit.synthesizers.inversion_loss import bound_loss
from dreamkit.synthesizers.labels import deal_labels
from dreamkit.synthesizers.stage import Stage
from dreamkit.synthesizers.views import View, draw_views, gathered
from dreamkit.types import NO_LABEL, BatchPlan, Regularizer

CPU = torch.device("cpu")
A_TV, A_L2, A_F = 2.5e-2, 3e-3, 0.7
TERMS = (
    Term("tv", A_TV, TotalVariation()),
    Term("l2", A_L2, L2Norm()),
    Term("bn_feature", A_F, BNFeature("paper")),
)


def plan(seed=5, size=4, index=0, first=0):
    return BatchPlan(index, first, size, seed)


def nothing(done, terms):
    pass


def options(**changes):
    known = {
        "images": 4,
        "batch_size": 4,
        "regularizers": TERMS,
        "stages": (Stage(3),),
        "parameterisation": Pixels(),
        "lr": 0.05,
        "betas": (0.9, 0.999),
        "schedule": "constant",
        "clip": False,
        "engine": Engine(precision="float32", compile=False),
    }
    return DeepInversion(**(known | changes))


def dream(teacher, given, at=None, on_step=nothing):
    with given.session(teacher, CPU) as session:
        return session.dream(at or plan(), on_step)


@dataclass
class Watcher(Regularizer):
    """A regularizer that keeps the images it is shown and adds nothing."""

    seen: list = field(default_factory=list)

    def __call__(self, step):
        self.seen.append(step.images.detach().clone())
        return step.images.sum() * 0


@dataclass(frozen=True)
class Source:
    """A teacher entry around a finished model."""

    model: nn.Module
    card: object

    def load(self, seed):
        from dreamkit.types import Teacher

        return Teacher(self.model, self.card, {})


# --- fidelity ---------------------------------------------------------------------------------


def relu(x):
    return x.clamp(min=0)


def swish(x):
    return x / (1 + (-x).exp())


def written_out(model, x, y, activation=relu):
    """Transcribe eq. 2 to 4 for the two-BatchNorm toy, with nothing of dreamkit in it."""
    w = {k: v.double() for k, v in model.state_dict().items()}
    r_feature = x.new_zeros(())

    def batch_norm(z, bn):
        nonlocal r_feature
        count = z.shape[0] * z.shape[2] * z.shape[3]
        mean = z.sum((0, 2, 3)) / count
        var = ((z - mean.view(1, -1, 1, 1)) ** 2).sum((0, 2, 3)) / count
        running_mean, running_var = w[f"{bn}.running_mean"], w[f"{bn}.running_var"]
        r_feature = r_feature + ((mean - running_mean) ** 2).sum().sqrt()
        r_feature = r_feature + ((var - running_var) ** 2).sum().sqrt()
        scale = w[f"{bn}.weight"] / (running_var + 1e-5).sqrt()
        shift = w[f"{bn}.bias"] - running_mean * scale
        return z * scale.view(1, -1, 1, 1) + shift.view(1, -1, 1, 1)

    h = activation(batch_norm(F.conv2d(x, w["conv1.weight"], padding=1), "bn1"))
    h = activation(batch_norm(F.conv2d(h, w["conv2.weight"], padding=1), "bn2"))
    logits = h.mean((2, 3)) @ w["fc.weight"].T + w["fc.bias"]
    ce = (logits.exp().sum(1).log() - logits[torch.arange(len(y)), y]).mean()
    tv = sum(
        ((x[:, :, a:c, b:d] - x[:, :, e:g, f:h_]) ** 2).sum().sqrt()
        for (a, c, b, d), (e, g, f, h_) in (
            ((0, 8, 1, 8), (0, 8, 0, 7)),  # right neighbour
            ((1, 8, 0, 8), (0, 7, 0, 8)),  # neighbour below
            ((1, 8, 1, 8), (0, 7, 0, 7)),  # below right
            ((1, 8, 0, 7), (0, 7, 1, 8)),  # below left
        )
    )
    l2 = (x**2).sum().sqrt()
    return {"cross_entropy": ce, "tv": A_TV * tv, "l2": A_L2 * l2, "bn_feature": A_F * r_feature}


def compared(toys, precision, activation):
    """Return what the engine computes on the toy, and the same written out in float64."""
    model = toys.two_bn(activation={relu: F.relu, swish: F.silu}[activation])
    x = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(3))
    labels = torch.tensor([0, 1, 2, 1])
    given = options(engine=Engine(precision=precision, compile=False))
    with given.session(toys.teacher(model), CPU) as session:
        found = session.evaluator(x, labels, torch.tensor([1, -2, 1]))
    x64 = x.double().requires_grad_()
    terms = written_out(model, x64.roll((1, -2), (2, 3)).flip(3), labels, activation)
    loss = sum(terms.values())
    (gradient,) = torch.autograd.grad(loss, [x64])
    return found, {"loss": loss, **terms}, gradient


@pytest.mark.parametrize(
    ("precision", "activation", "tolerance", "gradient_tolerance"),
    [
        ("float32", relu, 1e-5, 1e-5),
        ("float32", swish, 1e-5, 1e-5),
        ("bfloat16", swish, 2e-2, 2e-2),
        # Rounding turns a few of the relus that are almost at zero on or off, each with its whole
        # gradient: a share p of them is √p in the norm, here 0.1 % and 3 %.
        ("bfloat16", relu, 2e-2, 4e-2),
    ],
)
def test_loss_and_gradient_equal_the_equations_written_out_in_float64(
    toys, precision, activation, tolerance, gradient_tolerance
):
    found, expected, gradient = compared(toys, precision, activation)
    terms = {"loss": found.loss, **found.terms}
    assert {k: v.item() for k, v in terms.items()} == pytest.approx(
        {k: v.item() for k, v in expected.items()}, rel=tolerance
    )
    assert found.gradient.dtype == torch.float32
    off = (found.gradient.double() - gradient).norm() / gradient.norm()
    assert off < gradient_tolerance


def test_the_competition_is_added_with_its_weight(toys):
    teacher, student = toys.two_bn(), toys.residual()
    given = options(
        regularizers=(Term("js_compete", 10.0, JSCompete()),),
        student=Source(student, toys.card()),
    )
    x = toys.card().normalise(toys.images(4).images)
    with given.session(toys.teacher(teacher), CPU) as session:
        terms = session.terms(x, torch.tensor([0, 1, 2, 0]))
    p, q = teacher(x).double().softmax(1), student(x).double().softmax(1)
    m = (p + q) / 2
    js = ((p * (p / m).log()).sum(1) + (q * (q / m).log()).sum(1)).mean() / 2
    assert terms["js_compete"].item() == pytest.approx(10 * (1 - js.item()), rel=1e-5)


def test_a_competitor_without_weights_is_drawn_by_the_runs_seed(toys):
    seeds = []

    class Drawn(Source):
        def load(self, seed):
            seeds.append(seed)
            return super().load(seed)

    given = options(
        regularizers=(Term("js_compete", 10.0, JSCompete()),),
        student=Drawn(toys.residual(), toys.card()),
    )
    for seed in (3, 4, 3):
        with given.session(toys.teacher(toys.two_bn()), CPU, seed=seed):
            pass
    assert seeds[0] == seeds[2] != seeds[1]


def test_what_another_synthesizer_carried_on_is_refused(toys):
    with (
        options().session(toys.teacher(toys.two_bn()), CPU) as session,
        pytest.raises(DreamkitError, match=r"\(bank\) is of another synthesizer"),
    ):
        session.restore({"bank": torch.zeros(1)})


def test_terms_of_one_name_add_up(toys):
    x = toys.card().normalise(toys.images(4).images)
    labels = torch.zeros(4, dtype=torch.int64)
    twice = options(regularizers=(Term("l2", 2.0, L2Norm()), Term("l2", 3.0, L2Norm())))
    with twice.session(toys.teacher(toys.plain()), CPU) as session:
        terms = session.terms(x, labels)
    assert terms["l2"].item() == pytest.approx(5 * x.norm().item(), rel=1e-6)


def test_first_step_of_adam_by_hand(toys):
    # Adam's first step is lr·g/(|g| + eps): at lr 0.25 every pixel moves by 0.25 against the sign
    # of the cross-entropy's gradient.
    watcher = Watcher()
    given = options(
        regularizers=(Term("watch", 1.0, watcher),), lr=0.25, stages=(Stage(2),), jitter=0
    )
    model = toys.two_bn()
    found = dream(toys.teacher(model), given)
    noise, moved = watcher.seen
    x = noise.clone().requires_grad_()
    F.cross_entropy(model(x), found.labels).backward()
    sure = x.grad.abs() > 1e-6
    assert sure.float().mean() > 0.9
    step = (moved - noise)[sure]
    torch.testing.assert_close(step, -0.25 * x.grad.sign()[sure], rtol=5e-3, atol=0)


def test_start_is_standard_normal_noise(toys):
    watcher = Watcher()
    given = options(regularizers=(Term("w", 1, watcher),), stages=(Stage(1, size=32),), jitter=0)
    dream(toys.teacher(toys.two_bn()), given, plan(size=16))
    noise = watcher.seen[0]  # 49,152 values: a mean beyond 0.02 is 4 standard errors off
    assert noise.mean().abs() < 0.02
    assert abs(noise.std() - 1) < 0.02


# --- the same again ---------------------------------------------------------------------------


def test_same_plan_same_images_and_other_seed_other_images(toys):
    teacher = toys.teacher(toys.two_bn())
    given = options(flip=True, jitter=2, stages=(Stage(3, size=4), Stage(3)), labels="random")
    torch.manual_seed(1)
    first = dream(teacher, given, plan(seed=9))
    torch.manual_seed(2)  # the global generator has no say
    again = dream(teacher, given, plan(seed=9))
    other = dream(teacher, given, plan(seed=10))
    assert torch.equal(first.images, again.images)
    assert torch.equal(first.labels, again.labels)
    assert first.loss == again.loss
    assert not torch.equal(first.images, other.images)


def test_a_batch_does_not_depend_on_the_one_before(toys):
    teacher, given = toys.teacher(toys.two_bn()), options(jitter=1, flip=True)
    alone = dream(teacher, given, plan(seed=9))
    with given.session(teacher, CPU) as session:
        session.dream(plan(seed=1), nothing)
        after = session.dream(plan(seed=9), nothing)
    assert torch.equal(alone.images, after.images)


def test_the_global_generator_is_left_alone(toys):
    teacher = toys.teacher(toys.two_bn())
    before = torch.get_rng_state()
    dream(teacher, options(flip=True, jitter=2, labels="random"))
    assert torch.equal(torch.get_rng_state(), before)


# --- best so far ------------------------------------------------------------------------------


def test_returns_the_images_of_the_lowest_loss_of_the_last_stage(toys):
    watcher, losses = Watcher(), []
    given = options(
        regularizers=(Term("l2", 1.0, L2Norm()), Term("watch", 1.0, watcher)),
        stages=(Stage(4, size=4), Stage(12)),
        lr=2.0,  # so high that the loss goes up and down
        jitter=0,
    )
    found = dream(
        toys.teacher(toys.two_bn()), given, on_step=lambda d, t: losses.append(t["loss"].item())
    )
    last, seen = losses[4:], watcher.seen[4:]
    best = last.index(min(last))
    assert 0 < best < 11, "the case is empty if the best is the first or the last"
    assert found.loss == pytest.approx(min(last), rel=1e-6)
    assert torch.equal(found.images, seen[best])


def test_best_images_are_not_the_optimizers_tensor(toys, monkeypatch):
    optimised = []

    class Adam(torch.optim.Adam):
        def __init__(self, parameters, **settings):
            super().__init__(parameters, **settings)
            optimised.extend(parameters)

    monkeypatch.setattr(torch.optim, "Adam", Adam)
    found = dream(toys.teacher(toys.two_bn()), options(stages=(Stage(2, size=4), Stage(2))))
    assert len(optimised) == 2
    storage = found.images.untyped_storage().data_ptr()
    assert storage not in {t.untyped_storage().data_ptr() for t in optimised}
    assert not found.images.requires_grad


def test_on_step_counts_on_over_stages_and_its_terms_add_up_to_the_loss(toys):
    calls = []
    given = options(stages=(Stage(2, size=4), Stage(3)))
    dream(
        toys.teacher(toys.two_bn()), given, on_step=lambda done, terms: calls.append((done, terms))
    )
    assert [done for done, _ in calls] == [1, 2, 3, 4, 5]
    assert given.steps_per_batch == 5
    for _, terms in calls:
        assert not any(value.requires_grad for value in terms.values())
        parts = sum(v.item() for k, v in terms.items() if k != "loss")
        assert parts == pytest.approx(terms["loss"].item(), rel=1e-5)


def test_the_loss_goes_down(toys):
    losses = []
    given = options(stages=(Stage(60),), lr=0.1, jitter=0)
    dream(toys.teacher(toys.two_bn()), given, on_step=lambda d, t: losses.append(t["loss"].item()))
    assert losses[-1] < 0.6 * losses[0]


# --- the caller's model -----------------------------------------------------------------------


def prepared(toys):
    model = toys.two_bn()
    model.train()
    model.conv2.eval()  # mixed modes
    model.bn2.eval()
    model.conv1.weight.requires_grad_(False)  # one is frozen
    model.fc.weight.grad = torch.ones_like(model.fc.weight)  # one has a gradient
    return model


def test_teacher_and_student_are_left_as_they_were(toys):
    teacher, student = prepared(toys), prepared(toys)
    given = options(
        regularizers=(*TERMS, Term("js_compete", 1.0, JSCompete())),
        student=Source(student, toys.card()),
    )
    before = toys.state(teacher), toys.state(student)
    dream(toys.teacher(teacher), given)
    toys.assert_same_state(teacher, before[0])
    toys.assert_same_state(student, before[1])
    assert torch.equal(teacher.fc.weight.grad, torch.ones_like(teacher.fc.weight))
    assert teacher.conv2.weight.grad is None


def test_teacher_is_left_as_it_was_after_an_exception(toys):
    teacher = prepared(toys)
    before = toys.state(teacher)

    def stop(done, terms):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        dream(toys.teacher(teacher), options(), on_step=stop)
    toys.assert_same_state(teacher, before)


def test_inside_a_session_the_teacher_is_in_eval_mode_and_its_weights_get_no_gradient(toys):
    model = prepared(toys)
    with options().session(toys.teacher(model), CPU):
        assert not any(module.training for module in model.modules())
        assert not any(p.requires_grad for p in model.parameters())


# --- stages, sizes and ranges -----------------------------------------------------------------


def test_stages_are_joined_by_nearest_upsampling(toys):
    watcher, losses = Watcher(), []
    given = options(
        regularizers=(Term("watch", 1.0, watcher),),
        stages=(Stage(3, size=4), Stage(1, size=(8, 12))),
        jitter=0,
    )
    found = dream(
        toys.teacher(toys.two_bn()), given, on_step=lambda d, t: losses.append(t["loss"].item())
    )
    assert [tuple(x.shape) for x in watcher.seen] == [(4, 3, 4, 4)] * 3 + [(4, 3, 8, 12)]
    best = watcher.seen[losses.index(min(losses[:3]))]
    # 4×4 to 8×12: each pixel twice down and three times across.
    enlarged = best.repeat_interleave(2, 2).repeat_interleave(3, 3)
    assert torch.equal(watcher.seen[3], enlarged)
    assert found.images.shape == (4, 3, 8, 12)


def test_a_stage_has_its_own_learning_rate(toys):
    watcher = Watcher()
    given = options(
        regularizers=(Term("watch", 1.0, watcher),),
        stages=(Stage(2, size=4, lr=0.5), Stage(2)),
        lr=0.125,
        jitter=0,
    )
    dream(toys.teacher(toys.two_bn()), given)
    first = (watcher.seen[1] - watcher.seen[0]).abs().median().item()
    second = (watcher.seen[3] - watcher.seen[2]).abs().median().item()
    assert first == pytest.approx(0.5, rel=1e-2)
    assert second == pytest.approx(0.125, rel=1e-2)


def test_clip_keeps_pixels_in_the_valid_range(toys):
    # mean (.5, .4, .3), std (.25, .5, .125): pixels 0 and 1 are -2 and 2, -.8 and 1.2, -2.4 and
    # 5.6, normalised.
    watcher = Watcher()
    given = options(
        regularizers=(Term("watch", 1.0, watcher),), stages=(Stage(6),), lr=3.0, clip=True, jitter=0
    )
    low = torch.tensor([-2, -0.8, -2.4]).view(1, 3, 1, 1) - 1e-5
    high = torch.tensor([2, 1.2, 5.6]).view(1, 3, 1, 1) + 1e-5
    dream(toys.teacher(toys.two_bn()), given)
    for images in watcher.seen[1:]:
        assert ((images >= low) & (images <= high)).all()
    free = Watcher()
    unclipped = options(
        regularizers=(Term("watch", 1.0, free),), stages=(Stage(6),), lr=3.0, jitter=0
    )
    dream(toys.teacher(toys.two_bn()), unclipped)
    assert not ((free.seen[-1] >= low) & (free.seen[-1] <= high)).all()


def test_clipped_dreams_are_in_the_valid_range_even_if_the_noise_was_best(toys):
    # With one step the noise is all there is to choose from, and N(0, 1) leaves the range.
    found = dream(toys.teacher(toys.two_bn()), options(stages=(Stage(1),), clip=True))
    low, high = toys.card().pixel_range(found.images)
    assert ((found.images >= low - 1e-5) & (found.images <= high + 1e-5)).all()


def test_one_channel_and_non_square(toys):
    model = toys.two_bn(in_channels=1)
    card = toys.card(size=(1, 6, 10))
    given = options(jitter=1, flip=True, clip=True, stages=(Stage(2, size=(3, 5)), Stage(2)))
    found = dream(toys.teacher(model, card), given)
    assert found.images.shape == (4, 1, 6, 10)
    assert torch.isfinite(found.images).all()
    assert card.to_stored(found.images).shape == (4, 1, 6, 10)


# --- jitter, flip, learning rate --------------------------------------------------------------


@pytest.mark.parametrize(
    ("jitter", "stages", "expected"),
    [
        # A sixteenth of the side: ±2 at 32×32, ±1 at 16×24's height of 16 and width of 24.
        (None, (Stage(1, size=32),), [(2, 2)]),
        (None, (Stage(1, size=(16, 48)),), [(1, 3)]),
        # Given for the last stage: ±30 at 224 is ±15 at 112 and ±8 (7.5, to even) at 56.
        (30, (Stage(1, size=112), Stage(1, size=224)), [(15, 15), (30, 30)]),
        (6, (Stage(1, size=(8, 16)), Stage(1, size=(16, 16))), [(3, 6), (6, 6)]),
        (0, (Stage(1, size=32),), [(0, 0)]),
    ],
)
def test_jitter_scales_with_the_resolution(toys, monkeypatch, jitter, stages, expected):
    shifts = []

    def watch(steps, shift, flip, generator):
        shifts.append(shift)
        return draw_views(steps, (0, 0), False, generator)

    monkeypatch.setattr(deepinversion, "draw_views", watch)
    given = options(regularizers=(), jitter=jitter, stages=stages)
    dream(toys.teacher(toys.conv_head()), given, plan(size=1))
    assert shifts == expected


def numbered(height=5, width=7):
    return torch.arange(height * width).float().view(1, 1, height, width)


def views(steps, shift, flip, seed=0):
    return draw_views(steps, shift, flip, torch.Generator().manual_seed(seed))


def test_views_roll_by_every_shift_and_mirror_half_of_the_time():
    image = numbered()
    rolled = {
        (dy, dx, flipped): (
            torch.roll(image, (dy, dx), (2, 3)).flip(3) if flipped else image.roll((dy, dx), (2, 3))
        )
        for dy in (-1, 0, 1)
        for dx in (-2, -1, 0, 1, 2)
        for flipped in (False, True)
    }
    seen = []
    for draw in views(600, (1, 2), True):
        out = View.apply(image, draw)
        assert torch.equal(gathered(image, draw), out)
        seen.append(next(key for key, x in rolled.items() if torch.equal(x, out)))
    assert set(seen) == set(rolled), "30 outcomes, 20 expected of each"
    flips = sum(flipped for _, _, flipped in seen)
    assert 240 < flips < 360  # 300 ± 5 standard deviations of 12


@pytest.mark.parametrize("draw", [(1, -2, 0), (1, -2, 1), (0, 0, 1), (-2, 3, 1)])
def test_the_gradient_of_a_view_is_that_of_roll_and_flip(draw):
    weights = torch.arange(2 * 35).float().view(2, 1, 5, 7).sin()
    image = numbered().repeat(2, 1, 1, 1).requires_grad_()
    expected = torch.roll(image, draw[:2], (2, 3))
    expected = expected.flip(3) if draw[2] else expected
    (exact,) = torch.autograd.grad((expected * weights).sum(), [image])
    (found,) = torch.autograd.grad((View.apply(image, torch.tensor(draw)) * weights).sum(), [image])
    assert torch.equal(found, exact)


def test_views_are_a_function_of_the_generator():
    assert torch.equal(views(40, (8, 8), True, 1), views(40, (8, 8), True, 1))
    assert not torch.equal(views(40, (8, 8), True, 1), views(40, (8, 8), True, 2))


def test_a_view_without_jitter_and_flip_changes_nothing():
    image = numbered()
    (draw,) = views(1, (0, 0), False)
    assert torch.equal(View.apply(image, draw), image)


def test_every_image_of_the_batch_is_shifted_alike():
    batch = numbered().repeat(3, 1, 1, 1)
    (draw,) = views(1, (2, 3), True, 4)
    out = View.apply(batch, draw)
    assert torch.equal(out[0], out[1])
    assert torch.equal(out[0], out[2])


# --- labels -----------------------------------------------------------------------------------


def dealt(labels, sizes, classes, seed=0, unconditional=0.0):
    """Return the labels of batches of these sizes, one after the other."""
    card, first, found = Card("c", (3, 8, 8), (0.5,) * 3, (0.5,) * 3, classes, "test"), 0, []
    for index, size in enumerate(sizes):
        at = plan(seed=index, size=size, index=index, first=first)
        draws = torch.Generator().manual_seed(index)
        found.append(deal_labels(labels, card, seed, at, draws, unconditional))
        first += size
    return found


def test_balanced_labels_show_every_class_before_any_comes_again():
    whole = torch.cat(dealt("balanced", [4, 5, 1, 11], 7))
    assert [sorted(part.tolist()) for part in whole.split(7)] == [[*range(7)]] * 3
    assert whole[:7].tolist() != whole[7:14].tolist(), "each round has an order of its own"


def test_balanced_labels_depend_on_their_place_in_the_run_and_its_seed_alone():
    assert torch.equal(
        torch.cat(dealt("balanced", [21], 7)), torch.cat(dealt("balanced", [8, 13], 7))
    )
    assert not torch.equal(*(dealt("balanced", [100], 100, seed)[0] for seed in (0, 1)))


def test_the_first_batch_shows_classes_from_all_over():
    """Of 1,000 classes in their order 32 in turn would all be below 32."""
    batches = dealt("balanced", [32, 32], 1000)
    assert len(torch.cat(batches).unique()) == 64
    for labels in batches:
        assert len((labels // 100).unique()) >= 8, "of ten tenths"


def test_given_labels_are_dealt_as_all_classes_are():
    whole = torch.cat(dealt((7, 2, 5), [4, 3, 2], 10))
    assert [sorted(part.tolist()) for part in whole.split(3)] == [[2, 5, 7]] * 3


def test_an_inversion_deals_labels_by_the_seed_of_the_run(toys):
    def labels(seed, batch_seed):
        given = options(labels="balanced", stages=(Stage(1),))
        with given.session(toys.teacher(toys.two_bn()), CPU, seed=seed) as session:
            return session.dream(plan(batch_seed), nothing).labels.tolist()

    assert labels(0, 5) == labels(0, 6)
    assert len({tuple(labels(seed, 5)) for seed in range(8)}) > 1


def test_random_labels_cover_the_classes_and_come_from_the_generator():
    def draw(seed):
        card = Card("c", (3, 8, 8), (0.5,) * 3, (0.5,) * 3, 5, "test")
        draws = torch.Generator().manual_seed(seed)
        return deal_labels("random", card, 0, plan(size=500), draws)

    counts = torch.bincount(draw(0), minlength=5)
    assert counts.min() > 60, "100 of each expected, standard deviation 9"
    assert torch.equal(draw(0), draw(0))
    assert not torch.equal(draw(0), draw(1))


@pytest.mark.parametrize("labels", ["balanced", "random", (7, 2, 5)])
@pytest.mark.parametrize("share", [0.1, 0.25, 0.5, 0.9, 1.0])
def test_a_share_of_the_images_shows_no_class(labels, share):
    sizes = [8, 8, 1, 3, 20]
    batches = dealt(labels, sizes, 10, unconditional=share)
    assert [len(batch) for batch in batches] == sizes
    for end in range(1, 6):
        shown = torch.cat(batches[:end])
        expected = (1 - share) * len(shown)
        assert abs(int((shown != NO_LABEL).sum()) - expected) <= 0.5 + 1e-9


def test_images_of_no_class_do_not_break_the_balance_of_the_others():
    whole = torch.cat(dealt("balanced", [8, 8, 5, 7], 7, unconditional=0.5))
    shown = whole[whole != NO_LABEL]
    assert [sorted(part.tolist()) for part in shown.split(7)] == [[*range(7)]] * 2


def test_images_of_no_class_have_no_cross_entropy_and_the_others_what_they_had(toys):
    teacher = toys.teacher(toys.two_bn())
    images = torch.randn(4, *teacher.card.input_size)
    labels = torch.tensor([2, 0, NO_LABEL, NO_LABEL])
    with bound_loss(teacher, (), None) as loss:
        (found,) = loss(images.requires_grad_(), labels).values()
        alone = loss(images[:2], labels[:2])["cross_entropy"]
        (gradient,) = torch.autograd.grad(found, images)
        nobody = loss(images, torch.full((4,), NO_LABEL))["cross_entropy"]
    torch.testing.assert_close(found, alone / 2)
    assert gradient[:2].abs().amax((1, 2, 3)).min() > 0
    assert gradient[2:].abs().max() == 0
    assert nobody == 0


def test_unconditional_dreams_carry_the_teachers_choice(toys):
    teacher = toys.teacher(toys.two_bn())
    made = dream(teacher, options(unconditional=1.0))
    with torch.no_grad():
        chosen = teacher.model.eval()(made.images).argmax(1)
    assert made.labels.tolist() == chosen.tolist()


def test_labels_reach_the_loss(toys):
    watcher, model = Watcher(), toys.two_bn()
    given = options(regularizers=(Term("w", 1.0, watcher),), stages=(Stage(1),), labels=(2,))
    terms = []
    found = dream(toys.teacher(model), given, on_step=lambda d, t: terms.append(t))
    assert found.labels.tolist() == [2, 2, 2, 2]
    expected = F.cross_entropy(model(watcher.seen[0]), torch.tensor([2, 2, 2, 2]))
    assert terms[0]["cross_entropy"].item() == pytest.approx(expected.item(), rel=1e-5)


# --- a student in training --------------------------------------------------------------------

COMPETING = (Term("js_compete", 1.0, JSCompete()),)


def test_each_batch_is_dreamed_against_the_student_as_it_then_is(toys):
    teacher, student = toys.teacher(toys.two_bn()), toys.two_bn()
    student.train()
    given = options(regularizers=COMPETING)
    plan = BatchPlan(0, 0, 4, 1)
    with given.session(teacher, CPU, student=student) as session:
        first = session.dream(plan, lambda *_: None).images
        again = session.dream(plan, lambda *_: None).images
        with torch.no_grad():
            next(student.parameters()).add_(1)
        later = session.dream(plan, lambda *_: None).images
    assert torch.equal(first, again)
    assert not torch.equal(first, later)


def test_a_student_in_training_is_left_as_it_was(toys):
    student = toys.two_bn()
    student.train()
    before = {name: value.clone() for name, value in student.state_dict().items()}
    given = options(regularizers=COMPETING)
    with given.session(toys.teacher(toys.two_bn()), CPU, student=student) as session:
        session.prepare(4)
        session.dream(BatchPlan(0, 0, 4, 1), lambda *_: None)
        assert all(m.training for m in student.modules())
        assert all(p.requires_grad and p.grad is None for p in student.parameters())
    assert all(torch.equal(before[name], value) for name, value in student.state_dict().items())


# --- refusals ---------------------------------------------------------------------------------


def test_js_compete_without_a_student_says_what_it_needs():
    assert options().needs_student is None
    assert options(regularizers=COMPETING).needs_student == "js_compete"


def test_a_teacher_without_batch_norm_is_refused_naming_alternatives(toys):
    teacher = toys.teacher(toys.plain())
    with pytest.raises(TeacherMismatch, match="no BatchNorm") as caught:
        options().check(teacher)
    assert caught.value.path == ("regularizers", 2)
    assert "DeepDream" in caught.value.message
    with (
        pytest.raises(TeacherMismatch, match="no BatchNorm"),
        options().session(teacher, CPU),
    ):
        pass
    deep_dream = options(regularizers=TERMS[:2])
    assert dream(teacher, deep_dream).images.shape == (4, 3, 8, 8)


@pytest.mark.parametrize("label", [3, -1])
def test_a_label_the_teacher_does_not_have_is_refused(toys, label):
    with pytest.raises(TeacherMismatch, match=str(label)) as caught:
        options(labels=(0, label)).check(toys.teacher(toys.two_bn()))
    assert caught.value.path == ("labels",)


@pytest.mark.parametrize(("size", "expected"), [((8, 8), 64), ((127, 300), 64), ((128, 160), 32)])
def test_large_images_are_dreamed_fewer_at_a_time(toys, size, expected):
    teacher = toys.teacher(toys.two_bn(), toys.card(input_size=(3, *size)))
    for given, found in ((None, expected), (7, 7)):
        with options(batch_size=given).session(teacher, CPU) as session:
            assert session.batch_size == found
        assert options(batch_size=given).known_batch_size(teacher) == found
    assert options(batch_size="auto").known_batch_size(teacher) is None
