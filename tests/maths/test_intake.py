"""Taking networks in: as people have them, or refused with what would help."""

from __future__ import annotations

import collections
import copy
import dataclasses

import pytest
import torch
from timm.layers import BatchNormAct2d, convert_sync_batchnorm
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations, prune, spectral_norm, weight_norm

from dreamkit.card import Card
from dreamkit.copying import copied
from dreamkit.errors import DreamkitError, TeacherMismatch
from dreamkit.synthesizers.bn_statistics import batch_norm_layers, channel_statistics
from dreamkit.synthesizers.engine import borrowed
from dreamkit.synthesizers.stage import Stage, check_stages
from dreamkit.teachers.intake import admit
from dreamkit.types import Teacher

SIZE = (3, 8, 8)
CARD = Card("net", SIZE, (0.5,) * 3, (0.25,) * 3, 4, "somewhere")


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 6, 3, padding=1)
        self.bn = nn.BatchNorm2d(6)
        self.fc = nn.Linear(6, 4)
        self.bn.running_mean += 0.1  # as after training

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(F.relu(self.bn(self.conv(x))).mean((2, 3)))


def taken(model: nn.Module, **options: object) -> tuple[nn.Module, str]:
    """Take a network in; return it and all notes as one text."""
    notes: list[str] = []
    found = admit(Teacher(model, CARD, {}), notes.append, "it", **options)  # type: ignore[arg-type]
    return found.model, "\n".join(notes)


def images() -> Tensor:
    return torch.randn(3, *SIZE, generator=torch.Generator().manual_seed(1))


def test_an_ordinary_network_is_copied_without_a_word() -> None:
    net = Net().eval()
    model, notes = taken(net)
    assert notes == ""
    assert model is not net
    assert torch.equal(model(images()), net(images()))
    assert not model._forward_hooks
    assert not model._forward_pre_hooks


Named = collections.namedtuple("Named", "loss logits")


@dataclasses.dataclass
class Output:
    features: Tensor
    logits: Tensor


@pytest.mark.parametrize(
    ("wrap", "place"),
    [
        (lambda x: (x, x * 2), r"\[0\]"),
        (lambda x: [x[:, :3], x], r"\[1\]"),
        (lambda x: {"aux": x * 2, "out": x}, "out"),
        (lambda x: Named(None, x), "logits"),
        (lambda x: Output(x * 2, x), "logits"),
        (lambda x: x[:, :, None, None], "the only number"),
    ],
)
def test_logits_are_taken_out_of_what_holds_them(wrap, place) -> None:
    class Wrapped(Net):
        def forward(self, x: Tensor) -> Tensor:
            return wrap(super().forward(x))

    torch.manual_seed(0)
    net = Wrapped().eval()
    model, notes = taken(net)
    assert torch.equal(model(images()), Net.forward(net, images()))
    assert "taken as the logits" in notes
    assert len(model._forward_hooks) == 1
    again, silent = taken(model)  # what was taken in needs no more
    assert silent == ""
    assert len(again._forward_hooks) == 1
    assert torch.equal(copy.deepcopy(again)(images()), model(images()))
    with torch.no_grad():  # with gradients the compiler's own code warns
        assert torch.equal(torch.compile(model, backend="eager")(images()), model(images()))
    model.train()
    assert model(images()).shape == (3, 4)


def test_heads_of_training_are_left_out_there() -> None:
    class Auxiliary(Net):
        def forward(self, x: Tensor) -> Tensor:
            logits = super().forward(x)
            return (logits, logits[:, :2]) if self.training else logits

    model, notes = taken(Auxiliary())
    assert model.training is False
    assert "in training mode it returns tuple ([0]: (2, 4), [1]: (2, 2)); '[0]' is taught" in notes
    model.train()
    assert model(images()).shape == (3, 4)


@pytest.mark.parametrize("where", ["always", "training"])
def test_who_writes_on_its_input_is_given_copies(where) -> None:
    class InPlace(Net):
        def forward(self, x: Tensor) -> Tensor:
            if self.training or where == "always":
                x = x.mul_(2)
            return super().forward(x)

    model, notes = taken(InPlace())
    shown = images()
    for training in (False, True):
        model.train(training)
        model(shown)
        assert torch.equal(shown, images())
    assert len(model._forward_pre_hooks) == 1
    assert ("given copies" in notes) == (where == "always")


