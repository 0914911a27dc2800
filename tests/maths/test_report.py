"""Reports: pictures to the pixel, records that survive a crash, a page that needs nothing else."""

from __future__ import annotations

import csv
import html
import io
import json
import re
import time
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
from rich.console import Console

from dreamkit.errors import OptionError, RunDirectoryError
from dreamkit.report import progress
from dreamkit.report.figures import curves, grid
from dreamkit.report.html import render
from dreamkit.report.run_log import FileLog, MemoryLog, read_records
from dreamkit.report.tables import dreams_line, fidelity_line, judge_rows, quantity, summary_rows
from dreamkit.trackers.csv import CSVTracker
from dreamkit.types import Noted, Recorded

# --- the grid ---------------------------------------------------------------------------------


def flat(values, channels=1, side=8):
    return torch.stack([torch.full((channels, side, side), v, dtype=torch.uint8) for v in values])


def test_a_note_is_said_once():
    """A round of pruning says what the round before it said."""
    log, heard = MemoryLog(), []
    log.listen(heard.append)
    for text in ("one", "two", "one"):
        log.note(text)
    assert log.notes == ["one", "two"]
    assert len(heard) == 2


def test_grid_puts_a_class_in_a_column():
    # 8×8 images are enlarged 8 times to 64×64; with a gap of 6: 70 each, and 6 at the end.
    # Class 2 has two images and class 5 one: 2 rows and 2 columns.
    picture = grid(flat([10, 20, 30]), torch.tensor([5, 2, 2]))
    assert picture.size == (2 * 70 + 6, 2 * 70 + 6)
    array = np.array(picture)
    assert (array[6:70, 6:70] == 20).all()  # row 1: the first of class 2 ...
    assert (array[6:70, 76:140] == 10).all()  # ... and of class 5
    assert (array[76:140, 6:70] == 30).all()  # row 2: the second of class 2
    assert (array[76:140, 76:140] == 128).all()  # and none
    assert (array[:6] == 128).all()
    assert (array[:, 70:76] == 128).all()


def test_grid_enlarges_without_smoothing():
    image = torch.tensor([[[0, 255], [100, 7]]], dtype=torch.uint8).unsqueeze(0)
    array = np.array(grid(image, torch.tensor([0])))
    assert array.shape == (76, 76)  # 2×2, 32 times
    assert (array[6:38, 6:38] == 0).all()
    assert (array[6:38, 38:70] == 255).all()
    assert (array[38:70, 6:38] == 100).all()


def test_grid_of_colours_that_are_not_square():
    image = torch.zeros(1, 3, 16, 32, dtype=torch.uint8)
    image[:, 0] = 200
    picture = grid(image, torch.tensor([0]))
    assert picture.mode == "RGB"
    assert picture.size == (32 * 2 + 12, 16 * 2 + 12)  # twice: 64 across at the most
    assert picture.getpixel((6, 6)) == (200, 0, 0)


def test_grid_shows_eight_rows_at_the_most():
    assert grid(flat([1] * 9), torch.zeros(9)).size == (76, 8 * 70 + 6)


def test_grid_of_more_than_ten_classes_is_in_order():
    # Eleven images of eleven classes: ten columns, the last image begins the second row.
    array = np.array(grid(flat(range(11)), torch.arange(11)))
    assert array.shape == (2 * 70 + 6, 10 * 70 + 6)
    assert [int(array[6, 6 + 70 * c]) for c in range(10)] == list(range(10))
    assert array[76, 6] == 10
    assert array[76, 76] == 128


def test_grid_of_large_images_is_not_enlarged():
    assert grid(torch.zeros(1, 1, 100, 100, dtype=torch.uint8), torch.tensor([0])).size == (
        112,
        112,
    )


# --- curves -----------------------------------------------------------------------------------

RECORDS = {s: {"loss": 5.0 / s, "tv": 0.1 * s, "r": 1.0} for s in range(1, 6)}


