"""Presets and ``--set`` laid over a recipe."""

from __future__ import annotations

from typing import Any

import pytest

from dreamkit.errors import RecipeError, RecipePath
from dreamkit.recipe.overlay import apply_override, merge, parse_path
from dreamkit.recipe.yaml_nodes import Node, parse_yaml

BASE = """\
teacher: {source: timm, model: resnet18}
synthesis:
  images: 64
  stages: [{steps: 20}, {steps: 30}]
  nothing: null
"""


def base() -> Node:
    return parse_yaml(BASE, "base.yaml")


def merged(under: str, over: str) -> Any:
    return merge(parse_yaml(under, "base.yaml"), parse_yaml(over, "over.yaml")).plain()


def overridden(text: str, under: str = BASE) -> Any:
    return apply_override(parse_yaml(under, "base.yaml"), text).plain()


def refusal(text: str) -> str:
    with pytest.raises(RecipeError) as caught:
        apply_override(base(), text)
    return caught.value.message


@pytest.mark.parametrize(
    ("under", "over", "expected"),
    [
        ("{a: {b: 1, c: 2}}", "{a: {c: 3, d: 4}}", {"a": {"b": 1, "c": 3, "d": 4}}),
        (
            "{a: {b: {c: {d: 1, e: 2}}}}",
            "{a: {b: {c: {d: 9}}}}",
            {"a": {"b": {"c": {"d": 9, "e": 2}}}},
        ),
        ("{a: [1, 2, 3]}", "{a: [4]}", {"a": [4]}),
        ("{a: [{b: 1, c: 2}]}", "{a: [{b: 3}]}", {"a": [{"b": 3}]}),
        ("{a: {b: 1}}", "{a: null}", {"a": None}),
        ("{a: null}", "{a: {b: 1}}", {"a": {"b": 1}}),
        ("{a: 1}", "{a: {b: 1}}", {"a": {"b": 1}}),
        ("{a: {b: 1}}", "{a: 2}", {"a": 2}),
        ("{a: 1}", "{}", {"a": 1}),
        # An entry written as its bare name, and terms as a mapping of weights.
        ("{a: one}", "{a: {name: two, lr: 3}}", {"a": {"name": "two", "lr": 3}}),
        ("{a: {name: one, lr: 3}}", "{a: two}", {"a": "two"}),
        ("{a: {x: 1, y: 2}}", "{a: {y: 3, z: 4}}", {"a": {"x": 1, "y": 3, "z": 4}}),
        ("{a: {x: 1}}", "{a: [{name: y}]}", {"a": [{"name": "y"}]}),
    ],
)
def test_mappings_merge_and_all_else_replaces(under: str, over: str, expected: Any) -> None:
    assert merged(under, over) == expected


@pytest.mark.parametrize("key", ["name", "source"])
def test_another_entry_replaces_the_whole_mapping(key: str) -> None:
    under = f"{{part: {{{key}: one, lr: 3, steps: 4}}}}"
    assert merged(under, f"{{part: {{{key}: two, size: 8}}}}") == {"part": {key: "two", "size": 8}}


@pytest.mark.parametrize("key", ["name", "source"])
def test_the_same_entry_named_again_merges(key: str) -> None:
    under = f"{{part: {{{key}: one, lr: 3}}}}"
    expected = {"part": {key: "one", "lr": 3, "size": 8}}
    assert merged(under, f"{{part: {{{key}: one, size: 8}}}}") == expected


def test_neither_side_is_changed_by_a_merge() -> None:
    under, over = parse_yaml("{a: {b: 1}}", "u"), parse_yaml("{a: {c: 2}}", "o")
    merge(under, over)
    assert under.plain() == {"a": {"b": 1}}
    assert over.plain() == {"a": {"c": 2}}


def test_each_merged_value_keeps_its_own_place() -> None:
    under, over = (
        parse_yaml("a: {b: 1,\n  c: 2}\n", "base.yaml"),
        parse_yaml("a:\n  c: 3\n", "over.yaml"),
    )
    part = merge(under, over).child("a")
    assert part is not None
    places = {key: str(child.where) for key, child in part.value.items()}
    assert places == {"b": "base.yaml:1:8", "c": "over.yaml:2:6"}
    assert str(part.keys["b"]) == "base.yaml:1:5"
    assert str(part.keys["c"]) == "over.yaml:2:3"


