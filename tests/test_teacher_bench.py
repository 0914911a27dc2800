"""The benchmark of teachers: its rows and reasons, its file, its time limit, its output."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import math
import os
import re
import time
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, ClassVar, Literal

import pytest
import torch
from rich.console import Console

from dreamkit.bench import child
from dreamkit.bench import measure as measuring
from dreamkit.bench import sweep as sweeping
from dreamkit.bench.child import measure_in_child
from dreamkit.bench.measure import Task, explain, measure
from dreamkit.bench.results import Results, Settings, TeacherRow, read_results
from dreamkit.bench.select import resolve_settings, select
from dreamkit.bench.show import draw, show
from dreamkit.bench.sweep import sweep
from dreamkit.card import Card
from dreamkit.errors import DreamkitError, TeacherMismatch, WeightsUnavailable
from dreamkit.plugins import build_registries
from dreamkit.registry import Registries
from dreamkit.synthesizers.labels import deal_labels
from dreamkit.teachers.bundled import BundledTeacher
from dreamkit.teachers.named import load_teacher
from dreamkit.types import BatchPlan, Teacher

Invoke = Callable[..., Any]
DIGITS = ("bundled", "digits_resnet8")
SETTINGS = Settings("default", 4, 3, None, "cpu", {"device": "a processor"})
NULL = dataclasses.replace(SETTINGS, weights="null")
LATER = 4e9


class Listed(BundledTeacher):
    """A source of teachers with tags, as timm's."""

    @classmethod
    def known_models(cls, pretrained: bool) -> list[str]:
        names = ["net18", "net50", "wide50"] if pretrained else ["net18", "net50", "net99"]
        return [*names, "net18.a1", "net18.a2"]


@pytest.fixture(scope="module")
def registries() -> Registries:
    found = build_registries()
    found["teachers"].register("listed", Listed, "test")
    return found


def quiet() -> Console:
    return Console(file=io.StringIO(), width=100)


def told(task: Task, deadline: float = LATER) -> TeacherRow:
    """Measure in this process."""
    row = TeacherRow(task.source, task.model)

    def take(known: dict[str, Any]) -> None:
        known.pop("stage", None)
        row.take(known)

    measure(task, deadline, take)
    return row


# --- what is chosen


@pytest.mark.parametrize(
    ("globs", "weights", "expected"),
    [
        ([], "default", ["net18", "net50", "wide50"]),
        ([], "null", ["net18", "net50", "net99"]),
        (["*50", "net18"], "default", ["net18", "net50", "wide50"]),
        (["net18.*"], "default", ["net18.a1", "net18.a2"]),
    ],
)
def test_globs(
    registries: Registries,
    globs: list[str],
    weights: Literal["default", "null"],
    expected: list[str],
) -> None:
    chosen = select(registries, ["listed"], globs, weights)
    assert chosen == [("listed", name) for name in expected]
    assert select(registries, ["listed"], globs, weights, limit=1) == chosen[:1]


def test_built_in_sources_list_their_models(registries: Registries) -> None:
    assert select(registries, ["bundled"], [], "default") == [
        ("bundled", "cifar10_convnext"),
        ("bundled", "cifar10_resnet20"),
        ("bundled", "cifar10_vit"),
        ("bundled", "digits7_resnet8"),
        ("bundled", "digits_convnext"),
        DIGITS,
        ("bundled", "digits_vit"),
    ]
    everything = select(registries, ["timm", "torchvision"], ["resnet18", "resnet18.a1_*"], "null")
    assert everything == [
        ("timm", "resnet18"),
        ("timm", "resnet18.a1_in1k"),
        ("torchvision", "resnet18"),
    ]
    weighted = set(select(registries, ["timm"], [], "default"))
    assert weighted < set(select(registries, ["timm"], [], "null"))


