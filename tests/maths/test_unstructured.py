"""Pruning of single weights, and the files that hold what is left."""

from __future__ import annotations

import pytest
import safetensors.torch
import torch
from torch import nn

from dreamkit.applications import recover
from dreamkit.applications.recover import Recover
from dreamkit.errors import OptionError
from dreamkit.pruning.unstructured import (
    choose_weights,
    kept_at_zero,
    remove_weights,
    sparsity_of,
)
from dreamkit.stages import training_run
from dreamkit.stages.reconstructing import Reconstruction, reconstruct_student
from dreamkit.stages.teaching import Recovery
from dreamkit.store.artifact import read_artifact, write_artifact
from dreamkit.training.augmenter import Augmentation
from dreamkit.training.trainer import Trainer


def weights(model):
    return [m.weight for m in model.modules() if isinstance(m, nn.Conv2d | nn.Linear)]


@pytest.mark.parametrize("sparsity", [0.5, 0.9])
def test_the_smallest_weights_of_all_layers_go(toys, sparsity):
    model, whole = toys.two_bn(), toys.two_bn()
    masks = choose_weights(model, sparsity)
    remove_weights(model, masks)
    before = torch.cat([w.detach().flatten().abs() for w in weights(whole)])
    after = torch.cat([w.detach().flatten() for w in weights(model)])
    left = after != 0
    assert int((~left).sum()) == round(sparsity * len(after))
    assert before[~left].max() <= before[left].min()
    assert torch.equal(after[left].abs(), before[left])
    assert sparsity_of(model) == pytest.approx(sparsity, abs=1e-2)
    assert set(masks) == {"conv1.weight", "conv2.weight", "fc.weight"}
    assert model.state_dict().keys() == whole.state_dict().keys()
    assert all(isinstance(w, nn.Parameter) for w in weights(model))
    for name, value in whole.state_dict().items():
        if name not in masks:
            assert torch.equal(model.state_dict()[name], value), "the rest stays"


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_what_is_gone_stays_gone(toys, optimizer):
    model = toys.two_bn()
    masks = choose_weights(model, 0.6)
    remove_weights(model, masks)
    kinds = {"sgd": torch.optim.SGD, "adamw": torch.optim.AdamW}
    more = {"momentum": 0.9, "nesterov": True} if optimizer == "sgd" else {}
    steps = kinds[optimizer](model.parameters(), lr=0.1, weight_decay=0.1, **more)
    before = model.conv1.weight.detach().clone()
    images = toys.card().normalise(toys.images(8).images)

    def step():
        steps.zero_grad()
        model(images).square().mean().backward()
        steps.step()

    with kept_at_zero(model, masks):
        for _ in range(5):
            step()
    for name, mask in masks.items():
        assert torch.equal(
            model.get_parameter(name)[mask == 0], torch.zeros(int((mask == 0).sum()))
        )
    assert not torch.equal(model.conv1.weight, before)
    step()
    assert model.conv1.weight[masks["conv1.weight"] == 0].abs().max() > 0, "and no longer"


# --- files ------------------------------------------------------------------------------------


def test_a_sparse_student_is_a_plain_state_dict(toys, tmp_path):
    model = nn.Linear(100, 10)
    remove_weights(model, choose_weights(model, 0.75))
    write_artifact(tmp_path, model, toys.card(), {}, {})
    other = nn.Linear(100, 10)
    other.load_state_dict(safetensors.torch.load_file(tmp_path / "model.safetensors"))
    assert torch.equal(other.weight, model.weight)
    assert int((other.weight == 0).sum()) == 750


@pytest.mark.parametrize("shape", [(3,), (7, 11), (2, 3, 5, 1), (0,), ()])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64])
def test_every_shape_and_type_is_stored(toys, tmp_path, shape, dtype):
    model = nn.Module()
    value = (torch.rand(shape, generator=torch.Generator().manual_seed(1)) > 0.9).to(dtype)
    model.register_buffer("b", value)
    write_artifact(tmp_path, model, toys.card(), {}, {})
    found = read_artifact(tmp_path).state["b"]
    assert found.dtype == dtype
    assert torch.equal(found, value)
    safetensors.torch.load_file(tmp_path / "model.safetensors")


# --- the application --------------------------------------------------------------------------


@pytest.mark.parametrize("ema", [None, 0.5])
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_recover(toys, tmp_path, ema, precision):
    teacher = toys.teacher(toys.two_bn())
    before = toys.state(teacher.model)
    run = toys.context(tmp_path, evaluation=toys.images(9))
    training = Recovery(
        steps=6, batch_size=8, precision=precision, ema=ema, augmentation=Augmentation(mixup=1)
    )
    student = Recover(sparsity=0.75, training=training).run(teacher, toys.images(24), run).student
    toys.assert_same_state(teacher.model, before)
    metrics = run.log.metrics
    assert metrics["student.sparsity"] == pytest.approx(0.75, abs=0.01)
    assert {"pruned.accuracy", "student.accuracy", "student.accuracy_ratio"} <= metrics.keys()
    folder = tmp_path / "student"
    write_artifact(folder, student.model, student.card, student.builder, student.pruning_record)
    again = toys.two_bn()
    again.load_state_dict(read_artifact(folder).state)
    assert sparsity_of(again) == metrics["student.sparsity"]
    pruned = toys.two_bn()
    remove_weights(pruned, choose_weights(pruned, 0.75))
    assert not torch.equal(again.fc.weight, pruned.fc.weight), "it was trained"