def test_curves_are_an_svg_with_a_panel_for_each_number():
    svg = curves("synthesis", RECORDS)
    assert svg.startswith("<svg")
    root = ElementTree.fromstring(svg)
    texts = {node.text for node in root.iter("{http://www.w3.org/2000/svg}text")}
    assert {"loss", "tv", "r"} <= texts
    panels = [n for n in root.iter() if re.fullmatch(r"axes_\d+", n.get("id", ""))]
    assert len(panels) == 3


def test_curves_are_the_same_every_time_and_leave_matplotlib_alone():
    import matplotlib

    before = dict(matplotlib.rcParams)
    assert curves("synthesis", RECORDS) == curves("synthesis", RECORDS)
    assert dict(matplotlib.rcParams) == before


@pytest.mark.parametrize(
    "records",
    [
        {1: {"x": None}},
        {1: {"x": 1.0}, 2: {"x": None, "y": 2.0}},
        {1: {"x": 0.0}, 2: {"x": -1.0}},
        {1: {}},
    ],
    ids=["all missing", "some missing", "negative", "no numbers"],
)
def test_curves_take_what_a_log_may_hold(records):
    assert ElementTree.fromstring(curves("x", records)).tag.endswith("svg")


# --- tables -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (0, "0"),
        (7, "7"),
        (999, "999"),
        (1000, "1 k"),
        (1234, "1.23 k"),
        (25_557_032, "25.6 M"),
        (4.09e9, "4.09 G"),
        (999_999, "1 M"),
        (999.7, "1 k"),
        (999_999_999, "1 G"),
    ],
)
def test_quantity(value, expected):
    assert quantity(value) == expected


def test_summary_rows_by_hand():
    report = {
        "details": {},
        "metrics": {
            "teacher.accuracy": 0.98765,
            "student.accuracy": 0.5,
            "student.agreement": 1,
            "pruned.accuracy": 0.25,
            "teacher.params": 1234,
            "student.params": 999,
            "teacher.latency_ms": 1.23456,
            "synthesis.images": 8,
        },
    }
    header, rows = summary_rows(report)
    agreement = "agreement with the teacher, on its training images"
    assert header == ["model", "accuracy", agreement, "parameters", "latency"]
    report["details"]["agreement"] = {"student": {"images": 40, "held_out": True}}
    assert summary_rows(report)[0][2] == "agreement with the teacher, on held-out dreams"
    del report["metrics"]["synthesis.images"]
    assert summary_rows(report)[0][2] == "agreement with the teacher, on held-out images"
    assert rows == [
        ["teacher", "0.9877", "-", "1.23 k", "1.235 ms"],
        ["pruned, before recovery", "0.2500", "-", "-", "-"],
        ["student", "0.5000", "1.0000", "999", "-"],
    ]


def test_summary_of_a_run_that_measured_nothing():
    report = {"metrics": {"synthesis.images": 8}, "details": {}}
    assert summary_rows(report) == (["model"], [])


JUDGED = {
    "metrics": {
        "judge.a.accuracy": 0.5,
        "judge.a.classifier_score": 2.25,
        "judge.a.classifier_score_std": 0.125,
        "judge.a.frechet_distance": 12.3456,
        "judge.b.classifier_score": 1.0,
        "judge.b.classifier_score_std": 0.0,
        "judge.inception_score": 3.5,
        "judge.inception_score_std": 0.25,
        "judge.fid": 40.0,
    },
    "details": {
        "judge": {
            "images": 64,
            "splits": 4,
            "reference_images": 540,
            "verifiers": [{"name": "a", "layer": "fc"}, {"name": "b", "layer": None}],
        }
    },
}


def test_judge_rows_by_hand():
    header, rows = judge_rows(JUDGED)
    assert header == [
        *("verifier", "images", "accuracy", "classifier score, 4 splits"),
        "Fréchet distance to 540 real images",
    ]
    assert rows == [
        ["a", "64", "0.5000", "2.250 ± 0.125", "12.346 at fc"],
        ["b", "64", "-", "1.000 ± 0.000", "-"],
    ]
    assert judge_rows({"metrics": {}, "details": {}})[1] == []