def test_wrappers_are_taken_off_whole_and_inside() -> None:
    net = Net().eval()
    outside = nn.DataParallel(torch.compile(net, backend="eager"))
    inside = copy.deepcopy(net)
    inside.conv = nn.DataParallel(inside.conv)
    inside.fc = torch.compile(inside.fc, backend="eager")
    for wrapped in (outside, inside, torch.optim.swa_utils.AveragedModel(net)):
        model, _ = taken(wrapped)
        assert model.state_dict().keys() == net.state_dict().keys()
        assert torch.equal(model(images()), net(images()))
    assert isinstance(inside.conv, nn.DataParallel)  # the caller's own stays as it is
    own = copy.deepcopy(net)
    own.compile(backend="eager")
    assert taken(own)[0]._compiled_call_impl is None


def test_other_precisions_are_computed_in_float32() -> None:
    for kind in (torch.float16, torch.float64, torch.bfloat16):
        model, notes = taken(Net().to(kind))
        assert "computed in float32" in notes
        assert {p.dtype for p in model.parameters()} == {torch.float32}
        assert model(images()).dtype == torch.float32


def test_lazy_modules_get_their_shapes() -> None:
    lazy = nn.Sequential(nn.LazyConv2d(6, 3), nn.LazyBatchNorm2d(), nn.Flatten(), nn.LazyLinear(4))
    model, _ = taken(lazy)
    assert model[3].in_features == 6 * 6 * 6
    with pytest.raises(DreamkitError, match="its lazy modules do not take an image"):
        taken(nn.Sequential(nn.LazyLinear(3), nn.Linear(5, 4)))


def test_weights_of_inference_mode_learn() -> None:
    with torch.inference_mode():
        net = Net()
    net.tied = net.fc
    model, _ = taken(net.eval())
    model(images()).sum().backward()
    assert model.fc.weight.grad is not None
    assert model.tied is model.fc


def test_synchronised_batch_norm_runs_on_a_cpu() -> None:
    net = nn.SyncBatchNorm.convert_sync_batchnorm(Net())
    model, _ = taken(net)
    assert type(model.bn) is nn.BatchNorm2d
    assert torch.equal(model.bn.running_mean, net.bn.running_mean)
    model.train()
    assert model(images()).shape == (3, 4)


def test_synchronised_batch_norm_of_timm_keeps_its_activation() -> None:
    net = Net()
    net.bn = BatchNormAct2d(6, act_layer=nn.SiLU)
    net.bn.running_mean += 0.1
    expected = net.eval()(images())
    model, notes = taken(convert_sync_batchnorm(net))
    assert notes == ""
    assert torch.equal(model(images()), expected)
    assert model.train()(images()).isfinite().all()  # as SyncBatchNorm does on a GPU alone


def test_a_wrapped_part_of_two_names_is_unwrapped_under_both() -> None:
    net = Net()
    net.conv = nn.DataParallel(net.conv)
    net.same = net.conv
    model, _ = taken(net)
    assert isinstance(model.conv, nn.Conv2d)
    assert model.same is model.conv


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize(
    "change",
    [
        weight_norm,
        spectral_norm,
        parametrizations.weight_norm,
        parametrizations.orthogonal,
        lambda layer: prune.l1_unstructured(layer, "weight", 0.5),
    ],
)
def test_weights_that_are_computed_on_the_fly(change) -> None:
    net = Net().eval()
    net.conv = change(net.conv)
    net(images())  # leaves the computed weight there, with what made it
    model, _ = taken(net)
    assert torch.allclose(model(images()), net(images()), atol=1e-6)
    with borrowed(model, tuple(images().shape[1:])):
        leaf = images().requires_grad_()
        model(leaf).sum().backward()
    assert leaf.grad is not None
    assert torch.allclose(copied(model)(images()), net(images()), atol=1e-6)


def test_training_that_returns_nothing_and_batch_norm_that_is_never_in_eval() -> None:
    class Odd(Net):
        def train(self, mode: bool = True) -> None:  # type: ignore[override]
            super().train(True)  # whatever is asked

    net = Odd()
    model, _ = taken(net)
    before = model.bn.running_mean.clone()
    model(images())
    assert torch.equal(model.bn.running_mean, before)