@pytest.mark.parametrize(
    ("sources", "globs", "message"),
    [
        (["listed"], ["nt18"], "no model of listed matches 'nt18'; did you mean 'net18'?"),
        (["listed"], ["*18", "x*"], "matches 'x*'"),
        (["listd"], [], "no source 'listd' among the teachers; did you mean 'listed'?"),
        (["cifar"], [], "no model of cifar comes with weights; --weights null measures"),
        (["checkpoint"], [], "the source 'checkpoint' has no list of models"),
    ],
)
def test_a_choice_of_nothing(
    registries: Registries, sources: list[str], globs: list[str], message: str
) -> None:
    with pytest.raises(DreamkitError, match=re.escape(message)):
        select(registries, sources, globs, "default")


def test_settings_name_the_machine(registries: Registries) -> None:
    settings = resolve_settings(registries, "default", 8, 200, None, "cpu")
    assert (settings.device, settings.machine["batch_size"]) == ("cpu", "1")
    assert settings.machine["threads"] == str(torch.get_num_threads())
    with pytest.raises(DreamkitError, match="--verifier"):
        resolve_settings(registries, "null", 8, 200, "bundled:digits_resnet8", "cpu")


# --- what is measured


@pytest.fixture(scope="module")
def digits() -> Teacher:
    return load_teacher(build_registries(), *DIGITS, "default")


def test_every_figure_of_a_teacher(monkeypatch: pytest.MonkeyPatch, digits: Teacher) -> None:
    # The same model under another name: it agrees with itself at its own size.
    other = dataclasses.replace(digits.card, weights_sha256="another")
    verifier = Teacher(digits.model, other, digits.builder)
    monkeypatch.setattr(measuring, "load_network", lambda *arguments: (verifier, None))
    settings = dataclasses.replace(SETTINGS, steps=60, verifier="x:y")
    row = told(Task(*DIGITS, settings, other))
    assert row.reasons == []
    assert row.cut_short is None
    assert (row.input_size, row.bn_layers, row.params, row.flops) == ([1, 8, 8], 9, 77754, 774272)
    assert row.seconds_per_step is not None
    assert row.images_per_second == pytest.approx(4 / (60 * row.seconds_per_step))
    assert row.latency_ms is not None
    assert row.latency_ms > 0
    assert row.memory_bytes is not None
    assert row.memory_bytes > 1e6
    assert row.statistics_distance is not None
    assert row.statistics_distance > 0
    assert row.cross_model_accuracy == 1.0
    assert row.precision in {"float32", "bfloat16"}


def test_random_weights_have_no_quality() -> None:
    row = told(Task(*DIGITS, NULL))
    assert row.seconds_per_step is not None
    assert (row.statistics_distance, row.cross_model_accuracy, row.reasons) == (None, None, [])


def changed(card: Card, **changes: Any) -> Card:
    return dataclasses.replace(card, **{"weights_sha256": "another", **changes})


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"weights_sha256": None}, "the verifier is this teacher"),
        ({"num_classes": 7}, "the verifier has 7 classes, not 10"),
        (
            {"input_size": (3, 8, 8), "mean": (0.5,) * 3, "std": (0.5,) * 3},
            "the verifier takes 3 channels",
        ),
    ],
)
def test_a_verifier_that_cannot_tell(digits: Teacher, change: dict[str, Any], reason: str) -> None:
    if "weights_sha256" in change:
        change = {"weights_sha256": digits.card.weights_sha256}
    settings = dataclasses.replace(SETTINGS, verifier="bundled:digits_resnet8")
    row = told(Task(*DIGITS, settings, changed(digits.card, **change)))
    assert row.reasons == [f"no cross-model accuracy: {reason}"]
    assert row.cross_model_accuracy is None
    assert row.statistics_distance is not None


