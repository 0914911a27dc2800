"""Reading a recipe: every problem at once, each with its place and the fix; nothing is loaded."""

from __future__ import annotations

import copy
import importlib
import re
from collections.abc import Callable
from dataclasses import asdict, make_dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from dreamkit.applications.synthesize import Synthesize
from dreamkit.criteria.taylor import Taylor
from dreamkit.errors import DreamkitError, RecipeError, RecipePath
from dreamkit.parameterisations.fourier import Fourier
from dreamkit.plugins import build_registries
from dreamkit.recipe import build_entry, build_options, read_recipe, validate_recipe
from dreamkit.recipe.nodes_of_file import MAX_BYTES
from dreamkit.registry import EntryOf, Registries, Term
from dreamkit.regularizers.bn_feature import BNFeature
from dreamkit.regularizers.l2 import L2Norm
from dreamkit.regularizers.tv import TotalVariation
from dreamkit.stages.budget import Target
from dreamkit.synthesizers.deepinversion import Stage
from dreamkit.teachers.bundled import BundledTeacher
from dreamkit.types import InversionStep, Regularizer

RECIPES = Path(__file__).parents[1] / "recipes"
Write = Callable[..., Path]
BROKEN = """\
name: tiny
sede: 3
device: cpu
teacher: {source: bundeld, model: digits_resnet8}
synthesis:
  name: deepinversion
  images: "4"
  stages:
    - {stpes: 1}
    - {steps: 0}
  regularizers:
    - {name: tv, weight: -1}
    - {name: tv, norn: l1}
application:
  name: prune
  criteria: [{name: taylor}]
  target: {flosp: 0.5}
  limits: {max_ration: 0.5}
"""


@pytest.fixture(scope="module")
def registries() -> Registries:
    return build_registries()


def problems(path: Path, **options: Any) -> list[str]:
    with pytest.raises(RecipeError) as caught:
        read_recipe(path, build_registries, **options)
    return caught.value.message.split("\n")


def put(data: dict[str, Any], path: str, value: Any) -> dict[str, Any]:
    """Set what stands at a dotted path."""
    *steps, last = [int(step) if step.isdecimal() else step for step in path.split(".")]
    inside: Any = data
    for step in steps:
        inside = inside[step]
    inside[last] = value
    return data


def prune(**options: Any) -> dict[str, Any]:
    return {"name": "prune", "criteria": [{"name": "taylor"}], "target": {"flops": 0.5}, **options}


def test_a_valid_recipe_becomes_its_objects(tiny: dict[str, Any], recipe_file: Write) -> None:
    tiny["synthesis"]["stages"] = [{"steps": 1, "size": [8, 4]}]
    recipe = read_recipe(recipe_file(tiny), build_registries).recipe
    assert recipe.name == "tiny"
    assert recipe.seed == 0
    assert recipe.teacher.model == "digits_resnet8"
    assert recipe.synthesis.stages[0].size == (8, 4)
    (term,) = recipe.synthesis.regularizers
    assert (term.name, term.weight) == ("tv", 1e-3)
    assert recipe.evaluation is None
    assert recipe.trackers == ()


def test_all_problems_are_reported_at_once_in_the_order_of_the_file(recipe_file: Write) -> None:
    path = recipe_file(BROKEN)
    found = problems(path)
    places = []
    for line in found:
        match = re.fullmatch(rf"{re.escape(str(path))}:(\d+):(\d+) ([^ :]+): (.+)", line)
        assert match is not None, line
        places.append((int(match[1]), int(match[2])))
    assert places == sorted(places)
    assert [line.removeprefix(f"{path}:") for line in found] == [
        "2:1 sede: unknown option; did you mean 'seed'?",
        "4:19 teacher.source: no source 'bundeld' among the teachers; did you mean 'bundled'? "
        "(choices: bundled, checkpoint, cifar, student, timm, torchvision)",
        "7:11 synthesis.images: should be a valid integer (got '4')",
        "9:8 synthesis.stages[0].stpes: unknown option; did you mean 'steps'?",
        "10:15 synthesis.stages[1].steps: should be greater than or equal to 1 (got 0)",
        "12:26 synthesis.regularizers[0].weight: should be a finite number >= 0 (got -1)",
        "13:18 synthesis.regularizers[1].norn: unknown option; did you mean 'norm'?",
        "17:12 application.target.flosp: unknown option; did you mean 'flops'?",
        "18:12 application.limits.max_ration: unknown option; did you mean 'max_ratio'?",
    ]


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("seed", "1", "seed: should be a valid integer (got '1')"),
        ("seed", True, "seed: should be a valid integer (got True)"),
        ("seed", 1.5, "seed: should be a valid integer (got 1.5)"),
        ("seed", 1.0, "seed: should be a valid integer (got 1.0)"),
        ("seed", -1, "seed: should be greater than or equal to 0 (got -1)"),
        ("name", 3, "name: should be a valid string (got 3)"),
        ("name", "a b", "name: "),
        ("device", "tpu", "device: "),
        ("description", None, "description: should be a valid string"),
        ("synthesis.lr", "0.1", "synthesis.lr: should be a valid number (got '0.1')"),
        ("synthesis.lr", True, "synthesis.lr: should be a valid number (got True)"),
        ("synthesis.lr", float("inf"), "synthesis.lr: should be a finite number (got inf)"),
        ("synthesis.lr", float("nan"), "synthesis.lr: should be a finite number (got nan)"),
        ("synthesis.clip", "no", "synthesis.clip: should be a valid boolean (got 'no')"),
        ("synthesis.clip", 1, "synthesis.clip: should be a valid boolean (got 1)"),
        ("synthesis.stages", 3, "synthesis.stages: should be a list"),
        ("synthesis.stages", [], "synthesis.stages: "),
        ("synthesis.labels", "all", "synthesis.labels: should be 'balanced' or 'random'"),
        ("synthesis.betas", [0.9], "synthesis.betas"),
        ("synthesis.schedule", "cosin", "synthesis.schedule: should be 'constant' or 'cosine'"),
        (
            "synthesis.regularizers",
            {"name": "tv", "wieght": 2},
            "synthesis.regularizers.wieght: unknown option; did you mean 'weight'?",
        ),
        ("synthesis.regularizers", None, "synthesis.regularizers: should be a list, not null"),
        (
            "synthesis.regularizers.0",
            3,
            "synthesis.regularizers[0]: should be a mapping, not a number (got 3)",
        ),
        ("teacher", None, "teacher: should be a mapping, not null"),
        ("teacher", {"name": "bundled"}, "teacher: 'source' should name one of the teachers: "),
        ("teacher", {"source": "bundled"}, "teacher: the option 'model' is missing"),
        ("plugins", "mine.py", "plugins: should be a list of modules or .py files"),
        (
            "trackers",
            [{"name": "csv", "file": "a/b.csv"}],
            "trackers[0].file: should be a name ending in .csv",
        ),
    ],
)
def test_a_wrong_value_is_refused(
    tiny: dict[str, Any], recipe_file: Write, path: str, value: Any, message: str
) -> None:
    (line,) = problems(recipe_file(put(tiny, path, value)))
    assert line.partition(" ")[2].startswith(message)


