"""N:M patterns: which weights stay, who follows them to the end, and what files say of them."""

from __future__ import annotations

import dataclasses
import itertools
import json

import pytest
import torch
from torch import nn

from dreamkit.applications import recover
from dreamkit.applications.recover import Recover
from dreamkit.checkup.verifying import _check_student
from dreamkit.deploy.exporting import export_model
from dreamkit.deploy.sparse_weights import METADATA
from dreamkit.errors import ArtifactError, NothingToPrune, OptionError
from dreamkit.pruning.pattern import (
    Pattern,
    checked_patterns,
    choose_in_groups,
    has_pattern,
    left_whole,
)
from dreamkit.pruning.record import PruningRecord
from dreamkit.pruning.unstructured import remove_weights
from dreamkit.stages import training_run
from dreamkit.stages.reconstructing import Reconstruction, reconstruct_student
from dreamkit.stages.saving import save_student
from dreamkit.stages.teaching import Recovery
from dreamkit.store.artifact import SPECIFICATION, read_artifact
from dreamkit.students import load_student
from dreamkit.teachers.provenance import tell
from dreamkit.training.trainer import Trainer

HALF = Pattern(2, 4)


def group_counts(weight, of):
    """Count what is not zero: at one output and one place of the kernel, ``of`` input channels."""
    flat = weight.reshape(*weight.shape[:2], -1)
    outputs, inputs, places = flat.shape
    return [
        int((flat[k, c : c + of, r] != 0).sum())
        for k, r, c in itertools.product(range(outputs), range(places), range(0, inputs, of))
    ]


def pruned(model, pattern=HALF):
    remove_weights(model, choose_in_groups(model, pattern))
    return model


# --- which weights stay -----------------------------------------------------------------------


@pytest.mark.parametrize("layer", [nn.Conv2d(8, 5, 3), nn.Linear(16, 3), nn.Conv1d(8, 2, 5)])
@pytest.mark.parametrize(("kept", "of"), [(2, 4), (1, 4), (3, 4), (1, 2), (5, 8)])
def test_exactly_n_of_every_m_along_the_input_channels_stay(layer, kept, of):
    torch.nn.init.normal_(layer.weight, generator=torch.Generator().manual_seed(0))
    mask = choose_in_groups(layer, Pattern(kept, of))["weight"]
    assert mask.shape == layer.weight.shape
    assert set(group_counts(mask, of)) == {kept}
    assert not has_pattern(layer.weight, Pattern(kept, of))
    assert has_pattern(layer.weight * mask, Pattern(kept, of))
    fewer = Pattern(kept - 1, of)
    assert not has_pattern(layer.weight * mask, fewer)


def test_the_largest_stay_and_of_equal_ones_the_first():
    layer = nn.Linear(8, 2, bias=False)
    rows = [[3, -4, 1, 2, 0.1, 0.2, -0.3, 0.05], [1, 1, 1, 1, 0, 0, 0, -9]]
    layer.weight.data = torch.tensor(rows)
    mask = choose_in_groups(layer, HALF)["weight"]
    assert mask.tolist() == [[1, 1, 0, 0, 0, 1, 1, 0], [1, 1, 0, 0, 1, 0, 0, 1]]


def test_of_a_convolution_neighbouring_channels_compete_and_not_places_of_the_kernel():
    conv = nn.Conv2d(4, 1, (1, 2), bias=False)
    # At the first place channels 0 and 2 are larger, at the second 1 and 3.
    conv.weight.data = torch.tensor([[9.0, 1], [8, 2], [9, 1], [8, 2]]).view(1, 4, 1, 2)
    mask = choose_in_groups(conv, HALF)["weight"]
    assert mask.view(4, 2).tolist() == [[1, 0], [0, 1], [1, 0], [0, 1]]


