"""The engine: it computes what eager float32 computes, and gives back what it borrows."""

from __future__ import annotations

import gc
import mmap
import shutil
from dataclasses import dataclass, field

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from dreamkit import compilation, memory
from dreamkit.arithmetic import full_float32, has_native_bfloat16, resolve_precision
from dreamkit.errors import DreamkitError, NonFiniteLoss
from dreamkit.memory import available_memory, largest_batch, peak_memory
from dreamkit.model_state import hooked
from dreamkit.registry import Registry, Term
from dreamkit.regularizers.bn_feature import BNFeature
from dreamkit.regularizers.tv import TotalVariation
from dreamkit.stages.batches import as_stored
from dreamkit.synthesizers import dreamer, planning
from dreamkit.synthesizers.bn_statistics import channel_statistics
from dreamkit.synthesizers.deepinversion import DeepInversion
from dreamkit.synthesizers.engine import Engine, Evaluator, borrowed, compile_seconds
from dreamkit.synthesizers.planning import StepClock, TimedEnough
from dreamkit.synthesizers.stage import Plateau, Stage
from dreamkit.types import BatchPlan, Estimate, Regularizer

CPU = torch.device("cpu")
NO_VIEW = torch.zeros(3, dtype=torch.int64)
needs_compiler = pytest.mark.skipif(
    shutil.which("g++") is None and shutil.which("clang++") is None,
    reason="torch.compile needs a C++ compiler on the CPU",
)


def options(**changes):
    known = {
        "images": 4,
        "batch_size": 4,
        "regularizers": (
            Term("tv", 0.01, TotalVariation()),
            Term("bn_feature", 0.5, BNFeature("paper", first_layer_scale=3.0)),
        ),
        "stages": (Stage(3),),
        "engine": Engine(precision="float32", compile=False),
    }
    return DeepInversion(**(known | changes))


def quadratic(images, labels, arithmetic, shown=None):
    """An objective by hand: the sum of squares, whose gradient is 2x."""
    return {"squares": images.square().sum()}


def evaluator(objective=quadratic, precision="float32"):
    return Evaluator(objective, CPU, precision)


def images(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1))


# --- evaluation -------------------------------------------------------------------------------


def test_loss_terms_and_gradient_by_hand():
    x = images(2, 3, 4, 5)
    found = evaluator()(x, torch.zeros(2).long(), torch.tensor([1, 2, 1]))
    assert found.loss.item() == pytest.approx(x.square().sum().item(), rel=1e-6)
    torch.testing.assert_close(found.gradient, 2 * x)
    assert not found.loss.requires_grad
    assert not found.terms["squares"].requires_grad
    assert x.grad is None


def test_networks_alone_run_in_lower_precision(toys):
    seen = {}

    def objective(x, labels, arithmetic, shown=None):
        with arithmetic:
            seen["inside"] = F.conv2d(x, torch.ones(1, 3, 1, 1)).dtype
        seen["outside"] = F.conv2d(x, torch.ones(1, 3, 1, 1)).dtype
        return {"sum": x.sum()}

    evaluator(objective, "bfloat16")(images(1, 3, 2, 2), torch.zeros(1).long(), NO_VIEW)
    assert seen == {"inside": torch.bfloat16, "outside": torch.float32}
    evaluator(objective, "float32")(images(1, 3, 2, 2), torch.zeros(1).long(), NO_VIEW)
    assert seen["inside"] == torch.float32


def test_regularizers_see_float32_whatever_the_network_computes_in(toys):
    @dataclass
    class Types:
        needs = frozenset({"bn_statistics"})
        seen: list = field(default_factory=list)

        def __call__(self, step):
            layer = step.bn_statistics[0]
            self.seen += [
                t.dtype for t in (step.images, step.teacher_logits, layer.mean, layer.var)
            ]
            return step.images.sum() * 0

    types = Types()
    given = options(
        regularizers=(Term("types", 1.0, types),),
        stages=(Stage(1),),
        engine=Engine(precision="bfloat16", compile=False),
    )
    with given.session(toys.teacher(toys.two_bn()), CPU) as session:
        session.dream(BatchPlan(0, 0, 4, 1), lambda *_: None)
    assert set(types.seen) == {torch.float32}