def test_an_integer_serves_as_a_number(tiny: dict[str, Any], recipe_file: Write) -> None:
    loaded = read_recipe(recipe_file(put(tiny, "synthesis.lr", 1)), build_registries)
    assert loaded.recipe.synthesis.lr == 1.0


@pytest.mark.parametrize("weight", ["-1e-9", "-3", ".inf", "-.inf", ".nan"])
def test_a_weight_is_finite_and_not_negative(recipe_file: Write, weight: str) -> None:
    text = f"regularizers:\n    - {{name: tv, weight: {weight}}}"
    path = recipe_file(RUNNABLE.replace("regularizers: []", text))
    (line,) = problems(path)
    place = f"{path}:7:26 synthesis.regularizers[0].weight: should be a finite number >= 0 (got "
    assert line.startswith(place)


RUNNABLE = """\
name: tiny
teacher: {source: bundled, model: digits_resnet8}
synthesis:
  name: deepinversion
  images: 4
  regularizers: []
application: {name: synthesize}
"""


@pytest.mark.parametrize("weight", [None, True, "1", "heavy", [1], {"a": 1}])
def test_a_weight_is_a_number(tiny: dict[str, Any], recipe_file: Write, weight: Any) -> None:
    (line,) = problems(recipe_file(put(tiny, "synthesis.regularizers.0.weight", weight)))
    assert " synthesis.regularizers[0].weight: should be a number, not " in line
    assert "Node" not in line


@pytest.mark.parametrize("weight", ["1" + "0" * 400, "0x" + "F" * 400, "-1" + "0" * 400])
def test_a_weight_beyond_any_float_is_refused(recipe_file: Write, weight: str) -> None:
    text = f"regularizers: [{{name: tv, weight: {weight}}}]"
    (line,) = problems(recipe_file(RUNNABLE.replace("regularizers: []", text)))
    assert " synthesis.regularizers[0].weight: " in line


@pytest.mark.parametrize("seed", ["9" * 4000, "0x" + "F" * 5000])
def test_a_seed_of_thousands_of_digits_is_refused(recipe_file: Write, seed: str) -> None:
    found = problems(recipe_file(RUNNABLE + f"seed: {seed}\n"))
    assert len(found) == 1
    assert ":8:7 " in found[0]


def test_a_value_nested_too_deeply_is_refused_where_it_stands(recipe_file: Write) -> None:
    text = f"evaluation: {{source: torchvision, dataset: CIFAR10, arguments: {{a: {'[' * 300}"
    (line,) = problems(recipe_file(RUNNABLE + text + "]" * 300 + "}}\n"))
    assert ":8:" in line
    assert "JSON" not in line


def test_unhappy_constructors_are_placed_at_the_option(
    tiny: dict[str, Any], recipe_file: Write
) -> None:
    tiny["teacher"]["model"] = "digits_resnet9"
    path = recipe_file(tiny)
    (line,) = problems(path)
    assert line.startswith(f"{path}:5:10 teacher.model: no bundled 'digits_resnet9'; did you mean ")


def test_dreaming_without_synthesis_is_refused(tiny: dict[str, Any], recipe_file: Write) -> None:
    del tiny["synthesis"]
    (line,) = problems(recipe_file(tiny))
    assert line.endswith("application: it uses dreams, so the recipe needs 'synthesis'")


@pytest.mark.parametrize("kind", ["required", "null"])
def test_a_target_is_required(tiny: dict[str, Any], recipe_file: Write, kind: str) -> None:
    tiny["application"] = prune(target=None)
    if kind == "required":
        del tiny["application"]["target"]
    (line,) = problems(recipe_file(tiny))
    assert "target" in line


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"target": {}}, "application.target: give at least one of flops, params, channels"),
        ({"target": {"flops": 1.5}}, "application.target.flops: should be less than 1 (got 1.5)"),
        (
            {"recovery": {"epohcs": 1}},
            "application.recovery.epohcs: unknown option; did you mean 'epochs'?",
        ),
        ({"criteria": []}, "application: criteria: give at least one criterion"),
    ],
)
def test_options_inside_options(
    tiny: dict[str, Any], recipe_file: Write, options: dict[str, Any], message: str
) -> None:
    tiny["application"] = prune(**options)
    (line,) = problems(recipe_file(tiny))
    assert line.partition(" ")[2].startswith(message)


def judge(*verifiers: Any, **options: Any) -> dict[str, Any]:
    return {"name": "judge", "verifiers": list(verifiers), **options}


DIGITS = {"source": "bundled", "model": "digits_resnet8"}


def test_a_list_of_entries(tiny: dict[str, Any], recipe_file: Write) -> None:
    resnet = {"source": "torchvision", "model": "resnet18", "weights": None}
    tiny["application"] = judge(DIGITS, resnet, reference={"source": "digits"}, layer="fc")
    made = read_recipe(recipe_file(tiny), build_registries).recipe.application
    assert [verifier.model for verifier in made.verifiers] == ["digits_resnet8", "resnet18"]
    assert made.reference.split == "test"
    assert made.images is None