def test_the_standard_scores_have_a_line_of_their_own():
    score = "Inception score 3.500 ± 0.250 of 64 images in 4 splits"
    assert fidelity_line(JUDGED) == f"{score}, FID 40.000 to 540 real images (torch-fidelity)"
    metrics = {name: value for name, value in JUDGED["metrics"].items() if name != "judge.fid"}
    assert fidelity_line(JUDGED | {"metrics": metrics}) == f"{score} (torch-fidelity)"
    assert fidelity_line({"metrics": {}, "details": {}}) is None


# --- the page ---------------------------------------------------------------------------------

REPORT = {
    "name": "a <run>",
    "description": "of & all",
    "teacher": {"name": "toy", "origin": "tests"},
    "seed": 3,
    "device": "cpu",
    "notes": ["mind <this>"],
    "metrics": {"teacher.accuracy": 0.5, "synthesis.images": 4},
    "details": {},
    "versions": {"torch": "2"},
}


def page(**records):
    picture = grid(flat([1, 2]), torch.tensor([0, 1]))
    return render(REPORT, records, "name: <x>\n", {"Dreams": picture})


def test_the_page_needs_nothing_else():
    text = page(synthesis=RECORDS, training=RECORDS)
    for attribute in ("src", "href", "xlink:href", "action", "data", "poster"):
        for value in re.findall(rf'[\s:]{attribute}\s*=\s*["\']([^"\']*)', text):
            assert value.startswith(("data:", "#")), value
    assert not re.search(r"url\((?!['\"]?#)", text)
    for tag in ("<script", "<link", "<iframe", "<object", "@import"):
        assert tag not in text
    # What addresses are left only name XML's vocabularies and the program that drew the curves.
    addresses = set(re.findall(r"https?://[^\s\"'<>]+", text))
    named = ("http://www.w3.org/", "http://purl.org/", "http://creativecommons.org/ns#")
    assert all(a.startswith((*named, "https://matplotlib.org/")) for a in addresses), addresses


def test_drawings_on_one_page_do_not_share_what_they_refer_to():
    text = page(synthesis=RECORDS, training={1: {"loss": 2.0}, 9: {"loss": 1.0}})
    referred = set(re.findall(r'(?:url\(#|xlink:href="#)([\w-]+)', text))
    assert referred
    for identity in referred:
        assert text.count(f'id="{identity}"') == 1, identity


def test_the_page_shows_what_was_run():
    text = page(synthesis=RECORDS)
    for escaped in ("a &lt;run&gt;", "of &amp; all", "mind &lt;this&gt;", "name: &lt;x&gt;"):
        assert escaped in text
    assert "<td>0.5000</td>" in text
    assert text.count("<svg") == 1
    assert 'src="data:image/png;base64,' in text
    without = render(REPORT, {}, "", {})
    assert "<img" not in without
    assert "<svg" not in without


def test_the_page_shows_what_verifiers_said():
    text = render(REPORT | JUDGED, {}, "", {})
    assert "<td>2.250 ± 0.125</td><td>12.346 at fc</td>" in text
    assert "FID 40.000 to 540 real images (torch-fidelity)." in text
    assert "they are neither Inception scores nor FID" in text
    assert "What other networks see" not in page()


MEASURED = {
    "metrics": {"synthesis.statistics_distance": 2.25},
    "details": {"statistics_distance": {"bn1": 1.5, "layer1.bn2": 3.0}},
}
SAID = (
    "The dreams' statistics are 2.25 times as far from training's as that many training images "
    "are by chance (furthest: layer1.bn2, 3.00)"
)


def test_the_distance_of_the_statistics_is_said_with_the_worst_layer():
    assert dreams_line(REPORT | MEASURED) == SAID
    assert dreams_line(REPORT) is None
    text = render(REPORT | MEASURED, {}, "", {})
    assert html.escape(SAID, quote=False).replace("'", "&#39;") in text
    assert "<td>bn1</td><td>1.50</td>" in text
    assert "<td>layer1.bn2</td><td>3.00</td>" in text
    assert "Statistics by layer" not in page()