def test_what_is_left_is_fitted_before_it_is_trained(toys, tmp_path):
    """Dreams alone tell how near the pruned network is to its teacher."""
    teacher = toys.teacher(toys.two_bn())
    agreement = {}
    for name, reconstruction in (("as it is", None), ("fitted", Reconstruction(images=24))):
        run = toys.context(tmp_path / name)
        options = Recover(
            sparsity=0.75,
            training=Recovery(epochs=0, batch_size=8),
            statistics="keep",
            reconstruction=reconstruction,
        )
        options.run(teacher, toys.images(48), run)
        agreement[name] = run.log.metrics["student.agreement"]
        assert run.log.metrics["student.sparsity"] == pytest.approx(0.75, abs=0.01)
    assert agreement["fitted"] > agreement["as it is"]
    assert run.log.metrics["reconstruction.seconds"] > 0
    assert run.log.details["reconstruction_left_alone"] == []


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:`torch.jit.script` is:FutureWarning")
def test_what_is_scripted_keeps_its_weights():
    model = nn.Sequential(nn.Linear(4, 4), torch.jit.script(nn.Linear(4, 2)))
    assert list(choose_weights(model, 0.5)) == ["0.weight"]


def test_what_pruning_left_has_its_teachers_statistics_and_the_difference(toys, tmp_path):
    teacher, found = toys.teacher(toys.two_bn()), {}
    for how in ("keep", "difference", "recalibrate"):
        options = Recover(0.75, training=Recovery(epochs=0, batch_size=8), statistics=how)
        student = options.run(teacher, toys.images(24), toys.context(tmp_path / how)).student
        found[how] = student.model.bn2.running_mean
    assert found["keep"].equal(teacher.model.bn2.running_mean)
    assert not torch.allclose(found["difference"], found["keep"], atol=1e-2)
    assert not torch.allclose(found["difference"], found["recalibrate"], atol=1e-2)


def recovered(toys, folder, **options):
    """Prune on 48 images, fitted and by default not trained; return the student and the log."""
    run = toys.context(folder, evaluation=toys.images(9))
    options = {"training": Recovery(epochs=0, batch_size=8), **options}
    recover = Recover(sparsity=0.75, reconstruction=Reconstruction(images=24), **options)
    outcome = recover.run(toys.teacher(toys.two_bn()), toys.images(48), run)
    return outcome.student.model, run.log


def test_rounds_come_nearer_to_the_share_by_a_cube():
    options = Recover(sparsity=0.9, rounds=3, reconstruction=Reconstruction())
    assert options.schedule == pytest.approx([0.9 * 19 / 27, 0.9 * 26 / 27, 0.9])
    assert Recover(sparsity=0.9).schedule == [0.9]


def test_rounds_end_at_the_same_share_with_other_zeros_and_nearer(toys, tmp_path):
    found, teacher = {}, toys.two_bn()
    x = torch.randn(64, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    for rounds in (1, 4):
        student, log = recovered(toys, tmp_path / str(rounds), rounds=rounds)
        with torch.no_grad():
            error = (student(x) - teacher(x)).square().mean()
        found[rounds] = (student.conv2.weight == 0, float(error))
        assert log.metrics["student.sparsity"] == pytest.approx(0.75, abs=0.01)
    assert not torch.equal(found[1][0], found[4][0])
    assert found[4][1] < found[1][1]
    steps = log.records["pruning"]
    assert list(steps) == [1, 2, 3, 4]
    shares = [numbers["sparsity"] for numbers in steps.values()]
    assert shares == pytest.approx([0.434, 0.656, 0.738, 0.75], abs=0.01)


@pytest.mark.parametrize("where", ["fit", "training"])
def test_a_recovery_that_is_killed_ends_like_an_undisturbed_one(toys, tmp_path, monkeypatch, where):
    """Momenta go to the parameters that they are of, and the masks hold on."""
    training = Recovery(steps=6, batch_size=8, precision="float32", lr=0.05)
    expected, whole = recovered(toys, tmp_path / "whole", rounds=3, training=training)
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
            patch.setattr(recover, "reconstruct_student", stopping(reconstruct_student, 3))
        else:
            patch.setattr(Trainer, "step", stopping(Trainer.step, 4))
            patch.setattr(training_run, "CHECKPOINT_SECONDS", 0)
        with pytest.raises(KeyboardInterrupt):
            recovered(toys, tmp_path / "parts", rounds=3, training=training)
    student, log = recovered(toys, tmp_path / "parts", rounds=3, training=training)
    rounds = 2 if where == "fit" else 3
    assert f"pruning: going on after round {rounds}" in log.notes
    assert ("recovery: going on from step 3 of 6" in log.notes) == (where == "training")
    toys.assert_same_tensors(student, expected)
    assert log.metrics["student.sparsity"] == whole.metrics["student.sparsity"]
    assert log.details == whole.details


def test_choosing_changes_nothing_and_does_not_mind_the_memory_format(toys):
    model = toys.two_bn().to(memory_format=torch.channels_last)
    before = toys.state(model)
    masks = choose_weights(model, 0.5)
    toys.assert_same_state(model, before)
    names = [name for name, _ in model.named_parameters()]
    remove_weights(model, masks)
    assert [name for name, _ in model.named_parameters()] == names
    assert sparsity_of(model) == pytest.approx(0.5, abs=0.01)


def test_rounds_without_a_fit_are_refused():
    with pytest.raises(OptionError, match="without 'reconstruction' the same weights go"):
        Recover(sparsity=0.9, rounds=2)