@pytest.mark.parametrize("keep", [lambda x: x, lambda x: [x], lambda x: {"a": ({"b": x},)}])
def test_activations_that_a_network_keeps_do_not_hinder_a_copy(keep) -> None:
    class Keeping(Net):
        def forward(self, x: Tensor) -> Tensor:
            self.kept = keep(self.conv(x))
            return super().forward(x)

    net = Keeping().eval()
    net(images())
    kept = net.kept
    model, notes = taken(net)
    assert notes == ""
    assert net.kept is kept
    assert torch.equal(model(images()), net(images()))


def test_a_network_that_loses_an_axis_of_one_image_is_given_it_back() -> None:
    class Squeezing(Net):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x).squeeze()

    model, notes = taken(Squeezing())
    assert "for one image it returns a tensor of shape (4,), taken as (1, 4)" in notes
    assert torch.equal(model(images()[:1]), Squeezing.__base__.forward(model, images()[:1]))
    assert model(images()).shape == (3, 4)


def test_a_gradient_of_zero_is_said() -> None:
    class Rounding(Net):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x.round())

    assert "gradient of its outputs in its images is zero" in taken(Rounding())[1]


def test_other_gradients_are_refused() -> None:
    class Elsewhere(Net):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x.detach()) + torch.zeros(1, requires_grad=True)

    class Infinite(Net):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) + (0 * x).sum((1, 2, 3))[:, None].sqrt()

    with pytest.raises(TeacherMismatch, match="have no gradient in its images"):
        taken(Elsewhere())
    with pytest.raises(TeacherMismatch, match="in random images is not finite"):
        taken(Infinite())


def test_whole_numbers_and_weights_without_values_are_refused() -> None:
    class Deciding(Net):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x).argmax(1)

    with pytest.raises(TeacherMismatch, match=r"returns int64 numbers.*the argmax of"):
        taken(Deciding())
    with pytest.raises(TeacherMismatch, match="on the device 'meta'"):
        taken(Net().to("meta"))


def test_what_is_doubtful_is_said() -> None:
    class Noisy(Net):
        def forward(self, x: Tensor) -> Tensor:
            return F.dropout(super().forward(x), 0.5, training=True)

    class Softmax(Net):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x).softmax(1)

    class Broken(Net):
        def forward(self, x: Tensor) -> Tensor:
            if self.training:
                raise ValueError("no labels")
            return super().forward(x)

    class Extra(Net):
        def get_extra_state(self) -> object:
            return {"version": 3}

        def set_extra_state(self, state: object) -> None:
            pass

    half_frozen = Net()
    half_frozen.conv.requires_grad_(False)
    new = Net()
    new.bn.reset_running_stats()
    without = Net()
    without.bn = nn.BatchNorm2d(6, track_running_stats=False)
    assert "change from pass to pass" in taken(Noisy())[1]
    assert "probabilities already" in taken(Softmax())[1]
    assert "in training mode it does not run" in taken(Broken())[1]
    assert "'_extra_state' is state that is no tensor" in taken(Extra())[1]
    assert "2 of its 6 parameters are frozen (conv.weight, conv.bias)" in taken(half_frozen)[1]
    assert "statistics of a new network" in taken(new)[1]
    assert "statistics of a new network" not in taken(new, learnt=False)[1]
    partly = nn.Sequential(Net(), nn.Unflatten(1, (4, 1, 1)), nn.BatchNorm2d(4), nn.Flatten())
    assert "1 of its 2 BatchNorm layers hold the statistics of new ones" in taken(partly)[1]
    assert "store no statistics" in taken(without)[1]
    blank = Net()
    blank.bn.running_mean.zero_()
    blank.bn.running_var.zero_()
    assert (
        "1 of its 1 BatchNorm layers hold a variance of 0 in every channel (bn)" in taken(blank)[1]
    )
    card = dataclasses.replace(CARD, trained=False)  # which is said elsewhere
    notes: list[str] = []
    admit(Teacher(new, card, {}), notes.append)
    assert notes == []