def test_distances_by_layer_are_not_drawn():
    assert "<svg" not in page(
        **{"statistics distance by layer": {0: {"bn1": 1.0}, 1: {"bn1": 2.0}}}
    )


# --- records ----------------------------------------------------------------------------------


def console():
    return Console(file=io.StringIO(), width=200)


@pytest.fixture
def log(tmp_path):
    opened = FileLog(tmp_path, console())
    yield opened
    opened.close()


def test_records_by_stage_in_order_of_step(log, tmp_path):
    log.record("a", 2, {"loss": 2.0})
    log.record("b", 1, {"x": 9.0})
    log.record("a", 1, {"loss": 1.0})
    assert read_records(tmp_path) == {
        "a": {1: {"loss": 1.0}, 2: {"loss": 2.0}},
        "b": {1: {"x": 9.0}},
    }


def test_what_is_written_is_told_and_not_kept_in_memory_too(log):
    told = []
    log.listen(told.append)
    log.record("a", 1, {"loss": 2.0, "x": float("nan")})
    assert told == [Recorded(stage="a", step=1, numbers={"loss": 2.0, "x": None})]
    assert not hasattr(log, "records")


def test_a_step_done_again_counts_once_as_it_was_last(log, tmp_path):
    log.record("a", 1, {"loss": 1.0})
    log.record("a", 2, {"loss": 2.0})
    log.record("a", 1, {"loss": 7.0})
    assert read_records(tmp_path)["a"] == {1: {"loss": 7.0}, 2: {"loss": 2.0}}


def test_a_stage_that_begins_anew_forgets_the_try_before(log, tmp_path):
    for step in (1, 2, 3):
        log.record("pruning", step, {"flops": 1 / step})
    log.record("synthesis", 1, {"loss": 1.0})
    log.begin("pruning")
    log.record("pruning", 1, {"flops": 0.5})
    assert read_records(tmp_path) == {
        "pruning": {1: {"flops": 0.5}},
        "synthesis": {1: {"loss": 1.0}},
    }


def test_numbers_may_be_called_stage_and_step(log, tmp_path):
    log.record("layers", 1, {"stage": 1.0, "step": 2.0})
    assert read_records(tmp_path) == {"layers": {1: {"stage": 1.0, "step": 2.0}}}


def test_numbers_that_are_not_finite_are_null(log, tmp_path):
    log.record("a", 1, {"x": float("nan"), "y": float("inf"), "z": 1.0})
    line = (tmp_path / "log.jsonl").read_text()
    assert json.loads(line, parse_constant=pytest.fail) == {
        "stage": "a",
        "step": 1,
        "numbers": {"x": None, "y": None, "z": 1.0},
    }


def test_a_line_cut_short_is_passed_over(log, tmp_path):
    log.record("a", 1, {"loss": 1.0})
    with (tmp_path / "log.jsonl").open("a") as file:
        file.write('{"stage": "a", "step": 2, "lo')
    assert read_records(tmp_path) == {"a": {1: {"loss": 1.0}}}


def test_a_resumed_run_does_not_write_into_the_line_cut_short(log, tmp_path):
    log.record("a", 1, {"loss": 1.0})
    log.close()
    with (tmp_path / "log.jsonl").open("a") as file:
        file.write('{"stage": "a", "step": 2, "lo')
    resumed = FileLog(tmp_path, console())
    resumed.record("a", 2, {"loss": 2.0})
    resumed.record("a", 3, {"loss": 3.0})
    resumed.close()
    assert list(read_records(tmp_path)["a"]) == [1, 2, 3]


def test_a_resumed_run_goes_on_in_the_same_file(log, tmp_path):
    log.record("a", 1, {"loss": 1.0})
    log.close()
    resumed = FileLog(tmp_path, console())
    resumed.record("a", 2, {"loss": 2.0})
    resumed.close()
    assert len(read_records(tmp_path)["a"]) == 2