def test_a_verifier_of_another_size_sees_the_dreams_scaled(
    monkeypatch: pytest.MonkeyPatch, digits: Teacher
) -> None:
    seen = []

    class Verifier(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            seen.append(x.shape)
            said = torch.cat([dealt[:2], (dealt[2:] + 1) % 10])  # the first half is right
            return torch.eye(10)[said][: len(x)]

    dealt = deal_labels("balanced", digits.card, 0, BatchPlan(0, 0, 4, 0), torch.Generator())
    card = changed(digits.card, input_size=(1, 20, 12))
    verifier = Teacher(Verifier(), card, {})
    monkeypatch.setattr(measuring, "load_network", lambda *arguments: (verifier, None))
    row = told(Task(*DIGITS, dataclasses.replace(SETTINGS, verifier="x:y"), card))
    assert (seen[-1], row.cross_model_accuracy) == ((4, 1, 20, 12), 0.5)


def test_no_dreaming_is_begun_that_would_not_end() -> None:
    row = told(Task(*DIGITS, SETTINGS), deadline=0)
    assert row.seconds_per_step is not None
    assert row.statistics_distance is None
    assert row.cut_short == "time"
    assert re.fullmatch(
        "dreaming 3 steps takes about .*, and .* of its time is left", row.reasons[0]
    )


def test_without_batch_norm_it_is_inverted_all_the_same() -> None:
    row = told(Task("torchvision", "squeezenet1_0", NULL))
    assert (row.bn_layers, row.params, row.reasons) == (0, 1248424, [])
    assert row.flops is not None
    assert row.latency_ms is not None
    assert row.seconds_per_step is not None


def test_a_stage_that_fails_leaves_the_next_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> Any:
        raise RuntimeError("no\nsuch trace")

    monkeypatch.setattr(measuring, "count", fail)
    row = told(Task(*DIGITS, NULL))
    assert row.reasons == ["counting its FLOPs: RuntimeError: no such trace"]
    assert row.flops is None
    assert row.images_per_second is not None


@pytest.mark.parametrize(
    ("error", "cut_short"),
    [
        (WeightsUnavailable("no network.\n  1. Find one"), "weights"),
        (TeacherMismatch("no logits. Do this"), None),
        (ValueError("odd"), None),
    ],
)
def test_a_teacher_that_does_not_load(
    monkeypatch: pytest.MonkeyPatch, error: Exception, cut_short: str | None
) -> None:
    def fail(*_: Any) -> Any:
        raise error

    monkeypatch.setattr(measuring, "load_teacher", fail)
    row = told(Task(*DIGITS, SETTINGS))
    assert row == TeacherRow(*DIGITS, reasons=[explain(error)], cut_short=row.cut_short)
    assert row.cut_short == cut_short


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (WeightsUnavailable("no network.\n  1. Find one"), "no network"),
        (TeacherMismatch("no logits. Do this"), "no logits"),
        (DreamkitError("one. Two"), "one. Two"),
        (torch.OutOfMemoryError("CUDA"), "out of memory (CUDA)"),
        (RuntimeError("can't allocate memory"), "out of memory (can't allocate memory)"),
        (KeyError("x"), "KeyError: 'x'"),
    ],
)
def test_reasons(error: Exception, reason: str) -> None:
    assert explain(error) == reason


# --- its process


def test_a_process_is_stopped_when_its_time_is_up() -> None:
    start = time.perf_counter()
    row = measure_in_child(Task(*DIGITS, SETTINGS), 0.2)
    assert time.perf_counter() - start < 5
    assert row.reasons == ["ran out of time (0.2 s) while starting"]
    assert (row.cut_short, row.limit_seconds) == ("time", 0.2)


class Pretended:
    """Stands for a process: it says something, and then hangs or has died."""

    says: ClassVar[Sequence[dict[str, Any] | None]] = ()
    hangs: ClassVar[bool] = False
    exitcode: ClassVar[int] = -9

    def __init__(self, target: Any, args: tuple[Any, ...], daemon: bool) -> None:
        # A process has a copy of the pipe's end, which its parent closes.
        self.sender = Connection(os.dup(args[-1].fileno()), readable=False)

    def start(self) -> None:
        for known in self.says:
            self.sender.send(known)
        if not self.hangs:
            self.sender.close()

    def kill(self) -> None:
        with contextlib.suppress(OSError):
            self.sender.close()

    def join(self, timeout: float | None = None) -> None: ...