@pytest.mark.parametrize(
    ("application", "found"),
    [
        (
            judge(DIGITS, DIGITS | {"modle": "x"}, {"source": "bundeld"}),
            [
                "application.verifiers[1].modle: unknown option; did you mean 'model'?",
                "application.verifiers[2].source: no source 'bundeld' among the teachers; ",
            ],
        ),
        (
            judge(DIGITS | {"weight": 1}),
            ["application.verifiers[0].weight: unknown option (options: model, source)"],
        ),
        (judge("resnet"), ["application.verifiers[0]: no source 'resnet' among the teachers"]),
        (judge("bundled"), ["application.verifiers[0]: the option 'model' is missing"]),
        (
            judge() | {"verifiers": DIGITS},
            ["application.verifiers: should be a list, not a mapping"],
        ),
        (judge(), ["application.verifiers: give at least one verifier"]),
        (judge(DIGITS, splits=0), ["application.splits: should be greater than or equal to 1"]),
        (judge(DIGITS, layer="fc"), ["application.layer: it is for the Fréchet distance"]),
    ],
)
def test_a_wrong_list_of_entries(
    tiny: dict[str, Any], recipe_file: Write, application: Any, found: list[str]
) -> None:
    lines = problems(recipe_file(tiny | {"application": application}))
    assert len(lines) == len(found)
    for line, start in zip(lines, found, strict=True):
        assert line.partition(" ")[2].startswith(start)


LISTED = """\
name: listed
teacher: {source: bundled, model: digits_resnet8}
synthesis:
  - {name: deepinversion, images: 12, regularizers: [], share: 3}
  - name: dafl
    images: 4
    regularizers: [one_hot]
application: {name: synthesize}
presets:
  even: {synthesis: [deepinversion, {name: deepinversion, images: 6, lr: 0.3}]}
  fewer: {synthesis: {name: mixed, images: 5, of: [deepinversion]}}
"""


def test_a_list_of_synthesizers_is_one_that_has_them_take_turns(recipe_file: Write) -> None:
    path = recipe_file(LISTED)

    def images(*overrides: str, preset: str | None = None) -> list[int]:
        loaded = read_recipe(path, build_registries, preset, overrides)
        again = recipe_file(loaded.resolved_yaml(), "again.yaml")
        synthesis = loaded.recipe.synthesis
        assert type(synthesis).__name__ == "Mixed"
        resolved = read_recipe(again, build_registries)
        assert resolved.resolved() == loaded.resolved(), "what a run keeps reads as the recipe"
        assert [m.images for m in resolved.recipe.synthesis.members] == [
            member.images for member in synthesis.members
        ]
        return [member.images for member in synthesis.members]

    assert images() == [12, 4]
    assert images("synthesis[1].share=5") == [6, 10]
    assert images("synthesis[1].images=12") == [18, 6]
    assert images("synthesis[1]=deepinversion", "synthesis[0].share=1") == [518, 518]
    assert images(preset="even") == [1024, 6]
    assert images(preset="fewer") == [5]


@pytest.mark.parametrize(
    ("change", "place", "message"),
    [
        (("share: 3", "share: 0"), ":4:64 synthesis.shares[0]", "should be greater than 0 (got 0)"),
        (("share: 3", "share: -1"), ":4:64 synthesis.shares[0]", "greater than 0 (got -1)"),
        (("share: 3", "share: many"), ":4:64 synthesis.shares[0]", "should be a valid number"),
        (("share: 3", "share: .nan"), ":4:64 synthesis.shares[0]", "should be a finite number"),
        (("share: 3", "shar: 3"), ":4:57 synthesis.of[0].shar", "unknown option"),
        (("images: 4", "images: 0"), ":6:13 synthesis.of[1].images", "greater than or equal to 1"),
        (("name: dafl", "name: dalf"), ":5:11 synthesis.of[1].name", "did you mean 'dafl'?"),
        (("lr: 0.3", "lr: -1"), ":10:74 synthesis.of[1].lr", "should be greater than 0"),
    ],
)
def test_what_is_wrong_in_a_list_of_synthesizers_is_told_where_it_stands(
    recipe_file: Write, change: tuple[str, str], place: str, message: str
) -> None:
    assert LISTED.count(change[0]) == 1
    path = recipe_file(LISTED.replace(*change))
    (line,) = problems(path)
    assert line.startswith(f"{path}{place}: ")
    assert message in line


def test_a_list_of_no_synthesizers_or_of_what_is_none(recipe_file: Write) -> None:
    path = recipe_file(LISTED)
    for value, message in (
        ("[]", "give at least one synthesizer"),
        ("[3]", "should be a mapping, not a number"),
        ("[{share: 2}]", "'name' should name one of the synthesizers"),
    ):
        (line,) = problems(path, overrides=[f"synthesis={value}"])
        assert message in line


def test_one_of_a_list_that_needs_a_student_is_named(recipe_file: Write) -> None:
    path = recipe_file(LISTED.replace("one_hot", "adversarial"))
    (line,) = problems(path)
    assert f"{path}:4:3 synthesis: adversarial (of[1]) needs a student: an application" in line


def test_a_preset_is_laid_over_the_recipe(tiny: dict[str, Any], recipe_file: Write) -> None:
    tiny["presets"] = {"big": {"synthesis": {"images": 99}, "seed": 5}, "other": {"seed": 6}}
    path = recipe_file(tiny)
    assert read_recipe(path, build_registries).recipe.synthesis.images == 4
    loaded = read_recipe(path, build_registries, preset="big")
    assert (loaded.preset, loaded.recipe.synthesis.images, loaded.recipe.seed) == ("big", 99, 5)
    assert loaded.recipe.synthesis.batch_size == 4


