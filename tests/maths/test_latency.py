"""Look-up tables that interpolate exactly, and a clock that leaves no trace."""

from __future__ import annotations

import json

import pytest
import torch
from timm.layers import BatchNormAct2d
from torch import nn

from dreamkit.bench.latency_tables import pruned
from dreamkit.errors import DreamkitError
from dreamkit.latency.fit import Fit
from dreamkit.latency.layer_shapes import build_layer, layer_shapes
from dreamkit.latency.processor import processor_name
from dreamkit.latency.table import LookUpTable, _slowdown
from dreamkit.latency.table_file import read_table, table_text
from dreamkit.latency.torch_eager import TorchCPU
from dreamkit.pruning.graph import ChannelGraph
from dreamkit.types import LatencyBackend, LayerShape, Timing

MAP = (6, 6)


class Bilinear(LatencyBackend):
    """A target on which a layer takes 2 + 3·c_in + 5·c_out + 7·c_in·c_out ms."""

    batch_size = 2
    folds_norms = True

    def __init__(self, name="bilinear"):
        self.name = name
        self.asked = []

    def describe(self):
        return {"device": self.name}

    def time(self, modules):
        timings = []
        for module, x in modules:
            module(x)  # the input fits the layer
            assert x.shape[0] == self.batch_size
            if isinstance(module, nn.Conv2d):
                key = (module.in_channels, module.out_channels)
            else:
                key = (module.in_features, module.out_features)
            self.asked.append(key)
            timings.append(Timing(self.exact(*key), 0.5))
        return timings

    @staticmethod
    def exact(c_in, c_out):
        return 2 + 3 * c_in + 5 * c_out + 7 * c_in * c_out


def conv(c_in, c_out, **changes):
    return LayerShape("conv", c_in, c_out, feature_map=MAP, **changes)


# --- held against networks --------------------------------------------------------------------


def test_a_fit_tells_the_line_from_the_first_networks():
    # 2 ms of calls and twice the layers' time, told from three; of the others one is 1 ms off.
    fit = Fit(layers=[1, 2, 4, 3, 5], measured=[4, 6, 10, 8, 13], known=3)
    assert (fit.scale, fit.constant) == pytest.approx((2, 2))
    assert fit.predicted == pytest.approx([4, 6, 10, 8, 12])
    assert fit.mean_error == pytest.approx(1 / 13 / 2)
    assert fit.r_squared == pytest.approx(1 - 1 / (2.5**2 + 2.5**2))


def test_prunings_lose_between_half_and_all_of_a_share(toys):
    network = nn.Sequential(nn.Conv2d(3, 20, 1), nn.ReLU(), nn.Conv2d(20, 5, 1), nn.Flatten())
    graph = ChannelGraph(network, (3, 4, 4))
    draws = torch.Generator().manual_seed(0)
    found = {pruned(graph, 0.3, 0.6, draws)[0].out_channels for _ in range(40)}
    assert found == {9, 10, 11, 12, 13, 14}, "6 to 11 of 20 go, rounded down"
    assert pruned(graph, 0.9, 0.9, draws)[0].out_channels == 2
    assert graph.model[0].out_channels == 20


# --- the table --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "shape",
    [conv(70, 100), conv(64, 100), conv(3, 17), conv(9, 9), LayerShape("linear", 67, 1000)],
    ids=lambda shape: f"{shape.kind} {shape.c_in} {shape.c_out}",
)
def test_interpolation_is_exact_for_a_bilinear_target(shape):
    expected = Bilinear.exact(shape.c_in, shape.c_out)
    assert LookUpTable(Bilinear()).predict(shape) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize(
    ("channels", "points"),
    [
        # Every count to 4, then half an octave: 6 8, 12 16, 24 32, 48 64, 96 128 ...
        (1, {1}),
        (3, {3}),
        (4, {4}),
        (5, {4, 6}),
        (8, {8}),
        (9, {8, 12}),
        (13, {12, 16}),
        (33, {32, 48}),
        (64, {64}),
        (70, {64, 96}),
        (127, {96, 128}),
    ],
)
def test_grid_points(channels, points):
    backend = Bilinear()
    LookUpTable(backend).predict(conv(4, channels))
    assert {c_out for _, c_out in backend.asked} == points
    assert {c_in for c_in, _ in backend.asked} == {4}


