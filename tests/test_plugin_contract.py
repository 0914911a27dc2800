"""The contract of ``dreamkit.plugin``: bases, their defaults and checks, and isolation."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from dreamkit import plugin, types
from dreamkit.card import Card
from dreamkit.errors import NonFiniteLoss, NothingToPrune, PluginError
from dreamkit.events import EventEmitter
from dreamkit.parameterisations.pixels import Pixels
from dreamkit.plugin import testing
from dreamkit.plugin.testing import ContractError
from dreamkit.plugins import build_registries
from dreamkit.registry import Registry, Term
from dreamkit.regularizers.tv import TotalVariation
from dreamkit.stages.teaching import Recovery
from dreamkit.synthesizers.deepinversion import DeepInversion
from dreamkit.synthesizers.stage import Stage
from dreamkit.trackers.isolated import IsolatedTrackers
from dreamkit.types import (
    ChannelGroup,
    Criterion,
    Event,
    ImageSource,
    IncrementalLoss,
    LatencyBackend,
    Noted,
    Regularizer,
    RoundPruned,
    Synthesizer,
    TeacherSource,
    Tracker,
)
from dreamkit.types.entries import BASES

REGISTRIES = build_registries()


def entries(kind: str) -> list[str]:
    return list(REGISTRIES[kind])


def resolved(kind: str, name: str) -> type:
    return REGISTRIES[kind].resolve(name)


# The module itself.


def test_every_name_is_there_and_is_imported_when_asked_for():
    assert sorted(set(plugin.__all__)) == sorted(plugin.__all__)
    for name in plugin.__all__:
        assert getattr(plugin, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'Regulariser'"):
        plugin.Regulariser  # noqa: B018
    assert dir(plugin) == sorted(plugin.__all__)


def test_every_base_and_event_is_in_it():
    events = [cls.__name__ for cls in Event.__subclasses__()]
    for name in ("Event", *events, *(base.__name__ for base in BASES.values())):
        assert getattr(plugin, name) is getattr(types, name)
        assert name in plugin.__all__


def test_importing_it_is_light():
    code = (
        "import sys, dreamkit.plugin; sys.exit({'torch', 'pydantic'} & set(sys.modules) != set())"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_a_log_in_memory_is_among_it_for_those_who_run_applications_themselves(tmp_path):
    log = plugin.MemoryLog()
    context = plugin.RunContext(0, torch.device("cpu"), tmp_path, log, None)
    context.log.record("training", 1, {"loss": float("inf")})
    assert log.records == {"training": {1: {"loss": None}}}


# Bases.


@pytest.mark.parametrize("kind", BASES)
def test_built_ins_derive_from_the_base_of_their_kind(kind):
    for name in entries(kind):
        assert issubclass(resolved(kind, name), BASES[kind]), name


def test_defaults_of_what_is_optional():
    class Plain(Regularizer, IncrementalLoss, Criterion, ImageSource, TeacherSource):
        def __call__(self, step): ...
        def open(self, card): ...
        def build(self): ...
        def load(self, seed): ...

    made = Plain()
    assert made.needs == frozenset()
    assert made.class_names() is None
    assert made.teacher_sha256() is None
    assert Plain.known_models(pretrained=True) is None
    made.check(torch.nn.Identity(), [])  # refuses nothing


def test_defaults_of_synthesizers_backends_and_trackers(tmp_path):
    class Dreams(Synthesizer):
        steps_per_batch = 1

        def session(self, *arguments): ...

    class Board(LatencyBackend):
        def describe(self): ...
        def time(self, modules): ...

    class Silent(Tracker):
        def record(self, stage, step, numbers): ...

    assert Dreams().needs_student is None
    assert Dreams().known_batch_size(None) is None
    alone = Dreams()
    assert alone.members == (alone,)
    assert (Board().channel_block, Board().folds_norms) == (1, False)
    testing.check_tracker(Silent, tmp_path)


@pytest.mark.parametrize(
    ("base", "needs", "message"),
    [
        (Regularizer, {"bn_statistic"}, "'bn_statistic'; did you mean 'bn_statistics'?"),
        (
            Regularizer,
            {"replay"},
            r"'replay' \(known: bn_statistics, student_logits, features, block_outputs, norm_means",
        ),
        (IncrementalLoss, {"repaly"}, "'repaly'; did you mean 'replay'?"),
        (Regularizer, "features", r'should be a set, such as frozenset\(\{"bn_statistics"\}\)'),
    ],
)
def test_a_misspelt_need_is_an_error_when_the_class_is_made(base, needs, message):
    with pytest.raises(TypeError, match=message):
        type("Mine", (base,), {"needs": needs})


def test_a_misspelt_need_of_a_class_without_the_base_is_an_error_when_it_is_resolved():
    class Mine:
        needs = frozenset({"feature"})

        def __call__(self, step): ...

    registry = Registry("regularizers")
    registry.register("mine", Mine, "a plugin 1.0")
    message = "regularizers 'mine' of a plugin 1.0 is unusable: Mine.needs: .* mean 'features'"
    with pytest.raises(PluginError, match=message):
        registry.resolve("mine")
    Mine.needs = frozenset({"features"})
    assert registry.resolve("mine") is Mine  # it has all that the base has


@pytest.mark.parametrize(
    ("kind", "bases", "message"),
    [
        ("regularizers", (), "Mine has no '__call__', 'needs': derive it from dreamkit.plugin.Reg"),
        ("regularizers", (Regularizer,), "Mine has no '__call__'$"),
        ("sources", (ImageSource,), "Mine has no 'open'$"),
        (
            "trackers",
            (),
            "Mine has no 'close', 'finish', 'record', 'start', 'withdraw': derive it from ",
        ),
    ],
)
def test_a_class_that_lacks_something_is_refused(kind, bases, message):
    registry = Registry(kind)
    registry.register("mine", type("Mine", bases, {}), "me")
    with pytest.raises(PluginError, match=message):
        registry.resolve("mine")


def test_an_option_that_hides_a_property_of_the_base_needs_a_default():
    @dataclasses.dataclass
    class Board(LatencyBackend):
        batch_size: int
        channel_block: int  # a dataclass takes the property for its default

        def describe(self): ...
        def time(self, modules): ...

    registry = Registry("latency_backends")
    registry.register("board", Board, "me")
    with pytest.raises(PluginError, match=r"Board\.channel_block is a property of LatencyBackend"):
        registry.resolve("board")


# Checks for plugin authors, on what is built in.


@pytest.mark.parametrize("name", entries("regularizers"))
def test_regularizers_keep_the_contract(name):
    testing.check_regularizer(resolved("regularizers", name))


@pytest.mark.parametrize("name", entries("criteria"))
def test_criteria_keep_the_contract(name):
    testing.check_criterion(resolved("criteria", name))


@pytest.mark.parametrize("name", entries("losses"))
def test_losses_keep_the_contract(name):
    testing.check_incremental_loss(resolved("losses", name))


@pytest.mark.parametrize("name", entries("distillation_losses"))
def test_distillation_losses_keep_the_contract(name):
    testing.check_distillation_loss(resolved("distillation_losses", name))


@pytest.mark.parametrize("name", entries("selections"))
def test_selections_keep_the_contract(name):
    testing.check_selection(resolved("selections", name))


@pytest.mark.parametrize("name", entries("parameterisations"))
def test_parameterisations_keep_the_contract(name):
    testing.check_parameterisation(resolved("parameterisations", name))


@pytest.mark.parametrize("name", entries("synthesizers"))
def test_synthesizers_keep_the_contract(name):
    cls = resolved("synthesizers", name)
    options = {"regularizers": (Term("tv", 1.0, TotalVariation()),), "images": 4, "batch_size": 2}
    if name == "deepinversion":
        options["stages"] = (Stage(2),)
    elif name == "mixed":
        member = resolved("synthesizers", "deepinversion")(**options, stages=(Stage(2),))
        options = {"of": (member, member)}
    else:
        options |= {"steps": 2, "latent": 4, "width": 4}
    testing.check_synthesizer(cls(**options))


@pytest.mark.parametrize("name", entries("exporters"))
def test_exporters_keep_the_contract(name, tmp_path):
    if name == "onnx":
        for needed in ("onnx", "onnxscript", "onnxruntime"):
            pytest.importorskip(needed)
    testing.check_exporter(resolved("exporters", name), tmp_path)


@pytest.mark.parametrize("name", entries("quantizers"))
def test_quantizers_keep_the_contract(name, tmp_path):
    for needed in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(needed)
    testing.check_quantizer(resolved("quantizers", name), tmp_path)


def test_applications_keep_the_contract(tmp_path):
    dreamer = DeepInversion((), images=2, batch_size=2, stages=(Stage(1),))
    synthesis = types.Synthesis(dreamer, {"name": "deepinversion"})
    testing.check_application(resolved("applications", "synthesize"), tmp_path, synthesis)
    brief = Recovery(steps=1, batch_size=4, precision="float32")
    recover = resolved("applications", "recover")(sparsity=0.5, training=brief)
    testing.check_application(recover, tmp_path)


def test_teachers_sources_backends_and_trackers_keep_the_contract(tmp_path):
    testing.check_teacher(resolved("teachers", "bundled")("digits_resnet8"))
    digits = Card("digits", (1, 8, 8), (0.0,), (1.0,), 10, "test")
    testing.check_source(resolved("sources", "digits"), digits)
    testing.check_latency_backend(resolved("latency_backends", "torch-cpu")(warmup=0, repeats=3))
    testing.check_tracker(resolved("trackers", "csv"), tmp_path)


# Checks for plugin authors, on what is wrong.


class Flat(Regularizer):
    """What ``compute`` makes of a step."""

    def __init__(self, compute):
        self.compute = compute

    def __call__(self, step):
        return self.compute(step)


@pytest.mark.parametrize(
    ("compute", "message"),
    [
        (lambda step: 1.0, "Flat returned float, not a Tensor"),
        (lambda step: step.images.mean((1, 2, 3)), r"shape \(6,\); a loss has shape \(\)"),
        (lambda step: step.images.sum().detach(), "no gradient of Flat reaches the images"),
        (lambda step: step.images.sum() / 0, "Flat returned -?inf of ordinary values"),
        (lambda step: step.features.mean(), r"needs' declares \(nothing\) raised AttributeError"),
        (lambda step: step.images.data.mul_(2).sum() + step.images.sum(), "in place"),
    ],
)
def test_what_is_wrong_with_a_regularizer_is_said(compute, message):
    with pytest.raises(ContractError, match=message):
        testing.check_regularizer(Flat(compute))


def test_an_entry_with_required_options_is_to_be_given_made():
    with pytest.raises(ContractError, match=r"Flat as one of the regularizers: .*'compute'"):
        testing.check_regularizer(Flat)


class Scores(Criterion):
    def __init__(self, score, spoil=lambda model: None):
        self.score, self.spoil = score, spoil

    def __call__(self, step):
        self.spoil(step.model)
        return [self.score(group) for group in step.groups]


def ones(group: ChannelGroup) -> torch.Tensor:
    return torch.ones(group.channels)


@pytest.mark.parametrize(
    ("criterion", "message"),
    [
        (Scores(lambda group: torch.ones(3)), r"shape \(3,\) for a group of 6 channels"),
        (Scores(lambda group: ones(group) / 0), "not finite"),
        (Scores(ones, lambda model: model.train()), r"other modes \(train or eval\) in the model"),
        (Scores(ones, lambda model: model.fc.weight.data.zero_()), "other weights in the model"),
        (
            Scores(ones, lambda model: model.register_forward_hook(lambda *a: None)),
            "leaves other hooks in the model",
        ),
        (Scores(ones, lambda model: model.fc(torch.ones(8)).sum().backward()), "other gradients"),
    ],
)
def test_what_is_wrong_with_a_criterion_is_said(criterion, message):
    with pytest.raises(ContractError, match=message):
        testing.check_criterion(criterion)


def test_a_criterion_may_not_refuse_an_ordinary_network():
    class Fussy(Scores):
        def check(self, model, groups):
            raise NothingToPrune("these are not mine")

    with pytest.raises(ContractError, match=r"Fussy on two groups .*NothingToPrune: these are not"):
        testing.check_criterion(Fussy(ones))


def test_a_selection_that_skips_a_chunk_is_found():
    class Last(types.Selection):
        def __call__(self, step):
            return {chunks[0].group.name: chunks[-1].channels for chunks in step.chunks}

    with pytest.raises(ContractError, match=r"Last chose \[3\] of 'stem', where \[0, 1, 2, 3\]"):
        testing.check_selection(Last)


def test_a_synthesizer_that_draws_from_elsewhere_is_found():
    class Elsewhere(Pixels):
        def start(self, shape, generator):
            return torch.randn(shape)

    options = DeepInversion((), images=2, batch_size=2, stages=(Stage(1),))
    testing.check_synthesizer(options)
    with pytest.raises(ContractError, match=r"draw all that is random from plan\.seed"):
        testing.check_synthesizer(dataclasses.replace(options, parameterisation=Elsewhere()))


def test_a_source_of_floats_is_found():
    class Floats(ImageSource):
        def open(self, card):
            return types.StoredImages(torch.zeros(2, *card.input_size), torch.zeros(2).long())

    with pytest.raises(ContractError, match=r"torch\.float32; stored images are uint8"):
        testing.check_source(Floats)


@pytest.mark.parametrize(
    ("work", "message"),
    [
        (lambda teacher, log: None, "Does returned NoneType, not an Outcome"),
        (lambda teacher, log: types.Outcome(teacher), "Does returned the teacher: make a copy"),
        (
            lambda teacher, log: log.metrics.update(x=float("nan")) or types.Outcome(),
            "the metric 'x' should be a finite number",
        ),
        (
            lambda teacher, log: teacher.model.train() and types.Outcome(),
            "other modes",
        ),
    ],
)
def test_what_is_wrong_with_an_application_is_said(work, message, tmp_path):
    class Does(types.Application):
        def run(self, teacher, images, context):
            return work(teacher, context.log)

    with pytest.raises(ContractError, match=message):
        testing.check_application(Does(), tmp_path)


def test_an_exporter_whose_file_does_something_else_is_found(tmp_path):
    class Zero(types.Exporter):
        suffix = ".zero"

        def write(self, model, example, path, any_batch):
            path.write_text("0")

        def load(self, path):
            return lambda images: torch.zeros(len(images), 4)

    with pytest.raises(ContractError, match="its file returns other outputs than the network"):
        testing.check_exporter(Zero, tmp_path)


# Events and trackers that fail.


def test_a_listener_that_raises_is_named_once_and_told_no_more():
    heard: list[Event] = []
    notes: list[str] = []

    def broken(event: Event) -> None:
        heard.append(event)
        raise NonFiniteLoss("too\nmuch")

    emitter = EventEmitter([("the plugin dk 1.0", broken), ("mine", heard.append)], notes.append)
    first, second = RoundPruned(round=1, numbers={}), RoundPruned(round=2, numbers={})
    emitter.emit(first)
    emitter.emit(second)
    assert heard == [first, first, second]
    assert notes == [
        "the plugin dk 1.0 failed and is left out from here on: NonFiniteLoss: too much"
    ]


def test_a_note_that_becomes_an_event_does_not_go_round():
    notes: list[str] = []

    def note(text: str) -> None:
        notes.append(text)
        emitter.emit(Noted(text=text))

    def broken(event: Event) -> None:
        raise ValueError(type(event).__name__)

    emitter = EventEmitter([("one", broken), ("two", broken)], note)
    emitter.emit(Noted(text="hello"))
    assert [text.partition(" ")[0] for text in notes] == ["one", "two"]


class Noting(Tracker):
    """Notes what it is called for, and raises at some of it."""

    def __init__(self, *fails: str) -> None:
        self.fails, self.calls = fails, []

    def called(self, name: str) -> None:
        self.calls.append(name)
        if name in self.fails:
            raise OSError(f"no {name}")

    def start(self, folder, recipe, resumed):
        self.called(f"start {resumed}")

    def record(self, stage, step, numbers):
        self.called(f"record {step}")

    def finish(self, metrics):
        self.called("finish")

    def close(self):
        self.called("close")


def test_trackers_that_fail_are_named_once_and_all_are_closed():
    notes: list[str] = []
    good, early, late = Noting(), Noting("record 1", "close"), Noting("close")
    trackers = IsolatedTrackers([early, good, late], notes.append)
    trackers.start(Path(), {}, resumed=True)
    for step in (1, 2):
        trackers.record("training", step, {"loss": 1.0})
    trackers.finish({})
    trackers.close()
    trackers.close()
    assert good.calls == ["start True", "record 1", "record 2", "finish", "close"]
    assert late.calls == good.calls
    assert early.calls == ["start True", "record 1", "close"]
    assert notes == [
        "the tracker Noting failed and is left out from here on: OSError: no record 1",
        "the tracker Noting failed and is left out from here on: OSError: no close",
    ]


def test_ctrl_c_in_a_tracker_is_still_ctrl_c():
    class Stopped(Noting):
        def record(self, stage, step, numbers):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        IsolatedTrackers([Stopped()], lambda text: None).record("a", 1, {})