def test_a_preset_may_rename_the_recipe(tiny: dict[str, Any], recipe_file: Write) -> None:
    tiny["presets"] = {"big": {"name": "tiny_big", "seed": 5}}
    loaded = read_recipe(recipe_file(tiny), build_registries, preset="big")
    assert (loaded.recipe.name, loaded.recipe.seed) == ("tiny_big", 5)
    assert loaded.recipe.teacher.model == "digits_resnet8"


def test_an_override_comes_after_the_preset(tiny: dict[str, Any], recipe_file: Write) -> None:
    tiny["presets"] = {"big": {"synthesis": {"images": 99}}}
    overrides = ["synthesis.images=7", "seed=3"]
    loaded = read_recipe(recipe_file(tiny), build_registries, "big", overrides)
    assert (loaded.recipe.synthesis.images, loaded.recipe.seed) == (7, 3)


def test_problems_of_a_preset_that_was_not_chosen_are_found(recipe_file: Write) -> None:
    presets = "presets:\n  good: {seed: 3}\n  bad: {synthesis: {imags: 3}}\n"
    path = recipe_file(RUNNABLE + presets)
    expected = [f"{path}:10:21 synthesis.imags: unknown option; did you mean 'images'?"]
    for preset in (None, "good", "bad"):
        assert problems(path, preset=preset) == expected


def test_a_problem_of_the_base_counts_once_with_many_presets(recipe_file: Write) -> None:
    path = recipe_file(RUNNABLE + "sede: 1\npresets: {a: {seed: 3}, b: {seed: 4}}\n")
    assert problems(path) == [f"{path}:8:1 sede: unknown option; did you mean 'seed'?"]


def test_options_over_a_list_are_refused_where_they_stand(recipe_file: Write) -> None:
    two = "[{name: deepinversion, images: 8}, {name: deepinversion, images: 8}]"
    text = f"name: a\nsynthesis: {two}\npresets:\n  less:\n    synthesis: {{images: 4}}\n"
    path = recipe_file(text)
    with pytest.raises(RecipeError, match=r":5:16: there is a list in the recipe \(.*:2:12\)"):
        read_recipe(path, build_registries)
    with pytest.raises(RecipeError, match="write the whole list here"):
        read_recipe(
            recipe_file(text.partition("presets")[0]),
            build_registries,
            None,
            ["synthesis={images: 4}"],
        )


def test_an_unknown_preset(tiny: dict[str, Any], recipe_file: Write) -> None:
    tiny["presets"] = {"smoke": {"seed": 1}, "full": {"seed": 2}}
    path = recipe_file(tiny)
    expected = f"{path}: no preset 'smkoe'; did you mean 'smoke'? (presets: smoke, full)"
    assert problems(path, preset="smkoe") == [expected]
    del tiny["presets"]
    assert problems(recipe_file(tiny), preset="smoke")[0].endswith("(presets: none)")


@pytest.mark.parametrize(
    ("presets", "message"),
    [
        ("3", ":8:10 presets: should be a mapping, not a number"),
        ("[a]", ":8:10 presets: should be a mapping, not a list"),
        ("{a: null}", ":8:14 presets.a: should be a mapping, not null"),
        ("{a: [1]}", ":8:14 presets.a: should be a mapping, not a list"),
    ],
)
def test_presets_that_are_no_mappings(recipe_file: Write, presets: str, message: str) -> None:
    path = recipe_file(RUNNABLE + f"presets: {presets}\n")
    assert problems(path) == [f"{path}{message}"]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (
            "synthesis.imags=3",
            "--set synthesis.imags: unknown option; did you mean 'images'?",
        ),
        (
            "synthesis.stages[0].stpes=3",
            "--set synthesis.stages[0].stpes: unknown option; did you mean 'steps'?",
        ),
        (
            "synthesis.images=few",
            "--set synthesis.images: should be a valid integer (got 'few')",
        ),
        (
            "synthesis.regularizers[0].weight=-1",
            "--set synthesis.regularizers[0].weight: should be a finite number >= 0 (got -1)",
        ),
        (
            "synthesis.stages.0={stpes: 3}",  # of what lies inside, too
            "--set synthesis.stages[0].stpes: unknown option; did you mean 'steps'?",
        ),
        (
            "seed.x=3",  # but what is wrong may lie outside
            "--set seed.x seed: should be a valid integer",
        ),
        ("plugins=3", "--set plugins: should be a list of modules or .py files"),
        (
            "synthesis.stages[5].steps=3",
            "--set synthesis.stages[5].steps: '5' is not an index of a list of 1",
        ),
    ],
)
def test_a_wrong_override_names_the_option(
    tiny: dict[str, Any], recipe_file: Write, override: str, message: str
) -> None:
    assert problems(recipe_file(tiny), overrides=[override]) == [message]


def test_a_file_that_is_missing_or_a_folder(tmp_path: Path) -> None:
    path = tmp_path / "none.yaml"
    assert problems(path) == [f"{path}: cannot be read: No such file or directory"]
    assert problems(tmp_path) == [f"{tmp_path}: cannot be read: Is a directory"]


@pytest.mark.parametrize(
    ("text", "kind"), [("- a\n- b\n", "a list"), ("just words\n", "a string"), ("", "null")]
)
def test_a_recipe_that_is_no_mapping(recipe_file: Write, text: str, kind: str) -> None:
    path = recipe_file(text)
    assert problems(path) == [f"{path}:1:1 recipe: should be a mapping, not {kind}"]


def test_a_file_too_large_to_be_a_recipe(tmp_path: Path) -> None:
    path = tmp_path / "large.yaml"
    path.write_text(RUNNABLE + "#" * MAX_BYTES)
    assert problems(path) == [
        f"{path}: {path.stat().st_size} bytes is no recipe (limit {MAX_BYTES})"
    ]


def test_a_file_that_is_no_text(tmp_path: Path) -> None:
    path = tmp_path / "binary.yaml"
    path.write_bytes(b"\xff\xfe\x00name")
    assert problems(path) == [f"{path}: not a UTF-8 text file"]