def test_grid_of_a_grouped_convolution_keeps_to_multiples():
    # groups 3: 33 channels are 11 units, between 8 and 12 units: 24 and 36 (not 32 and 48).
    backend = Bilinear()
    value = LookUpTable(backend).predict(conv(33, 18, groups=3))
    assert set(backend.asked) == {(24, 18), (36, 18)}
    assert value == pytest.approx(Bilinear.exact(33, 18))


def test_a_depthwise_layer_moves_along_one_axis():
    # 20 lies midway between 16 and 24: the mean of both, not the bilinear value at 20.
    backend = Bilinear()
    shape = conv(20, 20, groups=20)
    assert shape.depthwise
    value = LookUpTable(backend).predict(shape)
    assert set(backend.asked) == {(16, 16), (24, 24)}
    mean = (Bilinear.exact(16, 16) + Bilinear.exact(24, 24)) / 2
    assert value == pytest.approx(mean)


class InBlocks(Bilinear):
    """A target that computes 8 channels together, and takes twice as long where one is not full."""

    channel_block = 8

    @staticmethod
    def exact(c_in, c_out):
        twice = c_in % 8 or c_out % 8
        return (2 if twice else 1) * (5 + 3 * -(-c_in // 8)) * (1 + -(-c_out // 8))


@pytest.mark.parametrize(
    ("channels", "points"),
    [
        # Full blocks 8, 16, 24, 32, 48 ...; between them 11, 19, 27, 35, 51 ...; below one 1 to 7.
        (2, {2}),
        (5, {4, 6}),
        (7, {7}),
        (8, {8}),
        (9, {11}),
        (15, {11}),
        (17, {19}),
        (40, {32, 48}),
        (41, {35, 51}),
        (47, {35, 51}),
        (64, {64}),
    ],
)
def test_full_blocks_and_others_are_told_apart(channels, points):
    backend = InBlocks()
    LookUpTable(backend).predict(conv(8, channels))
    assert {c_out for _, c_out in backend.asked} == points


@pytest.mark.parametrize("c_in", [16, 9, 57, 64, 80, 83])
@pytest.mark.parametrize("c_out", [32, 57, 40, 130])
def test_steps_of_a_target_with_blocks_are_exact(c_in, c_out):
    table = LookUpTable(InBlocks())
    assert table.predict(conv(c_in, c_out)) == pytest.approx(InBlocks.exact(c_in, c_out))


def test_below_a_block_of_sixteen():
    # Points 8, 12 and 15: a whole block is another class. 13 lies a third of the way to 15.
    class Wide(InBlocks):
        channel_block = 16

        @staticmethod
        def exact(c_in, c_out):
            return c_out if c_out % 16 else 1

    backend = Wide()
    table = LookUpTable(backend)
    assert table.predict(conv(16, 13)) == pytest.approx(13)
    assert table.predict(conv(16, 15)) == pytest.approx(15)
    assert {c_out for _, c_out in backend.asked} == {12, 15}


@pytest.mark.parametrize("block", [2, 3])
def test_small_blocks_have_a_middle(block):
    class Narrow(InBlocks):
        channel_block = block

    backend = Narrow()
    LookUpTable(backend).predict(conv(block, 4 * block + 1))
    assert {c_out for _, c_out in backend.asked} == {4 * block + 1}


@pytest.mark.parametrize("block", [0, -8, 1.5, None, "16"])
def test_a_backend_with_an_odd_block_is_refused(block):
    class Odd(Bilinear):
        channel_block = block

    with pytest.raises(DreamkitError, match="channel_block should be"):
        LookUpTable(Odd())


def test_what_is_measured_on_a_slower_machine_is_put_on_the_first_scale():
    class Drifting(Bilinear):
        factor = 1.0

        def time(self, modules):
            return [
                Timing(self.factor * timing.median_ms, self.factor * timing.spread_ms)
                for timing in super().time(modules)
            ]

    backend = Drifting()
    table = LookUpTable(backend)
    table.prepare([conv(16, 32), conv(32, 64), conv(64, 64)])
    before = dict(table.points)
    backend.factor = 2.0
    asked = len(backend.asked)
    assert table.predict(conv(128, 64)) == pytest.approx(Bilinear.exact(128, 64))
    assert table.points[conv(128, 64)].spread_ms == pytest.approx(0.5)
    assert len(backend.asked) - asked == 4, "three of the table again, and the new one"
    assert {shape: table.points[shape] for shape in before} == before


@pytest.mark.parametrize(
    ("ratios", "expected"),
    [
        ([], 1.0),
        ([2.0], 2.0),
        ([0.95, 0.98, 1.02, 1.1], 1.0),  # noise: as many seem slower as faster
        ([1.9, 2.0, 2.0, 2.2], 2.0),
        ([0.5, 0.5, 0.6, 0.4], 0.5),
    ],
)
def test_a_slowdown_is_told_from_noise(ratios, expected):
    assert _slowdown(ratios) == pytest.approx(expected)


def test_preparing_measures_once_what_predictions_need():
    backend = Bilinear()
    calls = []
    backend.time = lambda modules: calls.append(len(modules)) or Bilinear.time(backend, modules)
    table = LookUpTable(backend)
    shapes = [conv(70, 100), conv(3, 17), LayerShape("linear", 67, 1000)]
    table.prepare(shapes)
    for shape in shapes:
        table.predict(shape)
    assert len(calls) == 1


def test_no_more_than_a_few_dozen_are_in_memory_at_once():
    backend = Bilinear()
    sizes = []
    backend.time = lambda modules: sizes.append(len(modules)) or Bilinear.time(backend, modules)
    table = LookUpTable(backend)
    table.prepare(conv(1 << i, 1 << o) for i in range(8) for o in range(8))
    assert len(table.points) == 64
    assert sizes == [32, 16 + 32], "the second beside sixteen of the first"


def test_a_linear_layer_has_no_blocks():
    backend = InBlocks()
    LookUpTable(backend).predict(LayerShape("linear", 41, 64))
    assert set(backend.asked) == {(32, 64), (48, 64)}


def test_a_point_is_measured_once():
    backend = Bilinear()
    table = LookUpTable(backend)
    table.predict(conv(70, 100))
    first = len(backend.asked)
    table.predict(conv(71, 98))
    table.predict(conv(64, 96))
    assert first == 4
    assert len(backend.asked) == 4


def test_shapes_that_differ_in_anything_are_different_points():
    backend = Bilinear()
    table = LookUpTable(backend)
    shapes = [
        conv(4, 4),
        conv(4, 4, kernel=(3, 3)),
        conv(4, 4, stride=(2, 2)),
        conv(4, 4, bias=True),
        LayerShape("conv", 4, 4, feature_map=(5, 6)),
        LayerShape("linear", 4, 4),
    ]
    table.measure([*shapes, *shapes])
    assert len(backend.asked) == 6
    assert set(table.points) == set(shapes)


def test_build_layer():
    shape = conv(6, 9, kernel=(3, 2), stride=(2, 1), padding=(1, 0), groups=3, bias=True)
    layer, x = build_layer(shape, 5)
    assert x.shape == (5, 6, 6, 6)
    # (6 + 2·1 - 3) // 2 + 1 = 3 rows, 6 - 2 + 1 = 5 columns
    assert layer(x).shape == (5, 9, 3, 5)
    assert layer.weight.shape == (9, 2, 3, 2)
    assert layer.bias is not None
    layer, x = build_layer(LayerShape("linear", 7, 2), 5)
    assert layer(x).shape == (5, 2)
    assert layer.bias is None


# --- on disk ----------------------------------------------------------------------------------


def saved(tmp_path, backend):
    table = LookUpTable(backend)
    table.predict(conv(9, 5, kernel=(3, 3), padding=(1, 1)))
    table.predict(LayerShape("linear", 3, 3, bias=True))
    path = tmp_path / "lut.json"
    path.write_text(table_text(table))
    return table, path


def test_round_trip(tmp_path):
    table, path = saved(tmp_path, Bilinear())
    backend = Bilinear()
    again = read_table(path, backend)
    assert again.points == table.points
    assert len(again.points) == 5
    again.predict(conv(9, 5, kernel=(3, 3), padding=(1, 1)))
    assert backend.asked == [], "nothing is measured twice"


def test_a_point_stands_on_a_line_of_its_own(tmp_path):
    table, path = saved(tmp_path, Bilinear())
    lines = path.read_text().splitlines()
    points = [json.loads(line.rstrip(",")) for line in lines if '"kind"' in line]
    assert points == json.loads(path.read_text())["points"]
    # 9 lies between 8 and 12, 5 between 4 and 6; a table that grew otherwise reads the same.
    assert [(p["kind"], p["c_in"], p["c_out"]) for p in points] == [
        ("conv", 8, 4),
        ("conv", 8, 6),
        ("conv", 12, 4),
        ("conv", 12, 6),
        ("linear", 3, 3),
    ]
    table.points = dict(reversed(table.points.items()))
    assert table_text(table) == path.read_text()
    assert json.loads(table_text(LookUpTable(Bilinear())))["points"] == []


def changed(path, change):
    data = json.loads(path.read_text())
    change(data)
    path.write_text(json.dumps(data))


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda data: data.update(format=2), "format 2, this version reads 3; delete it"),
        (lambda data: data["points"][0].update(median_ms=0), "a layer takes 0.0 ms"),
        (lambda data: data["points"][0].update(median_ms=float("nan")), "a layer takes nan ms"),
        (lambda data: data["points"][0].update(median_ms=None), "float"),
        (lambda data: data["points"][0].update(feature_map=[]), "a conv on"),
        (lambda data: data["points"][0].update(c_in="many"), "c_in"),
    ],
)
def test_a_table_whose_content_is_wrong(tmp_path, change, reason):
    _, path = saved(tmp_path, Bilinear())
    changed(path, change)
    assert read_table(path, Bilinear()).points == {}
    with pytest.raises(DreamkitError, match=reason):
        read_table(path, Bilinear(), strict=True)