def test_choosing_changes_nothing_and_does_not_mind_the_memory_format(toys):
    model = toys.two_bn()
    expected = choose_in_groups(model, HALF)
    model = model.to(memory_format=torch.channels_last)
    before = toys.state(model)
    found = choose_in_groups(model, HALF)
    toys.assert_same_state(model, before)
    assert list(found) == list(expected) == ["conv2.weight"]
    assert torch.equal(found["conv2.weight"], expected["conv2.weight"])


def test_layers_whose_inputs_do_not_divide_are_left_alone_with_the_reason(toys):
    model = toys.depthwise()
    assert list(choose_in_groups(model, HALF)) == ["pointwise.weight"]
    assert left_whole(model, HALF) == {
        "conv1": "inputs (3) are no multiple of 4",
        "depthwise": "inputs (1 in each group) are no multiple of 4",
        "fc": "inputs (6) are no multiple of 4",
    }


def test_groups_of_enough_channels_have_the_pattern_and_transposed_ones_do_not():
    model = nn.Sequential(nn.Conv2d(8, 4, 3, groups=2), nn.ConvTranspose2d(4, 4, 3))
    assert list(choose_in_groups(model, HALF)) == ["0.weight"]
    assert list(left_whole(model, HALF)) == ["1"]
    assert "transposed" in left_whole(model, HALF)["1"]


def test_a_network_without_such_a_layer_is_refused(toys, tmp_path):
    with pytest.raises(NothingToPrune, match=r"no layer can have 1:7: conv1: inputs \(3\) are no"):
        Recover(pattern="1:7").run(
            toys.teacher(toys.two_bn()), toys.images(24), toys.context(tmp_path)
        )
    with pytest.raises(NothingToPrune, match="the network has no convolution"):
        choose_in_groups(nn.Sequential(nn.ReLU()), HALF)


@pytest.mark.parametrize("text", ["4:2", "2:0", "0:4", "4:4", "2-4", "2:4:8", "", " 2:4", "2.0:4"])
def test_what_is_no_pattern_is_refused(text):
    with pytest.raises(OptionError, match="such as 2:4") as refused:
        Recover(pattern=text)
    assert refused.value.option == "pattern"
    assert text in str(refused.value)


@pytest.mark.parametrize(
    ("options", "option", "message"),
    [
        ({}, "sparsity", "set 'sparsity' or 'pattern'"),
        ({"sparsity": 0.5, "pattern": "2:4"}, "pattern", "set it or 'sparsity'"),
        ({"pattern": "2:4", "rounds": 2}, "rounds", "without 'reconstruction'"),
        (
            {"pattern": "2:4", "rounds": 3, "reconstruction": Reconstruction()},
            "rounds",
            "2:4 takes 2 of every 4 weights",
        ),
    ],
)
def test_options_that_do_not_go_together(options, option, message):
    with pytest.raises(OptionError, match=message) as refused:
        Recover(**options)
    assert refused.value.option == option


def test_rounds_take_about_as_many_each():
    assert HALF.on_the_way(2) == [Pattern(3, 4), HALF]
    assert Pattern(3, 16).on_the_way(5)[-1] == Pattern(3, 16)
    for rounds in range(1, 14):
        left = [pattern.kept for pattern in Pattern(3, 16).on_the_way(rounds)]
        assert left == sorted(set(left), reverse=True)
        assert len(left) == rounds


# --- the application --------------------------------------------------------------------------


def recovered(toys, folder, model=None, **options):
    run = toys.context(folder)
    teacher = toys.teacher(toys.two_bn() if model is None else model)
    options = {"training": Recovery(steps=6, batch_size=8, precision="float32"), **options}
    return Recover(pattern="2:4", **options).run(teacher, toys.images(48), run).student, run.log