def test_a_plugin_that_is_not_there_is_a_mistake_of_the_user(recipe_file: Write) -> None:
    path = recipe_file(RUNNABLE + "plugins: [no_such_module_here]\n")
    with pytest.raises(DreamkitError, match="plugin 'no_such_module_here' cannot be loaded"):
        read_recipe(path, build_registries)


def test_validating_loads_nothing(
    tmp_path: Path, recipe_file: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("something was loaded while a recipe was validated")

    for place in (
        "torch.load",
        "timm.create_model",
        "torchvision.models.get_model",
        "safetensors.torch.load",
        "safetensors.torch.load_file",
        "sklearn.datasets.load_digits",
        "torchvision.datasets.CIFAR10.__init__",
    ):
        monkeypatch.setattr(place, refuse)
    (tmp_path / "net.py").write_text("raise AssertionError('the builder was imported')\n")
    (tmp_path / "w.pth").write_bytes(b"not weights")
    shape = {"input_size": [1, 8, 8], "mean": [0.5], "std": [0.5], "num_classes": 10}
    teachers: list[dict[str, Any]] = [
        {"source": "bundled", "model": "digits_resnet8"},
        {"source": "timm", "model": "resnet18"},
        {"source": "torchvision", "model": "resnet18"},
        {"source": "torchvision", "model": "resnet18", "weights": str(tmp_path / "w.pth")},
        {"source": "checkpoint", "builder": f"{tmp_path / 'net.py'}:build", **shape}
        | {"path": str(tmp_path / "w.pth")},
    ]
    sources: list[dict[str, Any]] = [
        {"source": "digits"},
        {"source": "torchvision", "dataset": "CIFAR10"},
        {"source": "folder", "path": str(tmp_path)},
    ]
    presets: dict[str, Any] = {f"t{i}": {"teacher": t} for i, t in enumerate(teachers)}
    presets |= {f"s{i}": {"evaluation": source} for i, source in enumerate(sources)}
    path = recipe_file(yaml.safe_load(RUNNABLE) | {"presets": presets})
    loaded = read_recipe(path, build_registries, preset="t4")
    assert loaded.recipe.teacher.path == str(tmp_path / "w.pth")
    assert sorted(path.parent.iterdir()) == [tmp_path / "net.py", path, tmp_path / "w.pth"]


def test_a_missing_file_is_no_problem_to_validate_but_one_to_run(
    tiny: dict[str, Any], recipe_file: Write
) -> None:
    tiny["evaluation"] = {"source": "folder", "path": "no/such/folder"}
    path = recipe_file(tiny)
    (line,) = problems(path)
    assert line.startswith(f"{path}:19:9 evaluation.path: no such folder: no/such/folder")
    _, missing = validate_recipe(path, build_registries)
    assert missing == [f"{line} (needed to run)"]


def test_plugins_of_a_preset_that_was_not_chosen_are_not_run(
    tiny: dict[str, Any], recipe_file: Write
) -> None:
    path = recipe_file(tiny)
    plugin, ran = path.parent / "own.py", path.parent / "ran"
    plugin.write_text(
        "from dreamkit.plugin import hookimpl\n"
        f"open({str(ran)!r}, 'a').close()\n"
        "@hookimpl\n"
        "def register_losses(register):\n    pass\n"
    )
    tiny["presets"] = {"own": {"plugins": [str(plugin)], "device": 3}, "other": {"seed": 1}}
    path = recipe_file(tiny)
    read_recipe(path, build_registries, "other")
    _, lines = validate_recipe(path, build_registries)
    assert not ran.exists()
    (line,) = lines
    assert "presets.own: not checked, for it loads plugins of its own" in line
    with pytest.raises(RecipeError, match="device"):
        read_recipe(path, build_registries, "own")
    assert ran.exists()


def test_the_resolved_recipe_holds_preset_and_overrides_and_reads_the_same(
    tiny: dict[str, Any], recipe_file: Write
) -> None:
    tiny["description"] = "8×8 digits: «ä»"
    tiny["presets"] = {"big": {"synthesis": {"images": 99, "lr": 1e-5}}}
    loaded = read_recipe(recipe_file(tiny), build_registries, "big", ["seed=3", "device=auto"])
    text = loaded.resolved_yaml()
    data = yaml.safe_load(text)
    assert "presets" not in data
    assert (data["synthesis"]["images"], data["seed"], data["device"]) == (99, 3, "auto")
    assert data["description"] == "8×8 digits: «ä»"
    again = read_recipe(recipe_file(text, "again.yaml"), build_registries)
    assert again.recipe == loaded.recipe
    assert again.resolved_yaml() == text


def test_the_resolved_recipe_has_every_default(tiny: dict[str, Any], recipe_file: Write) -> None:
    tiny["synthesis"] |= {"regularizers": {"tv": 1}, "parameterisation": {"name": "fourier"}}
    tiny["application"] = prune(limits={"chunk": 2})
    loaded = read_recipe(recipe_file(tiny), build_registries)
    data = yaml.safe_load(loaded.resolved_yaml())
    assert data["latency"] is None
    synthesis, application = data["synthesis"], data["application"]
    assert synthesis["regularizers"] == [{"name": "tv", "weight": 1.0, "norm": "l2"}]
    fourier = {"name": "fourier", **asdict(Fourier()), "colour": list(Fourier().colour)}
    assert synthesis["parameterisation"] == fourier
    assert synthesis["engine"] == {"precision": "auto", "compile": "auto"}
    assert application["selection"] == {"name": "greedy", "per": "channel"}
    assert application["limits"] == {
        **{"chunk": 2, "max_ratio": 0.9, "min_channels": 2, "exceptions": []},
    }
    assert application["recovery"]["augmentation"].keys() == {
        "size",
        "crop",
        "flip",
        "mixup",
        "cutmix",
        "colour_shift",
    }


def test_recipes_that_differ_in_how_they_are_written_resolve_alike(
    tiny: dict[str, Any], recipe_file: Write
) -> None:
    tiny["synthesis"] |= {"lr": 1, "regularizers": ["tv"]}
    one = read_recipe(recipe_file(tiny), build_registries).resolved_yaml()
    tiny["synthesis"] |= {"lr": 1.0, "regularizers": [{"weight": 1, "name": "tv"}], "clip": True}
    tiny = dict(reversed(tiny.items()))
    assert read_recipe(recipe_file(tiny), build_registries).resolved_yaml() == one


def test_a_default_that_its_own_option_does_not_take_is_left_out(
    tiny: dict[str, Any], recipe_file: Write
) -> None:
    class Careless(Smooth):
        def __init__(
            self,
            often: int = "3",  # type: ignore[assignment]
            sizes: tuple[int, ...] = (1, "2"),  # type: ignore[assignment]
            well: int = 3,
        ) -> None:
            self.well = well

    def registries(plugins: Any) -> Registries:
        made = build_registries(plugins)
        made["regularizers"].register("careless", Careless, "me")
        return made

    tiny["synthesis"]["regularizers"] = ["careless"]
    loaded = read_recipe(recipe_file(tiny), registries)
    (term,) = loaded.resolved()["synthesis"]["regularizers"]
    assert term == {"name": "careless", "weight": 1.0, "well": 3}


def test_the_resolved_recipe_keeps_strings_that_look_like_something_else(
    recipe_file: Write,
) -> None:
    for word in ["1e5", "0o17", "no", "2020-01-01", "0x1F", "null", "true", ".inf", "1_000", "~"]:
        loaded = read_recipe(recipe_file(RUNNABLE + f"description: '{word}'\n"), build_registries)
        again = read_recipe(recipe_file(loaded.resolved_yaml(), "again.yaml"), build_registries)
        assert again.recipe.description == word


def test_a_later_error_is_placed_in_the_recipe(tiny: dict[str, Any], recipe_file: Write) -> None:
    path = recipe_file(tiny)
    loaded = read_recipe(path, build_registries, overrides=["seed=3"])
    error = loaded.placed(DreamkitError("will not do", ("teacher", "model")))
    assert str(error) == f"{path}:5:10 teacher.model: will not do"
    # An option that was left out is placed at its nearest parent.
    error = loaded.placed(DreamkitError("will not do", ("teacher", "weights")))
    assert str(error) == f"{path}:4:3 teacher.weights: will not do"
    assert str(loaded.placed(DreamkitError("no", ("seed",)))) == "--set seed: no"
    assert str(loaded.placed(DreamkitError("no place"))) == "no place"


def recipes_with_presets() -> list[Any]:
    found = []
    for path in sorted(RECIPES.rglob("*.yaml")):
        presets = yaml.safe_load(path.read_text(encoding="utf-8")).get("presets") or {}
        for preset in (None, *presets):
            name = f"{path.relative_to(RECIPES)}-{preset or 'base'}"
            found.append(pytest.param(path, preset, id=name))
    return found


@pytest.mark.parametrize(("path", "preset"), recipes_with_presets())
def test_every_recipe_of_the_repository_is_valid(
    path: Path, preset: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(RECIPES.parent)  # recipes name plugins and data from there
    _, missing = validate_recipe(path, build_registries, preset)
    assert all("no such" in line for line in missing)


def test_there_are_recipes() -> None:
    assert RECIPES / "quickstart.yaml" in RECIPES.rglob("*.yaml")


def test_build_entry(registries: Registries) -> None:
    entry = build_entry(registries, "teachers", {"source": "bundled", "model": "digits_resnet8"})
    assert entry.model == "digits_resnet8"
    entry = build_entry(registries, "regularizers", {"name": "bn_feature", "first_layer_scale": 3})
    assert entry.first_layer_scale == 3.0


@pytest.mark.parametrize(
    ("kind", "data", "message"),
    [
        ("teachers", {"source": "bundeld"}, "source: no source 'bundeld' among"),
        ("teachers", {"source": "bundled"}, "the option 'model' is missing"),
        ("teachers", {}, "'source' should name one of the teachers: "),
        ("regularizers", {"name": "tv", "nrom": "l1"}, "nrom: unknown option; did "),
        ("regularizers", {"name": "tv", "weight": 1}, "weight: unknown option"),
    ],
)
def test_build_entry_refuses_what_a_recipe_would(
    registries: Registries, kind: str, data: dict[str, Any], message: str
) -> None:
    with pytest.raises(RecipeError) as caught:
        build_entry(registries, kind, data)
    assert message in caught.value.message


class Smooth(Regularizer):
    """A regularizer that nobody registered."""

    def __call__(self, step: InversionStep) -> Tensor:
        return step.images.mean()


DREAM = {"name": "deepinversion", "images": 64}


def refused(registries: Registries, kind: str, data: Any, path: RecipePath = ()) -> list[str]:
    with pytest.raises(RecipeError) as caught:
        build_entry(registries, kind, data, path)
    return caught.value.message.split("\n")


def test_options_of_python_may_be_objects(registries: Registries) -> None:
    target, smooth, priors = Target(flops=0.5), Smooth(), TotalVariation()
    made = build_entry(
        registries,
        "synthesizers",
        DREAM
        | {
            "images": np.int64(3),
            "lr": np.float32(0.5),
            "clip": np.bool_(True),
            "stages": (Stage(2), {"steps": 3, "size": (8, 4)}),
            "regularizers": {"bn_feature": 0.3, "mine": (0.1, smooth), "tv": priors},
        },
    )
    assert (made.images, made.lr, made.clip) == (3, 0.5, True)
    assert made.stages == (Stage(2), Stage(3, (8, 4)))
    assert made.regularizers == (
        Term("bn_feature", 0.3, BNFeature()),
        Term("mine", 0.1, smooth),
        Term("tv", 1.0, priors),
    )
    pruning = build_entry(
        registries, "applications", {"name": "prune", "criteria": [Taylor()], "target": target}
    )
    assert pruning.criteria == (Term("taylor", 1.0, Taylor()),)
    assert pruning.target is target


def test_an_object_in_a_list_of_terms_has_the_name_of_its_class(registries: Registries) -> None:
    given = Term("given", 2.0, Smooth())
    data = DREAM | {"regularizers": [TotalVariation(), Smooth(), given]}
    names = [term.name for term in build_entry(registries, "synthesizers", data).regularizers]
    assert names == ["tv", "Smooth", "given"]


def test_an_entry_may_be_the_object_itself(registries: Registries) -> None:
    smooth = Smooth()
    assert build_entry(registries, "regularizers", smooth) is smooth


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"lr": -1}, ["lr: should be greater than 0 (got -1)"]),
        ({"lr": np.float64("nan")}, ["lr: should be a finite number (got nan)"]),
        ({"lr": "0.1"}, ["lr: should be a valid number (got '0.1')"]),
        ({"stages": Target(flops=0.5)}, ["stages: should be a list, not an instance of Target"]),
        (
            {"stages": [Target(flops=0.5)]},
            ["stages[0]: should be a dict, not an instance of Target"],
        ),
        (
            {"regularizers": [{"name": "tv", "wieght": 1}], "lr": 0, "sede": 3},
            [
                "regularizers[0].wieght: unknown option; did you mean 'weight'?",
                "lr: should be greater than 0 (got 0)",
                "sede: unknown option; did you mean 'schedule'?",
            ],
        ),
        (
            {"regularizers": {"tvv": 1, "tv": -1, "l2": "x", "mine": (None, Smooth())}},
            [
                "regularizers.tvv: no name 'tvv' among the regularizers; did you mean 'tv'?",
                "regularizers.tv: should be a finite number >= 0 (got -1)",
                "regularizers.l2: should be a number, not a string (got 'x')",
                "regularizers.mine: should be a number, not None",
            ],
        ),
        (
            {"regularizers": [Smooth, Target(flops=0.5)]},
            [
                "regularizers[0]: should be an object, not its class: write Smooth(...)",
                "regularizers[1]: an instance of Target will not do here: Target has no '__call__'",
            ],
        ),
        ({"student": 3}, ["student: should be a dict, not a number (got 3)"]),
        ({"student": "timm"}, ["student: the option 'model' is missing"]),
        (
            {"student": Smooth()},
            ["student: an instance of Smooth will not do here: Smooth has no 'build'"],
        ),
    ],
)
def test_wrong_options_of_python_have_the_message_without_a_file(
    registries: Registries, options: dict[str, Any], expected: list[str]
) -> None:
    data = DREAM | {"regularizers": []} | options
    lines = refused(registries, "synthesizers", data)
    assert len(lines) == len(expected)
    for line, start in zip(lines, expected, strict=True):
        assert line.startswith(start)