def test_a_table_of_another_target_is_not_used(tmp_path):
    _, path = saved(tmp_path, Bilinear("old machine"))
    notes = []
    assert read_table(path, Bilinear("new machine"), note=notes.append).points == {}
    (told,) = notes
    assert "was measured on another target (" in told
    assert "new machine here): its layers are measured again" in told


@pytest.mark.parametrize("text", [None, "{", "[]", '{"format": 99}', '{"format": 1}'], ids=repr)
def test_a_table_that_cannot_be_read_is_empty(tmp_path, text):
    path = tmp_path / "lut.json"
    if text is not None:
        path.write_text(text)
    assert read_table(path, Bilinear()).points == {}


# --- shapes of a model ------------------------------------------------------------------------


def test_layer_shapes_by_hand(toys):
    three = {"kernel": (3, 3), "padding": (1, 1)}
    assert layer_shapes(toys.depthwise(), (3, 8, 10)) == {
        "conv1": LayerShape("conv", 3, 4, **three, feature_map=(8, 10)),
        "bn1": LayerShape("norm", 4, 4, feature_map=(8, 10)),
        "depthwise": LayerShape("conv", 4, 4, **three, groups=4, feature_map=(8, 10)),
        "bn2": LayerShape("norm", 4, 4, feature_map=(8, 10)),
        "pointwise": LayerShape("conv", 4, 6, bias=True, feature_map=(8, 10)),
        "fc": LayerShape("linear", 6, 3, bias=True),
    }