@pytest.mark.parametrize(
    ("text", "path"),
    [
        ("a", ("a",)),
        ("a.b.c", ("a", "b", "c")),
        ("a[0]", ("a", 0)),
        ("a[0].b[12]", ("a", 0, "b", 12)),
        ("a.0.b", ("a", 0, "b")),
        ("a-b.c_d", ("a-b", "c_d")),
    ],
)
def test_paths(text: str, path: RecipePath) -> None:
    assert parse_path(text) == path


@pytest.mark.parametrize(
    "text", ["a..b", ".a", "a.", "a[", "a[x]", "a[-1]", "a b", "a]", "a. b", "[]"]
)
def test_what_is_no_path_is_refused(text: str) -> None:
    with pytest.raises(RecipeError, match="not a path such as"):
        parse_path(text)


def test_an_override_replaces_a_nested_value() -> None:
    changed = overridden("synthesis.images=8")
    assert changed["synthesis"]["images"] == 8
    assert changed["synthesis"]["stages"] == [{"steps": 20}, {"steps": 30}]


@pytest.mark.parametrize("path", ["synthesis.stages[1].steps", "synthesis.stages.1.steps"])
def test_an_override_reaches_into_a_list(path: str) -> None:
    stages = overridden(f"{path}=7")["synthesis"]["stages"]
    assert stages == [{"steps": 20}, {"steps": 7}]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("x=1e-5", 1e-5),
        ("x=no", "no"),
        ("x=true", True),
        ("x=null", None),
        ("x=", None),
        ("x=[1, {a: 2}]", [1, {"a": 2}]),
        ("x=a=b", "a=b"),
        ('x="5"', "5"),
    ],
)
def test_the_value_of_an_override_is_yaml(text: str, expected: Any) -> None:
    assert overridden(text)["x"] == expected


def test_an_override_makes_the_mappings_on_its_way() -> None:
    assert overridden("a.b.c=1", "{}") == {"a": {"b": {"c": 1}}}
    assert overridden("synthesis.nothing.b=1")["synthesis"]["nothing"] == {"b": 1}


def test_an_override_by_a_mapping_merges_or_names_another_entry() -> None:
    assert overridden("teacher={model: resnet34}")["teacher"] == {
        "source": "timm",
        "model": "resnet34",
    }
    assert overridden("teacher={source: bundled}")["teacher"] == {"source": "bundled"}


def test_an_override_leaves_the_base_alone() -> None:
    under = base()
    apply_override(under, "synthesis.stages[0].steps=1")
    assert under.plain() == parse_yaml(BASE, "base.yaml").plain()


def test_the_place_of_an_override_is_the_option() -> None:
    root = apply_override(base(), "synthesis.stages[0]={steps: 5, deep: {list: [1]}}")
    node: Node | None = root
    for step in ("synthesis", "stages", 0, "deep"):
        assert node is not None
        node = node.child(step)
    assert node is not None
    where = "--set synthesis.stages[0]"
    assert str(node.where) == str(node.keys["list"]) == where
    assert str(node.value["list"].value[0].where) == where
    untouched = root.child("synthesis")
    assert untouched is not None
    assert str(untouched.value["images"].where) == "base.yaml:3:11"


@pytest.mark.parametrize("text", ["synthesis.images", "=3", ""])
def test_an_override_without_path_or_value_is_refused(text: str) -> None:
    assert refusal(text) == f"--set {text}: write it as path=value, e.g. synthesis.images=64"


def test_an_override_into_a_scalar_is_refused() -> None:
    message = refusal("synthesis.images.x=3")
    assert message == "--set synthesis.images.x: 'x' leads into a number, not a mapping"
    assert "leads into a string" in refusal("teacher.model.x=3")


@pytest.mark.parametrize("step", ["[2]", ".2", ".first", ".-1"])
def test_an_index_that_is_not_there_is_refused(step: str) -> None:
    message = refusal(f"synthesis.stages{step}=3")
    assert message.startswith(f"--set synthesis.stages{step}: ")
    assert message.endswith("is not an index of a list of 2")


def test_an_index_of_thousands_of_digits_is_refused() -> None:
    assert refusal(f"synthesis.stages[{'1' * 5000}]=3").startswith("--set synthesis.stages[1")


def test_a_path_of_thousands_of_steps_is_refused() -> None:
    assert refusal(".".join(["a"] * 3000) + "=3").startswith("--set a.a")


def test_a_value_that_is_no_yaml_is_refused() -> None:
    message = refusal("synthesis.images=[1")
    assert message.startswith("--set synthesis.images=[1")
    assert "not valid YAML" in message