@pytest.mark.parametrize("reconstruction", [None, Reconstruction(images=24)])
def test_the_zeros_are_kept_and_looked_up_in_the_end(toys, tmp_path, reconstruction):
    student, log = recovered(toys, tmp_path, reconstruction=reconstruction)
    whole = toys.two_bn()
    chosen = choose_in_groups(whole, HALF)["conv2.weight"]
    weight = student.model.conv2.weight
    assert max(group_counts(weight, 4)) == 2
    assert not torch.equal(weight, whole.conv2.weight * chosen), "it was fitted or trained"
    assert torch.equal(weight != 0, chosen != 0)
    assert student.pruning_record["patterns"] == {"conv2.weight": "2:4"}
    assert log.metrics["student.pattern_share"] == pytest.approx(1 / 3)
    details = log.details["pattern"]
    assert (details["pattern"], details["weights"]) == ("2:4", ["conv2.weight"])
    assert list(details["left_alone"]) == ["conv1", "fc"]
    assert "the weights of conv1 stay: inputs (3) are no multiple of 4" in log.notes


def test_what_training_brought_back_is_not_said_to_have_the_pattern(toys, tmp_path, monkeypatch):
    from contextlib import nullcontext

    monkeypatch.setattr(recover, "kept_at_zero", lambda model, masks: nullcontext())
    student, log = recovered(toys, tmp_path)
    assert student.pruning_record["patterns"] == {}
    assert log.metrics["student.pattern_share"] == 0


def test_rounds_with_a_fit_end_at_the_pattern(toys, tmp_path):
    student, log = recovered(toys, tmp_path, rounds=2, reconstruction=Reconstruction(images=24))
    assert max(group_counts(student.model.conv2.weight, 4)) == 2
    shares = [numbers["sparsity"] for numbers in log.records["pruning"].values()]
    whole = sum(w.numel() for w in (student.model.conv1.weight, student.model.fc.weight))
    part = student.model.conv2.weight.numel()
    assert shares == pytest.approx([part / 4 / (part + whole), part / 2 / (part + whole)])


@pytest.mark.parametrize("where", ["fit", "training"])
def test_a_killed_run_ends_like_an_undisturbed_one(toys, tmp_path, monkeypatch, where):
    options = {"rounds": 2, "reconstruction": Reconstruction(images=24)}
    expected, _ = recovered(toys, tmp_path / "whole", **options)
    calls = []

    def stopping(function, number):
        def stopped(*arguments, **named):
            calls.append(1)
            if len(calls) == number:
                raise KeyboardInterrupt
            return function(*arguments, **named)

        return stopped

    with monkeypatch.context() as patch:
        if where == "fit":
            patch.setattr(recover, "reconstruct_student", stopping(reconstruct_student, 2))
        else:
            patch.setattr(Trainer, "step", stopping(Trainer.step, 4))
            patch.setattr(training_run, "CHECKPOINT_SECONDS", 0)
        with pytest.raises(KeyboardInterrupt):
            recovered(toys, tmp_path / "parts", **options)
    student, log = recovered(toys, tmp_path / "parts", **options)
    assert f"pruning: going on after round {1 if where == 'fit' else 2}" in log.notes
    toys.assert_same_tensors(student.model, expected.model)
    assert student.pruning_record == expected.pruning_record


# --- files ------------------------------------------------------------------------------------


def with_record(toys, model, names):
    record = PruningRecord(patterns=dict.fromkeys(names, "2:4")).to_json()
    return dataclasses.replace(toys.teacher(model), pruning_record=record)


def test_a_saved_student_says_what_its_weights_have(toys, tmp_path):
    """Another training may have ended a pattern that the record still tells of."""
    model = pruned(toys.depthwise())
    save_student(tmp_path / "a", with_record(toys, model, ["pointwise.weight", "conv1.weight"]))
    held = {"pointwise.weight": "2:4"}
    assert read_artifact(tmp_path / "a").pruning_record["patterns"] == held
    loaded = load_student(tmp_path / "a", toys.depthwise)
    assert loaded.provenance["pruning_record"]["patterns"] == held
    with torch.no_grad():
        model.pointwise.weight += 1
    save_student(tmp_path / "b", with_record(toys, model, ["pointwise.weight"]))
    assert read_artifact(tmp_path / "b").pruning_record["patterns"] == {}