def test_auto_precision_is_what_the_processor_multiplies(monkeypatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": True})
    assert has_native_bfloat16(CPU)
    assert Engine().evaluator(quadratic, CPU).precision == "bfloat16"
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx2": True})
    assert not has_native_bfloat16(CPU)
    assert Engine().evaluator(quadratic, CPU).precision == "float32"
    assert Engine(precision="bfloat16").evaluator(quadratic, CPU).precision == "bfloat16"
    assert not has_native_bfloat16(torch.device("mps"))


def test_auto_precision_of_depthwise_convolutions_on_a_cpu(monkeypatch, toys):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": True})
    assert resolve_precision("auto", CPU, toys.depthwise()) == "float32"
    assert resolve_precision("bfloat16", CPU, toys.depthwise()) == "bfloat16"
    assert resolve_precision("auto", CPU, toys.two_bn()) == "bfloat16"
    assert resolve_precision("auto", CPU, toys.depthwise(), inverted=True) == "bfloat16"
    doubling = nn.Conv2d(4, 8, 3, groups=4)
    assert resolve_precision("auto", CPU, doubling, inverted=True) == "float32"
    given = options(engine=Engine())
    with given.session(toys.teacher(toys.depthwise()), CPU) as session:
        assert session.choices["precision"] == "bfloat16", "an inversion goes round what is slow"


# --- compilation ------------------------------------------------------------------------------


@needs_compiler
def test_compiled_is_eager_and_other_shapes_stay_eager(toys):
    with options().session(toys.teacher(toys.two_bn()), CPU) as session:
        x, labels = images(4, 3, 8, 8), torch.tensor([0, 1, 2, 1])
        draw = torch.tensor([1, -2, 1])
        eager = session.evaluator(x, labels, draw)
        assert session.evaluator.compile(x, labels) is None
        assert not session.evaluator.exact
        compiled = session.evaluator(x, labels, draw)
        assert session.evaluator(x[:2], labels[:2], draw).gradient.shape == (2, 3, 8, 8)
    assert compiled.terms.keys() == eager.terms.keys()
    for name, value in eager.terms.items():
        assert compiled.terms[name].item() == pytest.approx(value.item(), rel=1e-5)
    assert (compiled.gradient - eager.gradient).norm() < 1e-5 * eager.gradient.norm()


def broken(change):
    """Return a stand-in for ``torch.compile`` whose result is changed."""

    def compile(function, **settings):
        def compiled(*given):
            return change(function(*given))

        return compiled

    return compile


def test_a_compiled_loss_that_differs_is_not_used(monkeypatch):
    monkeypatch.setattr(torch, "compile", broken(lambda found: (found[0] * 1.1, found[1])))
    held = evaluator()
    assert "1.0e-01" in held.compile(images(2, 3, 4, 4), torch.zeros(2).long())
    assert held.exact


def test_a_compiled_gradient_that_differs_is_not_used(monkeypatch):
    def shifted(found):
        loss, terms = found
        return loss.detach() + 1.5 * (loss - loss.detach()), terms

    monkeypatch.setattr(torch, "compile", broken(shifted))
    held = evaluator()
    assert "gradient 5.0e-01" in held.compile(images(2, 3, 4, 4), torch.zeros(2).long())
    assert held.exact


@pytest.mark.parametrize(("error", "used"), [(0.25, True), (0.6, False)])
def test_rounding_of_a_deep_network_is_no_reason_against_a_compiled_one(monkeypatch, error, used):
    def objective(x, labels, arithmetic, shown=None):
        # Eager bfloat16 is a quarter too high; compiled, as much too low or much more.
        eager = torch.is_autocast_enabled("cpu")
        with arithmetic:
            lower = torch.is_autocast_enabled("cpu")
        assert not eager
        return {"squares": x.square().sum() * (1.25 if lower else 1.0)}

    def compile(function, **settings):
        def compiled(*given):
            loss, terms = function(*given)
            return loss / 1.25 * (1 - error), terms

        return compiled

    monkeypatch.setattr(torch, "compile", compile)
    held = evaluator(objective, "bfloat16")
    problem = held.compile(images(2, 3, 4, 4), torch.zeros(2).long())
    assert (problem is None) is used


def failing(function, **settings):
    def compiled(*arguments):
        raise RuntimeError("no compiler here\nand a long story")

    return compiled


def test_a_compiler_that_fails_leaves_eager_and_is_named(monkeypatch, toys):
    monkeypatch.setattr(torch, "compile", failing)
    notes = []
    given = options(engine=Engine(precision="float32", compile=True))
    with given.session(toys.teacher(toys.two_bn()), CPU, note=notes.append) as session:
        cost = session.prepare(8)
        found = session.dream(BatchPlan(0, 0, 4, 1), lambda *_: None)
        choices = session.choices
    assert cost.seconds > 0
    assert torch.isfinite(found.images).all()
    assert choices["compile"] is False
    assert any("RuntimeError: no compiler here" in n and "story" not in n for n in notes)


def test_auto_compiles_only_if_the_run_pays_for_it(monkeypatch, toys):
    monkeypatch.setattr(torch, "compile", lambda function, **settings: function)
    monkeypatch.setattr(dreamer, "compile_seconds", lambda model: 30.0)
    seconds = iter([1.0, 1.0, 0.5])  # eager; then eager and compiled
    monkeypatch.setattr(planning, "_seconds_a_step", lambda phase, device: next(seconds))
    given = options(engine=Engine(precision="float32"), stages=(Stage(10),))
    notes = []
    with given.session(toys.teacher(toys.two_bn()), CPU, note=notes.append) as session:
        # 10 batches of 10 s: at 1.3 times the speed 23 s are saved, and with 14 batches 32 s.
        assert session.prepare(40).seconds == pytest.approx(100)
        assert session.choices["compile"] is False
    assert "about 30 s" in notes[-1]
    with given.session(toys.teacher(toys.two_bn()), CPU, note=notes.append) as session:
        assert session.prepare(56).seconds == pytest.approx(70, abs=1)
        assert session.choices["compile"] is True
    assert "2.0 times as fast" in notes[-1]


@pytest.mark.parametrize(("stride", "compiled"), [(1, True), (2, False)])
def test_auto_leaves_strided_depthwise_convolutions_in_bfloat16_eager(
    monkeypatch, toys, stride, compiled
):
    monkeypatch.setattr(torch, "compile", lambda function, **settings: function)
    monkeypatch.setattr(dreamer, "compile_seconds", lambda model: 0.0)
    monkeypatch.setattr(planning, "compile_phases", lambda *_: None)
    model = toys.depthwise()
    model.depthwise.stride = (stride, stride)
    timed, times = planning._seconds_a_step, iter([1.0, 0.5])

    def seconds(phase, device):
        timed(phase, device)
        return next(times)

    monkeypatch.setattr(planning, "_seconds_a_step", seconds)
    with options(engine=Engine("bfloat16")).session(toys.teacher(model), CPU) as session:
        session.prepare(40)
        assert session.choices["compile"] is compiled


def test_compiling_takes_longer_where_there_is_one_core(monkeypatch):
    model = nn.Sequential(*(nn.Conv2d(1, 1, 1) for _ in range(10)))
    found = []
    for threads in (1, 2, 8):
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        found.append(compile_seconds(model))
    assert found == pytest.approx([58, 29, 29])  # 15 s and 1.4 s a convolution, on two


@pytest.mark.parametrize(("asked", "used"), [("auto", False), (True, True)])
def test_compiled_and_slower_is_used_only_if_asked_for(monkeypatch, toys, asked, used):
    monkeypatch.setattr(torch, "compile", lambda function, **settings: function)
    monkeypatch.setattr(dreamer, "compile_seconds", lambda model: 0.0)
    seconds = iter([1.0, 1.5])  # eager, compiled
    monkeypatch.setattr(planning, "_seconds_a_step", lambda phase, device: next(seconds))
    notes = []
    given = options(engine=Engine(precision="float32", compile=asked))
    with given.session(toys.teacher(toys.two_bn()), CPU, note=notes.append) as session:
        session.prepare(40)
        assert session.choices["compile"] is used
        assert session.evaluator.exact is not used
    assert ("slower" in notes[-1]) is not used


def test_what_a_session_settled_holds_for_the_next(monkeypatch, toys):
    monkeypatch.setattr(torch, "compile", lambda function, **settings: function)
    given = options(batch_size="auto", engine=Engine())
    resolved = {"batch_size": 3, "precision": "float32", "compile": False}
    with given.session(toys.teacher(toys.two_bn()), CPU, resolved) as session:
        session.prepare(10**9)
        assert session.choices == resolved
        assert session.batch_size == 3


def test_a_copied_method_is_compiled_apart():
    held = evaluator()
    copy = compilation.with_cache_of_its_own(held._loss)
    assert copy.__func__.__code__ is not held._loss.__func__.__code__
    x = images(1, 1, 2, 2)
    assert torch.equal(copy(x, None, NO_VIEW, None)[0], held._loss(x, None, NO_VIEW, None)[0])


# --- what is borrowed -------------------------------------------------------------------------


def test_a_borrowed_model_is_given_back_as_it_was(toys):
    model = toys.two_bn().train()
    before, pointers = toys.state(model), [p.data_ptr() for p in model.parameters()]
    seen, strides = [], [p.stride() for p in model.parameters()]
    with borrowed(model, (3, 8, 8)):
        with hooked([("", model.conv2)], lambda name, module, x: seen.append(x)):
            model(images(2, 3, 8, 8))
        assert seen[0].is_contiguous(memory_format=torch.channels_last)
        assert not model.conv2.weight.requires_grad
        assert not model.training
    toys.assert_same_state(model, before)
    assert [p.data_ptr() for p in model.parameters()] == pointers
    assert [p.stride() for p in model.parameters()] == strides


@pytest.fixture
def tf32():
    """Let products be TF32, as torch lets convolutions; return what tells whether they may be."""
    settings = (torch.backends.cudnn, torch.backends.cuda.matmul)
    before = [setting.allow_tf32 for setting in settings]
    for setting in settings:
        setting.allow_tf32 = True
    yield lambda: [setting.allow_tf32 for setting in settings]
    for setting, value in zip(settings, before, strict=True):
        setting.allow_tf32 = value


def test_float32_on_cuda_is_no_tf32_and_the_setting_stays(tf32):
    seen = []

    def objective(images, labels, arithmetic, shown=None):
        seen.append(tf32())
        return {"square": images.square().sum()}

    images, labels = torch.ones(2, 3, 4, 4), torch.zeros(2)
    for device in ("cuda", "cpu"):
        Evaluator(objective, torch.device(device), "float32")(images, labels, NO_VIEW)
    with full_float32("bfloat16", torch.device("cuda")):
        seen.append(tf32())
    assert seen == [[False, False], [True, True], [True, True]]
    assert tf32() == [True, True]


# --- losses that overflow ---------------------------------------------------------------------


@dataclass
class Overflowing(Regularizer):
    """A regularizer whose value is infinite at some calls."""

    at: frozenset
    calls: int = 0
    types: list = field(default_factory=list)

    def __call__(self, step):
        self.calls += 1
        value = step.images.square().mean()
        return value / 0 if self.calls in self.at else value


class Odd(Regularizer):
    """A regularizer that returns whatever it is given."""

    def __init__(self, value):
        self.value = value

    def __call__(self, step):
        return self.value(step)


@pytest.mark.parametrize(
    ("value", "what"),
    [
        (lambda step: step.images.square().mean(1), r"a tensor of shape \(4, 8, 8\)"),
        (lambda step: step.images.mean((1, 2, 3)), r"a tensor of shape \(4,\)"),
        (lambda step: 0.5, "0.5"),
        (lambda step: None, "None"),
    ],
)
def test_a_regularizer_that_returns_no_scalar_is_named(toys, value, what):
    given = options(regularizers=(Term("tv", 1.0, TotalVariation()), Term("odd", 2.0, Odd(value))))
    with (
        given.session(toys.teacher(toys.two_bn()), CPU) as session,
        pytest.raises(DreamkitError, match=f"odd should return a tensor of .*, not {what}$"),
    ):
        session.dream(BatchPlan(7, 0, 4, 11), lambda *_: None)


@pytest.mark.parametrize("name", ["loss", "cross_entropy", "contrast"])
def test_a_regularizer_does_not_take_a_name_of_the_losss_own_records(toys, name):
    given = options(regularizers=(Term(name, 1.0, TotalVariation()),))
    with pytest.raises(DreamkitError, match=f"the loss's own under '{name}'"):
        given.check(toys.teacher(toys.two_bn()))
    with pytest.raises(ValueError, match=f"name '{name}': records have"):
        Registry("regularizers").register(name, TotalVariation, "a plugin")
    Registry("losses").register(name, TotalVariation, "a plugin")


def overflowing(at, precision="bfloat16"):
    return options(
        regularizers=(Term("overflowing", 1.0, Overflowing(frozenset(at))),),
        engine=Engine(precision=precision, compile=False),
        stages=(Stage(3, size=4), Stage(3)),
    )


def test_a_batch_that_overflows_starts_again_in_float32(toys):
    teacher, notes, plan = toys.teacher(toys.two_bn()), [], BatchPlan(7, 0, 4, 11)
    with overflowing({2}).session(teacher, CPU, note=notes.append) as session:
        found = session.dream(plan, lambda *_: None)
    with overflowing(set(), "float32").session(teacher, CPU) as session:
        exact = session.dream(plan, lambda *_: None)
    assert torch.equal(found.images, exact.images)
    assert found.loss == exact.loss
    assert len(notes) == 1
    assert "batch 7" in notes[0]
    assert "float32" in notes[0]


def test_a_batch_that_overflows_again_is_given_up(toys):
    with (
        overflowing({2, 5, 6}).session(toys.teacher(toys.two_bn()), CPU) as session,
        pytest.raises(NonFiniteLoss, match=r"batch 7 .* \(not finite first: overflowing\)$"),
    ):
        session.dream(BatchPlan(7, 0, 4, 11), lambda *_: None)


def test_float32_is_not_tried_twice(toys):
    given = overflowing({2}, "float32")
    with (
        given.session(toys.teacher(toys.two_bn()), CPU) as session,
        pytest.raises(NonFiniteLoss),
    ):
        session.dream(BatchPlan(0, 0, 4, 11), lambda *_: None)
    assert given.regularizers[0].entry.calls == 3


# --- early stop -------------------------------------------------------------------------------


def test_plateau_by_hand():
    plateau = Plateau(50)
    losses = {25: 10.0, 50: 5.0, 75: 4.999, 100: 4.998}
    assert [plateau(step, torch.tensor(loss)) for step, loss in losses.items()] == [
        False,
        False,
        False,  # 0.02 % below 5: no progress since 50
        True,
    ]
    assert not any(Plateau(None)(step, torch.tensor(1.0)) for step in range(10**3))


def test_a_stage_on_a_plateau_ends_early(toys):
    still = (Term("bn_feature", 0.0, BNFeature()),)
    done = []
    given = options(regularizers=still, stages=(Stage(400),), lr=1e-12, patience=50, jitter=0)
    with given.session(toys.teacher(toys.two_bn()), CPU) as session:
        session.dream(BatchPlan(0, 0, 4, 1), lambda step, terms: done.append(step))
    assert done[-1] == 75  # the first look, at step 25, counts as progress


# --- memory -----------------------------------------------------------------------------------


def test_peak_memory_sees_an_allocation():
    gc.collect()  # what other tests left, freed meanwhile, would hide it
    # Of the system, page by page: malloc may hand out what it kept of other tests' memory.
    with peak_memory(CPU) as peak, mmap.mmap(-1, 64 * 2**20) as block:
        for page in range(0, len(block), mmap.PAGESIZE):
            block[page] = 1
    assert 60 * 2**20 < peak.above_start < 90 * 2**20
    assert peak.total > peak.above_start
    assert 2**20 < available_memory(CPU) < 2**50


def fits_by(monkeypatch, bytes_an_image, available):
    """Make memory use proportional to the batch; return what was tried."""
    tried = []
    used = {"now": 0}

    class Fake:
        def __enter__(self):
            # What earlier trials used is still resident.
            self.peak = memory.Peak(start=10**6 + used["now"])
            return self.peak

        def __exit__(self, *error):
            self.peak.total = 10**6 + used["now"]

    def trial(size):
        tried.append(size)
        used["now"] = bytes_an_image * size

    monkeypatch.setattr(memory, "peak_memory", lambda device: Fake())
    monkeypatch.setattr(memory, "available_memory", lambda device: available)
    return trial, tried


@pytest.mark.parametrize(
    ("available", "limit", "expected"),
    [
        (10_000, 1024, 56),  # 60 of 100 bytes fit in 60 %; the multiple of 8 below is 56
        (10_000, 20, 20),
        (500, 1024, 3),  # 8 and 4 do not fit, 2 do, and so one more
        (10**9, 1000, 1000),
    ],
)
def test_largest_batch_by_hand(monkeypatch, available, limit, expected):
    trial, tried = fits_by(monkeypatch, 100, available)
    assert largest_batch(trial, limit, CPU) == expected
    assert tried[-1] == expected


def test_no_batch_fits(monkeypatch):
    trial, _ = fits_by(monkeypatch, 100, 100)
    with pytest.raises(DreamkitError, match="not even one"):
        largest_batch(trial, 8, CPU)


def test_batch_size_auto_is_settled_once(toys, monkeypatch):
    asked = []

    def largest(trial, limit, device):
        trial(2)
        asked.append(limit)
        return 3

    monkeypatch.setattr(dreamer, "largest_batch", largest)
    notes = []
    given = options(images=7, batch_size="auto")
    with given.session(toys.teacher(toys.two_bn()), CPU, note=notes.append) as session:
        assert session.batch_size == session.batch_size == 3
        assert session.choices["batch_size"] == 3
    assert asked == [7]
    assert "3" in notes[0]


def test_cost_is_seconds_and_bytes(toys):
    given = options(stages=(Stage(100, size=4), Stage(100)))
    with given.session(toys.teacher(toys.two_bn()), CPU) as session:
        once, tenfold = session.prepare(4), session.prepare(40)
    assert isinstance(once, Estimate)
    assert 0.01 < once.seconds < 100
    assert 2 * once.seconds < tenfold.seconds < 50 * once.seconds
    assert once.memory_bytes > 2**20


def test_preparing_changes_no_dream(toys):
    teacher, plan = toys.teacher(toys.two_bn()), BatchPlan(0, 0, 4, 1)
    with options().session(teacher, CPU) as session:
        alone = session.dream(plan, lambda *_: None)
    with options().session(teacher, CPU) as session:
        session.prepare(8)
        after = session.dream(plan, lambda *_: None)
    assert torch.equal(alone.images, after.images)


def test_a_borrowed_model_comes_back_from_an_error_too(toys):
    model = toys.two_bn()
    with pytest.raises(KeyError), borrowed(model, (3, 8, 8)):
        raise KeyError
    assert not model._forward_pre_hooks
    assert all(p.requires_grad for p in model.parameters())


def test_weights_that_a_subclass_may_view_keep_their_layout():
    class Standardised(nn.Conv2d):
        def forward(self, x):
            flat = self.weight.view(len(self.weight), -1)
            weight = flat / flat.std(1, keepdim=True)
            return F.conv2d(x, weight.view_as(self.weight))

    with borrowed(nn.Sequential(layer := Standardised(3, 4, 3)), (3, 5, 5)):
        assert layer(images(1, 3, 5, 5)).shape == (1, 4, 3, 3)


def test_nothing_compiled_outlives_a_session(monkeypatch, toys):
    monkeypatch.setattr(torch, "compile", lambda function, **settings: function)
    with options().session(toys.teacher(toys.two_bn()), CPU) as session:
        assert session.compile() is None
        assert not session.evaluator.exact
    assert session.evaluator.exact


@needs_compiler
def test_compiled_dreams_do_not_depend_on_what_was_judged_in_between(toys):
    given = options(engine=Engine(precision="float32", compile=True))
    teacher, plans = toys.teacher(toys.two_bn()), [BatchPlan(i, 4 * i, 4, i) for i in range(2)]

    def dreams(judged):
        with given.session(teacher, CPU) as session:
            assert session.compile() is None
            found = []
            for plan in plans:
                found.append(session.dream(plan, lambda *_: None))
                if judged:
                    as_stored(found[-1], teacher)
        return found

    for alone, after in zip(dreams(False), dreams(True), strict=True):
        assert torch.equal(alone.images, after.images)


def test_compiled_statistics_are_accurate_far_from_the_running_mean(monkeypatch):
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    x = 5 + images(16, 4, 20, 20)
    mean, var = channel_statistics(x, torch.zeros(4))
    exact = x.double()
    torch.testing.assert_close(mean.double(), exact.mean((0, 2, 3)), rtol=1e-6, atol=0)
    expected = exact.var((0, 2, 3), correction=0)
    torch.testing.assert_close(var.double(), expected, rtol=1e-4, atol=0)


def test_a_step_clock_leaves_out_the_first_step_and_stops_in_time(monkeypatch):
    now = iter([10.0, 10.4, 10.9, 11.3, 99.0])
    monkeypatch.setattr(planning.time, "perf_counter", lambda: next(now))
    clock = StepClock(CPU)
    loss = {"loss": torch.tensor(1.0)}
    for done in (1, 2, 3):
        clock(done, loss)
    with pytest.raises(TimedEnough):  # 1.3 s after the first
        clock(4, loss)
    assert clock.seconds == pytest.approx(0.4)  # of 0.4, 0.5 and 0.4


def test_networks_with_weights_of_other_shapes_can_be_borrowed():
    model = nn.Sequential(nn.Flatten(2), nn.Conv1d(2, 3, 1), nn.Linear(20, 5))
    with borrowed(model, (2, 4, 5)):
        assert not any(p.requires_grad for p in model.parameters())
        assert model(images(1, 2, 4, 5)).shape == (1, 3, 5)
    assert all(p.requires_grad for p in model.parameters())


def test_features_of_grey_images_have_channels_last_too():
    model = nn.Conv2d(1, 4, 3)
    with borrowed(model, (1, 8, 8)):
        given = images(2, 1, 8, 8).requires_grad_()
        seen = model(given)
        (gradient,) = torch.autograd.grad(seen.square().sum(), given)
    assert seen.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(seen, model(given))
    (expected,) = torch.autograd.grad(model(given).square().sum(), given)
    torch.testing.assert_close(gradient, expected)


def test_channels_are_last_only_where_that_is_known_to_work():
    model = nn.Conv2d(3, 4, 3).to("meta")  # as on MPS, where passes back through it fail
    with borrowed(model, (3, 8, 8)):
        assert not model._forward_pre_hooks


def test_a_network_that_views_features_as_vectors_is_shown_images_as_they_are():
    class Viewing(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 3)

        def forward(self, x):
            return self.conv(x).view(len(x), -1)

    model = Viewing()
    with borrowed(model, (3, 5, 5)):
        assert model(images(2, 3, 5, 5)).shape == (2, 36)
        assert not model._forward_pre_hooks