def test_layer_shapes_see_the_input_of_each_layer(toys):
    shapes = layer_shapes(toys.flattened(), (3, 4, 4))
    assert list(shapes) == ["conv1", "fc1", "fc2"], "in forward order"
    assert shapes["conv1"].stride == (2, 2)
    assert shapes["conv1"].feature_map == (4, 4)
    assert (shapes["fc1"].c_in, shapes["fc1"].c_out) == (16, 5)


def test_a_norm_is_timed_with_the_activation_module_that_comes_next():
    model = nn.Sequential(
        nn.Conv2d(2, 4, 1),
        nn.BatchNorm2d(4),
        nn.ReLU6(),
        BatchNormAct2d(4),
        nn.BatchNorm2d(4),
        nn.Conv2d(4, 2, 1),
        nn.SiLU(),
    )
    shapes = layer_shapes(model.eval(), (2, 5, 6))
    norms = {name: shape.activation for name, shape in shapes.items() if shape.kind == "norm"}
    assert norms == {"1": "ReLU6", "3": "ReLU", "4": ""}
    built, x = build_layer(shapes["1"], 3)
    assert [type(part) for part in built] == [nn.BatchNorm2d, nn.ReLU6]
    assert x.shape == (3, 4, 5, 6)
    without = shapes["1"].without("out", 3)
    assert (without.c_in, without.c_out, without.params, without.flops) == (1, 1, 2, 0)