def test_a_path_goes_before_that_of_the_option(registries: Registries) -> None:
    lines = refused(registries, "regularizers", {"name": "tv", "norm": 1}, ("priors", 0))
    assert lines == ["priors[0].norm: should be 'l2' or 'l1' (got 1)"]
    assert refused(registries, "criteria", "tailor") == [
        "no name 'tailor' among the criteria; did you mean 'taylor'? "
        "(choices: bn_scale, fpgm, latency_lut, magnitude, random, taylor)"
    ]


def test_options_of_a_class_that_is_no_entry(registries: Registries) -> None:
    assert build_options(registries, Target, {"flops": 0.5}) == Target(flops=0.5)
    with pytest.raises(RecipeError) as caught:
        build_options(registries, Target, {"flosp": 0.5, "params": 2}, ("target",))
    assert caught.value.message.split("\n") == [
        "target.params: should be less than 1 (got 2)",
        "target.flosp: unknown option; did you mean 'flops'?",
    ]
    with pytest.raises(RecipeError, match=r"^give at least one of flops"):
        build_options(registries, Target, {})


def test_entries_inside_options_of_other_classes(registries: Registries) -> None:
    inner = make_dataclass("Inner", [("prior", Annotated[Any | None, EntryOf("regularizers")])])
    outer = make_dataclass("Outer", [("inner", inner), ("many", tuple[inner, ...], ())])
    made = build_options(registries, outer, {"inner": {"prior": "l2"}, "many": [{"prior": None}]})
    assert made == outer(inner(L2Norm()), (inner(None),))
    data = {"inner": {"prior": "l3"}, "many": [{"prior": {"name": "tv", "nrom": "l1"}}]}
    with pytest.raises(RecipeError) as caught:
        build_options(registries, outer, data)
    first, second = caught.value.message.split("\n")
    assert first.startswith("inner.prior: no name 'l3' among the regularizers (choices: ")
    assert second == "many[0].prior.nrom: unknown option; did you mean 'norm'?"