def test_a_log_that_cannot_be_written(tmp_path):
    (tmp_path / "log.jsonl").mkdir()
    with pytest.raises(RunDirectoryError, match=r"log\.jsonl cannot be written"):
        FileLog(tmp_path, console()).open()


def test_a_log_without_records_writes_no_file(tmp_path):
    log = FileLog(tmp_path, console())
    log.note("only said")
    log.close()
    assert list(tmp_path.iterdir()) == []


def test_who_listens_hears_of_every_record_and_note(log):
    seen = []
    log.listen(seen.append)
    log.record("a", 1, {"loss": float("inf")})
    log.note("mind")
    assert seen == [Recorded(stage="a", step=1, numbers={"loss": None}), Noted(text="mind")]


def test_a_memory_log_keeps_what_it_is_told():
    log = MemoryLog()
    log.record("a", 2, {"loss": 2.0})
    log.record("b", 1, {"x": float("nan")})
    log.begin("a")
    log.record("a", 1, {"loss": 1.0})
    with log.progress("dreaming", 4) as advance:
        advance(4)
    assert log.records == {"b": {1: {"x": None}}, "a": {1: {"loss": 1.0}}}
    assert log.seconds["dreaming"] >= 0


def test_notes_are_shown_and_kept(log):
    log.note("mind [this]")
    assert log.notes == ["mind [this]"]
    assert log.console.file.getvalue() == "note: mind [this]\n"


# --- progress ---------------------------------------------------------------------------------


class Clock:
    """Seconds that pass when a test says so."""

    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now


def lines(log):
    return log.console.file.getvalue().splitlines()


@pytest.fixture
def clock(log, monkeypatch):
    """Time as the log knows it; its thread looks at it hardly ever."""
    monkeypatch.setattr(progress, "BEAT_SECONDS", 3600.0)
    log.stages.clock = Clock()
    return log.stages.clock


def test_what_an_interrupted_try_did_tells_nothing_of_the_pace(log, clock):
    with log.progress("recovery", 100, 60) as advance:
        clock.now = 10.0
        advance(70)  # ten in 10 s, thirty to go
    assert lines(log)[0] == "recovery: 70 % (70/100), 30 s left"


def test_plain_progress_tells_the_time_left(log, clock):
    with log.progress("dreaming", 4) as advance:
        clock.now = 10.0
        advance(1)  # one of four in 10 s: three more take 30 s
        clock.now = 12.0
    assert lines(log) == ["dreaming: 25 % (1/4), 30 s left", "dreaming: done in 12.0 s"]
    assert log.seconds == {"dreaming": 12.0}


def test_plain_progress_is_silent_between_its_lines(log, clock):
    with log.progress("dreaming", 1000) as advance:
        for done in range(1000):
            clock.now = done / 50
            advance(done)
    assert len(lines(log)) == 2 + 1  # after 8 s and 16 s, and in the end


def test_a_quick_stage_leaves_no_line(log, clock):
    with log.progress("counting", 4):
        clock.now = 0.5
    assert lines(log) == []
    assert log.seconds == {"counting": 0.5}


def test_a_stage_that_does_not_advance_is_not_silent(log, clock):
    with log.progress("compiling", 1):
        for clock.now in (5.0, 9.0, 12.0, 18.0):
            log.stages.beat()
    assert lines(log)[:2] == ["compiling: 9 s so far", "compiling: 18 s so far"]


def test_lines_come_from_a_thread_while_the_stage_is_busy(log, monkeypatch):
    monkeypatch.setattr(progress, "BEAT_SECONDS", 0.01)
    monkeypatch.setattr(progress, "LINE_SECONDS", 0.05)
    with log.progress("compiling", 1):
        deadline = time.monotonic() + 10
        while not lines(log) and time.monotonic() < deadline:
            time.sleep(0.01)
    assert lines(log)[0] == "compiling: 1 s so far"
    before = len(lines(log))
    time.sleep(0.2)
    assert len(lines(log)) == before, "the thread ends with the stage"