@pytest.fixture
def pretended(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    def pretend(says: Sequence[dict[str, Any] | None], hangs: bool, exitcode: int = -9) -> None:
        context = child.multiprocessing.get_context("spawn")
        for name, value in {"says": says, "hangs": hangs, "exitcode": exitcode}.items():
            monkeypatch.setattr(Pretended, name, value)
        monkeypatch.setattr(type(context), "Process", Pretended)

    return pretend


def test_a_teacher_that_hangs_keeps_what_it_told(pretended: Callable[..., None]) -> None:
    pretended([{"params": 5}, {"stage": "inverting it"}, {"reason": "first"}], hangs=True)
    row = measure_in_child(Task(*DIGITS, SETTINGS), 0.1)
    assert row.params == 5
    assert row.reasons == ["first", "ran out of time (0.1 s) while inverting it"]
    assert row.cut_short == "time"
    assert 0.1 <= row.seconds < 5


@pytest.mark.parametrize(
    ("exitcode", "death"),
    [
        (-9, "its process was ended by SIGKILL, most likely for lack of memory,"),
        (-11, "its process was ended by SIGSEGV"),
        (1, "its process ended with status 1"),
    ],
)
def test_a_teacher_that_dies_keeps_what_it_told(
    pretended: Callable[..., None], exitcode: int, death: str
) -> None:
    pretended([{"params": 5, "stage": "loading it"}], hangs=False, exitcode=exitcode)
    row = measure_in_child(Task(*DIGITS, SETTINGS), 9)
    assert (row.params, row.reasons) == (5, [f"{death} while loading it"])
    assert row.cut_short is None


def test_a_process_that_is_slow_to_end_has_not_died(pretended: Callable[..., None]) -> None:
    pretended([{"params": 5}, None], hangs=True)
    assert measure_in_child(Task(*DIGITS, SETTINGS), 9).reasons == []


# --- the file


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Pretend to measure; the names of what was."""
    names: list[str] = []

    def pretend(task: Task, limit_seconds: float) -> TeacherRow:
        names.append(task.model)
        if task.model == "interrupt":
            raise KeyboardInterrupt
        row = TeacherRow(task.source, task.model, params=7, limit_seconds=limit_seconds)
        if task.model in {"time", "weights"}:
            row.take({"cut_short": task.model, "reason": "none"})
        return row

    monkeypatch.setattr(sweeping, "measure_in_child", pretend)
    return names


def swept(
    registries: Registries, path: Path, models: Sequence[str], limit: float = 60, **changes: Any
) -> list[str]:
    settings = dataclasses.replace(SETTINGS, **changes)
    chosen = [("listed", model) for model in models]
    rows = sweep(registries, chosen, settings, path, limit, quiet())
    return [row.model for row in rows]


def test_what_is_there_is_not_measured_again(
    registries: Registries, tmp_path: Path, measured: list[str]
) -> None:
    path = tmp_path / "new" / "bench.json"
    assert swept(registries, path, ["a", "b"]) == ["a", "b"]
    assert swept(registries, path, ["c", "b"]) == ["b", "c"]
    assert measured == ["a", "b", "c"]
    rows = json.loads(path.read_text())["teachers"]
    assert [row["model"] for row in rows] == ["a", "b", "c"]
    assert set(rows[0]) == {f.name for f in dataclasses.fields(TeacherRow)}


def test_what_was_cut_short_is_measured_again_where_that_may_help(
    registries: Registries, tmp_path: Path, measured: list[str]
) -> None:
    path = tmp_path / "bench.json"
    for limit in (60, 60, 50, 61):
        swept(registries, path, ["time", "weights"], limit)
    assert measured == ["time", *["weights"] * 3, "time", "weights"]
    assert len(read_results(path, SETTINGS).teachers) == 2


def test_an_interruption_keeps_what_was_finished(
    registries: Registries, tmp_path: Path, measured: list[str]
) -> None:
    path = tmp_path / "bench.json"
    with pytest.raises(KeyboardInterrupt):
        swept(registries, path, ["a", "interrupt", "b"])
    assert [row.model for row in read_results(path, SETTINGS).teachers] == ["a"]


def test_other_settings_are_refused(
    registries: Registries, tmp_path: Path, measured: list[str]
) -> None:
    path = tmp_path / "bench.json"
    swept(registries, path, ["a"])
    before = path.read_bytes()
    with pytest.raises(DreamkitError) as caught:
        swept(registries, path, ["b"], steps=9, machine={"device": "another"})
    assert str(caught.value) == (
        f"{path} holds figures of other settings (machine's device a processor there, another now; "
        "steps 3 there, 9 now): use the same again, or name another file with --json"
    )
    assert (path.read_bytes(), measured) == (before, ["a"])


@pytest.mark.parametrize("content", ["", "{", "[]", '{"settings": {}}', "\0", '{"teachers": 1}'])
def test_a_damaged_file_is_refused(tmp_path: Path, content: str) -> None:
    path = tmp_path / "bench.json"
    path.write_text(content)
    with pytest.raises(DreamkitError, match=r"bench\.json is damaged, or no .* with --json"):
        read_results(path, SETTINGS)
    assert path.read_text() == content


def test_a_file_that_cannot_be(tmp_path: Path, registries: Registries) -> None:
    with pytest.raises(DreamkitError, match="cannot be read"):
        read_results(tmp_path, SETTINGS)
    (tmp_path / "file").touch()
    with pytest.raises(DreamkitError, match=r"file.* cannot be"):
        swept(registries, tmp_path / "file" / "bench.json", ["a"])


def test_a_wrong_verifier_is_found_before_anything_is_measured(
    registries: Registries, tmp_path: Path, measured: list[str]
) -> None:
    for verifier in ("digits_resnet8", "bundled:digits"):
        with pytest.raises(DreamkitError, match=verifier):
            swept(registries, tmp_path / "bench.json", ["a"], verifier=verifier)
    assert measured == []


# --- what is shown


@pytest.mark.parametrize(
    ("known", "axis"),
    [
        ({"cross_model_accuracy": 0.5, "statistics_distance": 3.0}, "cross-model accuracy"),
        ({"statistics_distance": 3.0, "flops": 7}, "distance of statistics"),
        ({"flops": 7, "params": 6}, "FLOPs of an image (quality is not known)"),
        ({"params": 6}, "parameters (quality is not known)"),
    ],
)
def test_the_plot(tmp_path: Path, known: dict[str, Any], axis: str) -> None:
    path = tmp_path / "bench.json"
    rows = [
        TeacherRow("bundled", "small", images_per_second=4.0, **known),
        TeacherRow("bundled", "large", images_per_second=0.01, **known),
        TeacherRow("timm", "unknown"),
    ]
    path.write_text(json.dumps(dataclasses.asdict(Results(SETTINGS, rows))))
    picture = draw(path, SETTINGS)
    assert picture == tmp_path / "bench.svg"
    text = picture.read_text()
    assert text.startswith("<svg")
    assert axis in text
    assert "seconds per image (batches of 4, 3 steps)" in text
    assert ">small<" in text
    assert ">unknown<" not in text
    draw(path, SETTINGS)
    assert picture.read_text() == text


def test_no_plot_of_nothing(tmp_path: Path) -> None:
    assert draw(tmp_path / "bench.json", SETTINGS) is None


def test_the_table_fits_a_narrow_terminal() -> None:
    rows = [
        TeacherRow(*DIGITS, None, 9, 77754, 774272, 0.5, None, 0.01, 4.0, 2**30, 3.0, 0.75),
        TeacherRow("timm", "vit", params=5, reasons=["no [BatchNorm]", "late"]),
    ]
    console = Console(file=io.StringIO(), width=80)
    show(rows, SETTINGS, console)
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert "…" not in text
    assert "77.8 k" in text
    assert "timm/vit: no [BatchNorm]; late\n" in text
    assert "images/s = batch size / (steps * seconds per step)" in text
    show(rows[1:], SETTINGS, console)
    assert "FLOPs" not in console.file.getvalue()[len(text) :].partition("timm/vit")[0]  # type: ignore[attr-defined]


def test_the_command(invoke: Invoke, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "bench.json"
    command = ("bench", "teachers", "--source", "bundled", "--json", path, "--steps", "2")
    command += ("--models", "digits_resnet*")
    code, out, err = invoke(*command, "--batch-size", "2", "--device", "cpu")
    assert (code, err) == (0, "")
    assert out.startswith("[1/1] bundled/digits_resnet8: 9 BN layers, 77.8 k parameters, 774 k FL")
    assert out.endswith(f"results: {path}\nplot: {tmp_path / 'bench.svg'}\n")
    assert (tmp_path / "bench.svg").is_file()
    content = json.loads(path.read_text())
    assert content["settings"]["batch_size"] == 2
    (row,) = content["teachers"]
    assert (row["model"], row["params"], row["reasons"]) == ("digits_resnet8", 77754, [])
    assert row["images_per_second"] == pytest.approx(2 / (2 * row["seconds_per_step"]))
    assert math.isfinite(row["statistics_distance"])
    assert row["cross_model_accuracy"] is None

    monkeypatch.delattr(sweeping, "measure_in_child")
    code, out, err = invoke(*command, "--batch-size", "2", "--device", "cpu")
    assert (code, err) == (0, "")
    assert out.startswith(f"resuming: 1 of 1 teachers kept from {path}\n")
    assert "77.8 k" in out
    code, _, err = invoke(*command, "--batch-size", "3", "--device", "cpu")
    assert code == 2
    assert err.startswith(f"error: {path} holds figures of other settings (batch_size 2 there, 3 ")


def test_a_network_of_the_users_own(invoke: Invoke, tmp_path: Path) -> None:
    (tmp_path / "nets.py").write_text(
        "import torch\nfrom dreamkit.teachers.small_resnet import SmallResNet\n\n\n"
        "def make():\n    torch.manual_seed(0)\n    return SmallResNet(8, 10, 1)\n",
        encoding="utf-8",
    )
    recipe = tmp_path / "own.yaml"
    recipe.write_text(
        "name: own\n"
        f"teacher: {{source: checkpoint, builder: '{tmp_path}/nets.py:make', mean: [0.5],\n"
        "  std: [1], input_size: [1, 8, 8], num_classes: 10}\n"
        # The rest of a recipe is not looked at.
        "application: {name: nothing_like_it}\n",
        encoding="utf-8",
    )
    results = tmp_path / "r.json"
    options = ("--steps", "1", "--batch-size", "2", "--device", "cpu", "--json", str(results))
    command = ("bench", "teachers", "--recipe", str(recipe), *options)
    code, _, err = invoke(*command, "--verifier", str(recipe))
    assert code == 0, err
    (row,) = json.loads(results.read_text())["teachers"]
    assert (row["source"], row["model"]) == ("recipe", str(recipe))
    assert row["seconds_per_step"] > 0
    assert row["reasons"] == ["no cross-model accuracy: the verifier is this teacher"]
    code, _, err = invoke(*command, "--set", "teacher.num_classes=4", "--verifier", str(recipe))
    assert code == 0, err
    other = json.loads(results.read_text())["teachers"][1]
    assert other["model"] == f"{recipe} --set teacher.num_classes=4"
    assert "write num_classes: 10" in other["reasons"][0]


def test_an_interrupted_command(
    invoke: Invoke, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(task: Task, limit_seconds: float) -> TeacherRow:
        raise KeyboardInterrupt

    monkeypatch.setattr(sweeping, "measure_in_child", interrupt)
    code, out, err = invoke(
        *("bench", "teachers", "--source", "bundled", "--json", tmp_path / "b.json")
    )
    assert (code, out) == (130, "")
    assert err == "interrupted: finished teachers are kept, the same command goes on\n"


def test_a_wrong_choice_on_the_command_line(invoke: Invoke) -> None:
    code, out, err = invoke("bench", "teachers", "--source", "bundled", "--models", "digit_resnet8")
    assert (code, out) == (2, "")
    assert err == (
        "error: no model of bundled matches 'digit_resnet8'; did you mean 'digits_resnet8'?\n"
    )


@pytest.mark.parametrize("flag", ["--help", "-h"])
def test_help_says_what_images_a_second_are(invoke: Invoke, flag: str) -> None:
    code, out, err = invoke("bench", "teachers", flag)
    assert (code, err) == (0, "")
    assert "batch size / (steps × seconds per step)" in " ".join(out.split())
    assert "dreamkit bench teachers --source bundled" in out