def test_a_plugin_whose_options_pydantic_does_not_know_is_named() -> None:
    class Odd(Smooth):
        def __init__(self, thing: Smooth) -> None:
            self.thing = thing

    made = build_registries()
    made["regularizers"].register("odd", Odd, "me")
    (line,) = refused(made, "regularizers", {"name": "odd", "thing": 1})
    assert line.startswith("'odd' of me is unusable: ")


# Written short


def test_an_entry_may_be_its_name_alone(tiny: dict[str, Any], recipe_file: Write) -> None:
    tiny["application"] = "synthesize"
    tiny["trackers"] = ["csv"]
    tiny["synthesis"] |= {"parameterisation": "fourier", "regularizers": ["tv", {"name": "l2"}]}
    loaded = read_recipe(recipe_file(tiny), build_registries)
    recipe = loaded.recipe
    assert (recipe.application, recipe.synthesis.parameterisation) == (Synthesize(), Fourier())
    assert [(t.name, t.weight) for t in recipe.synthesis.regularizers] == [("tv", 1.0), ("l2", 1.0)]
    assert len(recipe.trackers) == 1
    # What else reads the resolved recipe finds a mapping.
    assert loaded.root.plain()["application"] == {"name": "synthesize"}
    again = read_recipe(recipe_file(loaded.resolved_yaml(), "again.yaml"), build_registries)
    assert again.recipe == recipe


TV = TotalVariation()