def cut_off(x: Tensor, how: str) -> object:
    return {
        "detached": lambda: x.detach(),
        "nan": lambda: x * float("nan"),
        "other count": lambda: torch.cat([x, x], 1),
        "one logit": lambda: x[:, :1],
        "one logit, flat": lambda: x[:, 0].sigmoid(),
        "maps": lambda: x[:, :, None, None].expand(-1, -1, 3, 3),
        "text": lambda: "cat",
        "boxes": lambda: {"boxes": x[:, :2]},
    }[how]()


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("detached", "no gradient in its images"),
        ("nan", "not finite for random images"),
        ("other count", "write num_classes: 8"),
        ("one logit", r"one logit an image.*torch.cat\(\[-x, x\], 1\) / 2"),
        ("one logit, flat", r"one logit an image.*torch.cat\(\[-x, x\], 1\) / 2"),
        ("maps", r"a tensor of shape \(2, 4, 3, 3\) for 2 images"),
        ("text", "returns str for 2 images"),
        ("boxes", r"returns dict \(boxes: \(2, 2\)\)"),
    ],
)
def test_what_cannot_be_worked_with_is_refused(how, message) -> None:
    class Other(Net):
        def forward(self, x: Tensor) -> object:
            return cut_off(super().forward(x), how)

    with pytest.raises(TeacherMismatch, match=f"^it.*{message}"):
        taken(Other())


def test_gradients_are_not_asked_of_a_judge() -> None:
    class Judge(Net):
        @torch.inference_mode()
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x)

    with pytest.raises(TeacherMismatch, match="inference_mode"):
        taken(Judge())
    assert taken(Judge(), judge=True)[0](images()).shape == (3, 4)


def test_a_second_input_a_fixed_batch_and_weights_that_are_not_finite() -> None:
    class Two(Net):
        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return super().forward(x) + y

    class Single(Net):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x.view(1, *SIZE))

    broken, masked = Net(), Net()
    with torch.no_grad():
        broken.conv.weight[0] = torch.inf
    masked.register_buffer("mask", torch.full((2, 2), -torch.inf))
    assert taken(masked)[1] == ""
    with pytest.raises(TeacherMismatch, match="missing 1 required positional argument: 'y'"):
        taken(Two())
    with pytest.raises(TeacherMismatch, match="does not take 2 images"):
        taken(Single())
    for value, wanted in (
        ("nan", "not finite"),
        ("inf", "not finite"),
        ("-1", "negative variances"),
    ):
        bad = Net()
        bad.bn.running_var[2] = float(value)
        with pytest.raises(TeacherMismatch, match=rf"'bn.running_var' holds .*{wanted}"):
            taken(bad)
    with pytest.raises(TeacherMismatch, match=r"'conv.weight' holds values that are not finite"):
        taken(broken)


@pytest.mark.filterwarnings("ignore")
def test_quantised_networks_are_refused() -> None:
    small = torch.ao.quantization.quantize_dynamic(Net().eval(), {nn.Linear}, dtype=torch.qint8)
    with pytest.raises(TeacherMismatch, match="'fc' is quantised"):
        taken(small)


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
def test_torchscript_runs_and_has_no_layers_to_watch() -> None:
    scripted = torch.jit.trace(Net().eval(), images())
    model, _ = taken(scripted)
    assert torch.allclose(model(images()), scripted(images()))
    assert all(parameter.is_leaf for parameter in model.parameters())
    assert batch_norm_layers(model) == []


def test_a_network_that_cannot_be_copied() -> None:
    net = Net()
    net.pixels = (pixel for pixel in images())
    with pytest.raises(DreamkitError, match=r"it: Net cannot be copied .*generator"):
        taken(net)


def test_statistics_are_taken_along_the_axis_of_the_channels() -> None:
    tokens = torch.randn(5, 7, 6)  # (images, tokens, channels)
    mean, var = channel_statistics(tokens, torch.zeros(6))
    assert torch.allclose(mean, tokens.mean((0, 1)), atol=1e-6)
    assert torch.allclose(var, tokens.var((0, 1), correction=0), atol=1e-6)


def test_stages_of_a_size_that_a_network_does_not_take() -> None:
    fixed = Teacher(nn.Sequential(nn.Flatten(), nn.Linear(192, 4)), CARD, {})
    with pytest.raises(TeacherMismatch, match=r"none of \(4, 4\)") as caught:
        check_stages((Stage(3, 4), Stage(3)), fixed)
    assert caught.value.path == ("stages", 0, "size")
    check_stages((Stage(3, 4), Stage(3)), Teacher(Net().eval(), CARD, {}))