def test_norms_count_where_the_target_does_not_fold_them():
    model = nn.Sequential(nn.Conv2d(2, 4, 1), nn.BatchNorm2d(4)).eval()
    apart, folded = LookUpTable(TorchCPU(warmup=0, repeats=3)), LookUpTable(Bilinear())
    assert list(apart.shapes(model, (2, 5, 6))) == ["0", "1"]
    assert list(folded.shapes(model, (2, 5, 6))) == ["0"]
    assert apart.predict(apart.shapes(model, (2, 5, 6))["1"]) > 0


def test_padding_given_as_a_word():
    # 'same' for a kernel of 3 is one pixel each way, 2 for one of 5; 'valid' is none.
    model = nn.Sequential(
        nn.Conv2d(2, 2, 3, padding="same"),
        nn.Conv2d(2, 2, (5, 3), padding="same"),
        nn.Conv2d(2, 2, 3, padding="valid"),
    )
    shapes = layer_shapes(model, (2, 8, 8))
    assert [shape.padding for shape in shapes.values()] == [(1, 1), (2, 1), (0, 0)]


def test_layer_shapes_leaves_the_model_as_it_was(toys):
    model = toys.two_bn().train()
    before = toys.state(model)
    layer_shapes(model, (3, 8, 8))
    toys.assert_same_state(model, before)
    with pytest.raises(RuntimeError, match="channels"):
        layer_shapes(model, (2, 8, 8))
    toys.assert_same_state(model, before)


# --- the clock --------------------------------------------------------------------------------


class Slow(nn.Module):
    """Takes some milliseconds, and notes the threads and mode it ran with."""

    def __init__(self, ms, threads):
        super().__init__()
        self.ms = ms
        self.threads = threads
        self.calls = 0

    def forward(self, x):
        import time

        self.calls += 1
        self.threads.add((torch.get_num_threads(), self.training, torch.is_grad_enabled()))
        time.sleep(self.ms / 1e3)
        return x