@pytest.mark.parametrize("alone", ["tv", {"name": "tv"}, TV, Term("tv", 1.0, TV)])
def test_one_term_may_stand_for_a_list_of_it(alone: Any) -> None:
    given = {"name": "deepinversion", "images": 4, "batch_size": 4, "regularizers": alone}
    made = build_entry(build_registries(), "synthesizers", given | {"stages": [{"steps": 1}]})
    assert made.regularizers == (Term("tv", 1.0, TotalVariation()),)


def test_a_teacher_may_be_its_source_and_model(tiny: dict[str, Any], recipe_file: Write) -> None:
    tiny["teacher"] = "bundled:digits_resnet8"
    loaded = read_recipe(recipe_file(tiny), build_registries)
    assert loaded.recipe.teacher == BundledTeacher("digits_resnet8")
    assert loaded.resolved()["teacher"] == {"source": "bundled", "model": "digits_resnet8"}
    tiny["teacher"] = "bundeld:digits_resnet8"
    path = recipe_file(tiny)
    (line,) = problems(path)
    assert line.startswith(f"{path}:3:10 teacher.source: no source 'bundeld' among the teachers")


def test_terms_may_be_a_mapping_of_weights(tiny: dict[str, Any], recipe_file: Write) -> None:
    tiny["synthesis"]["regularizers"] = {"tv": 0.1, "l2": 2}
    path = recipe_file(tiny)
    terms = read_recipe(path, build_registries).recipe.synthesis.regularizers
    assert terms == (Term("tv", 0.1, TotalVariation()), Term("l2", 2.0, L2Norm()))
    overrides = ["synthesis.regularizers.l2=3"]
    terms = read_recipe(path, build_registries, None, overrides).recipe.synthesis.regularizers
    assert [term.weight for term in terms] == [0.1, 3.0]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (
            "application: {name: synthesise}",
            "7:21 application.name: no name 'synthesise' among the applications; did you mean ",
        ),
        (
            "application: synthesise",
            "7:14 application.name: no name 'synthesise' among the applications; did you mean ",
        ),
        ("trackers: [cvs]", "7:12 trackers[0]: no name 'cvs' among the trackers; did you mean "),
        ("latency: 3", "7:10 latency: should be a mapping, not a number (got 3)"),
        (
            "presets: {a: {synthesis: {regularizers: {tvv: 1, tv: x}}}}",
            "7:47 synthesis.regularizers.tvv: no name 'tvv' among the regularizers; did you mean",
        ),
    ],
)
def test_what_is_written_short_and_wrong(recipe_file: Write, line: str, message: str) -> None:
    text = RUNNABLE if not line.startswith("app") else RUNNABLE[: RUNNABLE.index("application")]
    path = recipe_file(text.rstrip() + "\n" + line + "\n")
    number = path.read_text().rstrip().count("\n") + 1
    found = problems(path)
    assert found[0].startswith(f"{path}:{message.replace('7:', f'{number}:')}")


@pytest.mark.parametrize("name", ["copy", "json", "schema", "validate", "dict", "model_fields"])
def test_an_option_of_a_plugin_may_have_any_name(name: str) -> None:
    made = build_registries()
    made["regularizers"].register(
        "mine", make_dataclass("Mine", [(name, int, 3)], bases=(Smooth,)), "me"
    )
    assert getattr(build_entry(made, "regularizers", {"name": "mine", name: 5}), name) == 5


Mutate = Callable[[st.DataObject, dict[str, Any]], None]

VALID: dict[str, Any] = {
    **yaml.safe_load(RUNNABLE),
    "seed": 0,
    "device": "cpu",
    "description": "words",
    "synthesis": {
        "name": "deepinversion",
        "images": 4,
        "stages": [{"steps": 1, "size": [8, 8]}, {"steps": 2, "lr": 0.1}],
        "betas": [0.5, 0.9],
        "labels": [1, 2],
        "regularizers": [{"name": "tv", "weight": 0.1}, {"name": "bn_feature"}],
    },
    "application": prune(limits={"chunk": 2}, recovery={"epochs": 1}),
    "latency": {"name": "torch-cpu"},
    "evaluation": {"source": "torchvision", "dataset": "CIFAR10", "arguments": {"train": False}},
    "trackers": [{"name": "csv"}],
    "presets": {"smoke": {"synthesis": {"images": 1}}, "other": {"seed": 1}},
}


def said_of_a_mutated_recipe(
    data: st.DataObject, tmp_path: Path, registries: Registries, mutate: Mutate
) -> str:
    recipe = copy.deepcopy(VALID)
    mutate(data, recipe)
    path = tmp_path / "mutated.yaml"
    path.write_text(yaml.safe_dump(recipe, sort_keys=False), encoding="utf-8")
    preset = data.draw(st.sampled_from([None, "smoke", "nope"]), label="preset")
    try:
        loaded = read_recipe(path, lambda plugins: registries, preset)
    except DreamkitError as error:
        message = str(error)
    else:
        message = "read"
        assert yaml.safe_load(loaded.resolved_yaml())["name"] == loaded.recipe.name
    assert "Node(" not in message
    return message.strip()


MUTATED = settings(
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


@settings(MUTATED, max_examples=150)
@given(data=st.data())
def test_any_recipe_is_read_or_refused_with_a_message(
    data: st.DataObject, tmp_path: Path, registries: Registries, mutate: Mutate
) -> None:
    assert said_of_a_mutated_recipe(data, tmp_path, registries, mutate)


@pytest.mark.slow
@settings(MUTATED, max_examples=5000)
@given(data=st.data())
def test_five_thousand_recipes_are_read_or_refused(
    data: st.DataObject, tmp_path: Path, registries: Registries, mutate: Mutate
) -> None:
    assert said_of_a_mutated_recipe(data, tmp_path, registries, mutate)


def test_the_registries_of_the_package_can_all_be_resolved(registries: Registries) -> None:
    for kind, registry in registries.by_kind.items():
        for name in registry:
            assert importlib.import_module(registry.resolve(name).__module__), (kind, name)