def test_a_note_is_a_sign_of_life(log, clock):
    with log.progress("dreaming", 1):
        clock.now = 7.0
        log.note("mind")
        clock.now = 9.0
        log.stages.beat()
    assert lines(log) == ["note: mind", "dreaming: done in 9.0 s"]


def test_stages_within_a_stage_say_where_they_are(log, clock):
    with log.progress("pruning", 1000) as advance:
        clock.now = 4.0
        advance(120)
        with log.progress("ranking", 8) as ranked:
            assert log.stages.innermost == "ranking"
            clock.now = 14.0
            ranked(4)
        assert log.stages.innermost == "pruning"
    assert log.stages.innermost is None
    assert lines(log) == [
        "pruning 12 %: ranking: 50 % (4/8), 10 s left",
        "pruning 12 %: ranking: done in 10.0 s",
        "pruning: done in 14.0 s",
    ]


def test_a_failing_stage_is_timed_but_not_done(log, clock):
    def fail():
        clock.now = 5.0
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), log.progress("dreaming", 4):
        fail()
    assert lines(log) == []
    assert log.seconds == {"dreaming": 5.0}


def test_a_stage_entered_twice_adds_up(log, clock):
    for _ in range(2):
        with log.progress("a", 1):
            clock.now += 2.5
    assert log.seconds == {"a": 5.0}


@pytest.mark.parametrize(("seconds", "shown"), [(2.0, True), (0.5, False)])
def test_progress_on_a_terminal(seconds, shown):
    terminal = Console(file=io.StringIO(), force_terminal=True, width=120)
    log = MemoryLog(terminal)
    log.stages.clock = Clock()
    with log.progress("dreaming", 4) as advance:
        with log.progress("preparing", 1):
            pass
        log.stages.clock.now = seconds
        advance(4)
    last = terminal.file.getvalue().rpartition("\x1b[2K")[2]  # the lines before are erased
    assert ("4/4" in last) == shown
    assert ("\n" in last) == shown, "a stage that left no bar leaves no empty line"
    assert "preparing" not in last


def test_a_dumb_terminal_has_lines(monkeypatch):
    monkeypatch.setenv("TERM", "dumb")
    terminal = Console(file=io.StringIO(), force_terminal=True, width=120)
    assert not progress.draws_bars(terminal)


def test_bars_are_plain_where_the_encoding_has_no_others():
    output = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    log = MemoryLog(Console(file=output, force_terminal=True, width=120))
    with log.progress("dreaming", 4) as advance:
        advance(2)
        log.stages._bars.refresh()
    output.flush()
    assert b"2/4" in output.buffer.getvalue()


# --- csv --------------------------------------------------------------------------------------


def rows(folder, name="log.csv"):
    with (folder / name).open(newline="") as file:
        return list(csv.reader(file))


def test_csv_tracker(tmp_path):
    tracker = CSVTracker()
    tracker.start(tmp_path, {}, resumed=False)
    tracker.record("a", 3, {"loss": 1.5, "tv": None})
    tracker.finish({"student.accuracy": 0.5})
    assert rows(tmp_path) == [
        ["stage", "step", "name", "value"],
        ["a", "3", "loss", "1.5"],
        ["a", "3", "tv", ""],
        ["final", "0", "student.accuracy", "0.5"],
    ]


def test_csv_tracker_takes_back_what_it_wrote(tmp_path):
    tracker = CSVTracker()
    tracker.withdraw()
    tracker.start(tmp_path, {}, resumed=False)
    tracker.withdraw()
    assert list(tmp_path.iterdir()) == []


def test_csv_tracker_goes_on_after_a_resume(tmp_path):
    for step in (1, 2):
        tracker = CSVTracker(file="x.csv")
        tracker.start(tmp_path, {}, resumed=step > 1)
        tracker.record("a", step, {"loss": 0.0})
    assert [row[1] for row in rows(tmp_path, "x.csv")] == ["step", "1", "2"]


def test_csv_tracker_stays_in_the_run_directory():
    with pytest.raises(OptionError) as caught:
        CSVTracker(file="../x.csv")
    assert caught.value.option == "file"