def test_one_timing_for_each_module_in_order():
    seen = set()
    modules = [(Slow(ms, seen), torch.zeros(1)) for ms in (6, 1, 3)]
    timings = TorchCPU(threads=2, warmup=1, repeats=5).time(modules)
    # Sleeping takes no less than it was told to; a busy machine takes longer.
    assert timings[0].median_ms >= 6
    assert timings[1].median_ms >= 1
    assert timings[2].median_ms >= 3
    assert timings[0].median_ms > timings[1].median_ms
    assert all(timing.spread_ms >= 0 for timing in timings)
    assert seen == {(2, False, False)}, "pinned threads, eval mode, no gradients"
    # Two samples to settle on the calls of one (one, as each lasts over 0.5 ms), then 1 + 5; and
    # before every sample a call that is not timed.
    assert [module.calls for module, _ in modules] == [16, 16, 16]


def test_threads_and_modes_are_restored(toys):
    before = torch.get_num_threads()
    model = toys.two_bn().train()
    model.bn1.eval()
    state = toys.state(model)
    (timing,) = TorchCPU(threads=before + 1, warmup=0, repeats=3).time(
        [(model, torch.zeros(1, 3, 8, 8))]
    )
    assert timing.median_ms > 0
    assert torch.get_num_threads() == before
    toys.assert_same_state(model, state)


def test_threads_and_modes_are_restored_after_an_exception(toys):
    before = torch.get_num_threads()
    model = toys.two_bn().train()
    state = toys.state(model)
    with pytest.raises(RuntimeError, match="channels"):
        TorchCPU(threads=before + 1).time([(model, torch.zeros(1, 2, 8, 8))])
    assert torch.get_num_threads() == before
    toys.assert_same_state(model, state)


def test_describe_names_what_the_figures_hold_for():
    stated = TorchCPU(batch_size=4, threads=3).describe()
    assert stated == {
        "device": processor_name(),
        "runtime": f"torch {torch.__version__} eager",
        "dtype": "float32",
        "threads": "3",
        "batch_size": "4",
    }
    assert TorchCPU(threads=1).describe() != TorchCPU(threads=2).describe()
    assert TorchCPU().describe()["threads"] == str(torch.get_num_threads())


def test_the_real_clock_feeds_the_table():
    table = LookUpTable(TorchCPU(warmup=0, repeats=3))
    assert table.predict(conv(3, 4, kernel=(3, 3))) > 0


class Padded(nn.Conv2d):
    """A convolution that pads by a layer of its own, e.g. one row more at the end."""

    def __init__(self, c_in, c_out, kernel, stride, pad):
        super().__init__(c_in, c_out, kernel, stride)
        self.pad = nn.ZeroPad2d(pad)

    def forward(self, x):
        return super().forward(self.pad(x))


@pytest.mark.parametrize(
    ("kernel", "stride", "pad", "padding", "size"),
    [
        (3, 2, (0, 1, 0, 1), (1, 1), (4, 5)),
        (5, 1, (2, 2, 2, 2), (2, 2), (8, 10)),
        (5, 2, (1, 2, 0, 0), (0, 2), (2, 5)),
        (1, 1, (0, 0, 0, 0), (0, 0), (8, 10)),
    ],
)
def test_a_convolution_with_a_layer_of_its_own_is_counted(kernel, stride, pad, padding, size):
    shapes = layer_shapes(nn.Sequential(Padded(3, 4, kernel, stride, pad)), (3, 8, 10))
    assert list(shapes) == ["0"]
    assert (shapes["0"].padding, shapes["0"].output_size) == (padding, size)
    assert shapes["0"].flops == 3 * 4 * kernel**2 * size[0] * size[1]


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:`torch.jit.script` is:FutureWarning")
def test_what_is_scripted_has_no_shape():
    scripted = torch.jit.script(nn.Conv2d(4, 4, 1))
    shapes = layer_shapes(nn.Sequential(nn.Conv2d(3, 4, 3), scripted), (3, 8, 8))
    assert list(shapes) == ["0"]