@pytest.mark.parametrize("said", ["2:4", "1:4", "nonsense"])
def test_a_record_that_claims_more_is_not_believed(toys, tmp_path, said):
    save_student(tmp_path, with_record(toys, pruned(toys.two_bn()), ["conv2.weight"]))
    _check_student(tmp_path)
    file = tmp_path / SPECIFICATION
    specification = json.loads(file.read_text())
    specification["pruning_record"]["patterns"] = {"conv2.weight": said, "gone.weight": "2:4"}
    file.write_text(json.dumps(specification))
    with pytest.raises(ArtifactError, match="without the pattern on record: ") as refused:
        _check_student(tmp_path)
    lost = ["gone.weight"] if said == "2:4" else ["conv2.weight", "gone.weight"]
    assert refused.value.message.endswith(", ".join(lost))
    loaded = load_student(tmp_path, toys.two_bn)
    held = {"conv2.weight": "2:4"} if said == "2:4" else {}
    assert loaded.provenance["pruning_record"]["patterns"] == held


def test_a_later_cut_is_added_to_the_record_and_looked_up_anew():
    earlier = PruningRecord(patterns={"a.weight": "2:4", "b.weight": "2:4"})
    both = PruningRecord(patterns={"b.weight": "1:4"}).after(earlier)
    assert both.patterns == {"a.weight": "2:4", "b.weight": "1:4"}
    assert PruningRecord.from_json(both.to_json()) == both
    five = torch.zeros(2, 5)  # an input was cut since
    assert checked_patterns(both.to_json(), {"a.weight": five})["patterns"] == {}


@pytest.mark.parametrize("damage", [False, True])
def test_the_onnx_file_has_the_zeros_and_says_so(toys, tmp_path, damage):
    onnx = pytest.importorskip("onnx")
    model = toys.two_bn()
    model.fc = nn.Linear(8, 3)
    model.conv2 = nn.Conv2d(4, 8, 3, padding=1)
    model.bn2 = nn.BatchNorm2d(8).eval()
    pruned(model)
    made = with_record(toys, model, ["conv2.weight", "fc.weight"])
    tell(model, made.card, {}, made.pruning_record)
    if damage:
        with torch.no_grad():
            model.fc.weight += 1
    export_model(model, made.card, "onnx", tmp_path / "model.onnx")
    file = onnx.load(tmp_path / "model.onnx")
    told = {entry.key: entry.value for entry in file.metadata_props}
    says = json.loads(told[METADATA])
    stored = {t.name: onnx.numpy_helper.to_array(t) for t in file.graph.initializer}
    assert ("fc.weight" in says) == (not damage)
    assert says["conv2.weight"] == "2:4"
    for name in says:
        weight = torch.tensor(stored[name])
        assert torch.equal(weight == 0, model.get_parameter(name) == 0), name
        assert max(group_counts(weight, 4)) == 2


def test_other_onnx_files_say_nothing(toys, tmp_path):
    onnx = pytest.importorskip("onnx")
    model = pruned(toys.two_bn())
    export_model(model, toys.card(), "onnx", tmp_path / "model.onnx")
    assert list(onnx.load(tmp_path / "model.onnx").metadata_props) == []


def test_products_of_matrices_are_looked_at_from_their_inputs(tmp_path):
    """A linear layer on more than one axis is stored the other way round."""
    onnx = pytest.importorskip("onnx")
    model = pruned(nn.Sequential(nn.Linear(8, 4), nn.ReLU(), nn.Flatten()))
    record = PruningRecord(patterns={"0.weight": "2:4"}).to_json()
    model.provenance = {"pruning_record": record}
    export_model(model, (3, 2, 8), "onnx", tmp_path / "model.onnx")
    file = onnx.load(tmp_path / "model.onnx")
    assert [list(json.loads(e.value).values()) for e in file.metadata_props] == [["2:4"]]
