"""YAML as recipes read it: YAML 1.2's scalars, places kept, nothing that runs code."""

from __future__ import annotations

import math
import time
from typing import Any

import pytest

from dreamkit.errors import RecipeError
from dreamkit.recipe.yaml_nodes import MAX_NODES, Node, Position, parse_yaml, type_name


def value(text: str) -> Any:
    return parse_yaml(f"a: {text}\n", "r.yaml").plain()["a"]


def refusal(text: str) -> str:
    with pytest.raises(RecipeError) as caught:
        parse_yaml(text, "r.yaml")
    return caught.value.message


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("1e-5", 1e-5),
        ("1E3", 1000.0),
        (".5", 0.5),
        ("5.", 5.0),
        ("-1.5e+3", -1500.0),
        ("0x1F", 31),
        ("0o17", 15),
        ("017", 17),
        ("-3", -3),
        ("+3", 3),
        ("0", 0),
        ("-.inf", -math.inf),
        ('!!int "5"', 5),
        ("!!float 3", 3.0),
    ],
)
def test_numbers_are_those_of_yaml_1_2(text: str, expected: float) -> None:
    found = value(text)
    assert found == expected
    assert type(found) is type(expected)


def test_not_a_number_is_a_float() -> None:
    assert math.isnan(value(".nan"))


@pytest.mark.parametrize("text", ["true", "True", "TRUE"])
def test_true(text: str) -> None:
    assert value(text) is True


@pytest.mark.parametrize("text", ["false", "False", "FALSE"])
def test_false(text: str) -> None:
    assert value(text) is False


@pytest.mark.parametrize("text", ["~", "null", "Null", "NULL", "", "# only a comment"])
def test_null(text: str) -> None:
    assert value(text) is None


@pytest.mark.parametrize(
    "text",
    [
        "no",
        "yes",
        "on",
        "off",
        "y",
        "n",
        "No",
        "YES",
        "tRue",
        "nUll",
        "2020-01-01",
        "12:30:00",
        "1_000",
        "0b11",
        "-0x1F",
        "0o8",
        "1e",
        "e5",
        ".",
        "<<",
        "=",
    ],
)
def test_everything_else_is_a_string(text: str) -> None:
    assert value(text) == text


def test_quotes_make_a_string() -> None:
    assert value('"5"') == "5"
    assert value("'true'") == "true"
    assert value("!!str 5") == "5"


def test_a_merge_key_is_no_merge() -> None:
    assert value("{<<: {b: 1}, c: 2}") == {"<<": {"b": 1}, "c": 2}


def test_keys_are_strings() -> None:
    assert parse_yaml("1: a\ntrue: b\n~: c\n", "r.yaml").plain() == {
        "1": "a",
        "true": "b",
        "~": "c",
    }


def test_an_empty_document_is_null_at_its_start() -> None:
    node = parse_yaml("# nothing here\n", "r.yaml")
    assert node.value is None
    assert str(node.where) == "r.yaml:1:1"


def test_places_of_nested_values() -> None:
    text = "name: x\nsynthesis:\n  stages:\n    - {steps: 20, size: 8}\n    - steps: 30\n"
    root = parse_yaml(text, "dir/r.yaml")

    def place(*path: str | int) -> str:
        node: Node | None = root
        for step in path:
            assert node is not None
            node = node.child(step)
        assert node is not None
        return str(node.where)

    assert place() == "dir/r.yaml:1:1"
    assert place("name") == "dir/r.yaml:1:7"
    assert place("synthesis") == "dir/r.yaml:3:3"
    assert place("synthesis", "stages", 0) == "dir/r.yaml:4:7"
    assert place("synthesis", "stages", 0, "steps") == "dir/r.yaml:4:15"
    assert place("synthesis", "stages", 0, "size") == "dir/r.yaml:4:25"
    assert place("synthesis", "stages", 1, "steps") == "dir/r.yaml:5:14"
    assert root.keys == {
        "name": Position("dir/r.yaml", 1, 1),
        "synthesis": Position("dir/r.yaml", 2, 1),
    }


def test_child_of_what_is_not_there() -> None:
    root = parse_yaml("a: [1]\nb: 2\n", "r.yaml")
    assert root.child("c") is None
    items = root.child("a")
    assert items is not None
    assert items.child(1) is None
    assert items.child("0") is None
    scalar = root.child("b")
    assert scalar is not None
    assert scalar.child("x") is None


def test_an_alias_gives_the_same_value_at_the_place_of_its_anchor() -> None:
    root = parse_yaml("a: &x {b: 1}\nc: *x\n", "r.yaml")
    assert root.plain() == {"a": {"b": 1}, "c": {"b": 1}}


@pytest.mark.parametrize(
    ("text", "second", "first"),
    [
        ("a: 1\nb: 2\na: 3\n", "r.yaml:3:1", "r.yaml:1:1"),
        ("x:\n  a: 1\n  a: 1\n", "r.yaml:3:3", "r.yaml:2:3"),
        ("x: [{a: 1, a: 2}]\n", "r.yaml:1:12", "r.yaml:1:6"),
        ('a: 1\n"a": 2\n', "r.yaml:2:1", "r.yaml:1:1"),
    ],
)
def test_a_key_that_stands_twice_is_refused_with_both_places(
    text: str, second: str, first: str
) -> None:
    assert refusal(text) == f"{second} the key 'a' stands twice; it was first at {first}"


@pytest.mark.parametrize(
    ("text", "tag"),
    [
        ("a: !!python/object:os.system {}\n", "!!python/object:os.system"),
        ("a: !!python/object/apply:os.system [id]\n", "!!python/object/apply:os.system"),
        ("a: !!python/name:os.system ''\n", "!!python/name:os.system"),
        ("a: !!binary aGk=\n", "!!binary"),
        ("a: !!set {x, y}\n", "!!set"),
        ("a: !!omap [x: 1]\n", "!!omap"),
        ("a: !!timestamp 2020-01-01\n", "!!timestamp"),
        ("a: !mine {b: 1}\n", "!mine"),
    ],
)
def test_other_tags_are_refused(text: str, tag: str) -> None:
    assert refusal(text) == f"r.yaml:1:4 the tag {tag} is not allowed in a recipe"


@pytest.mark.parametrize("text", ["!!int abc", "!!float x", "!!bool maybe", "!!null x"])
def test_a_value_that_its_tag_does_not_fit_is_refused(text: str) -> None:
    assert refusal(f"a: {text}\n").startswith("r.yaml:1:4 ")


def test_an_integer_too_long_for_python_is_refused() -> None:
    message = refusal(f"a: {'1' * 5000}\n")
    assert message.startswith("r.yaml:1:4 ")
    assert len(message) < 400


def test_an_escape_beyond_unicode_is_refused() -> None:
    assert refusal('a: "\\UFFFFFFFF"\n').startswith("r.yaml")


def test_half_a_surrogate_pair_is_refused_where_it_stands() -> None:
    assert refusal('b: 1\na: "\\ud800"\n').startswith("r.yaml:2:4 ")


def test_an_alias_bomb_is_refused_quickly() -> None:
    lines = ["a: &a [x, x, x, x, x, x, x, x, x, x]"]
    for before, name in zip("abcdefghi", "bcdefghij", strict=True):
        lines.append(f"{name}: &{name} [{', '.join(['*' + before] * 10)}]")
    start = time.perf_counter()
    message = refusal("\n".join(lines))
    assert time.perf_counter() - start < 5
    assert f"more than {MAX_NODES} nodes" in message


@pytest.mark.parametrize("text", ["a: &x [*x]\n", "a: &x {b: *x}\n"])
def test_an_alias_inside_its_own_anchor_is_refused(text: str) -> None:
    assert refusal(text).startswith("r.yaml")


@pytest.mark.parametrize(
    ("text", "place"),
    [
        ("name: x\na: [1\n", "r.yaml:3:1"),
        ("name: x\nb: c: d\n", "r.yaml:2:5"),
        ("name: x\n\ta: 1\n", "r.yaml:2:1"),
        ('name: "x\n', "r.yaml:2:1"),
        ("a: *nobody\n", "r.yaml:1:4"),
        ("a: 1\n---\nb: 2\n", "r.yaml:2:1"),
    ],
)
def test_a_syntax_error_has_its_place(text: str, place: str) -> None:
    assert refusal(text).startswith(f"{place} not valid YAML: ")


def test_a_key_that_is_a_list_is_refused() -> None:
    assert refusal("? [a, b]\n: 1\n") == "r.yaml:1:3 a key must be a plain word"


@pytest.mark.parametrize("text", ["[" * 5000, "{a: " * 3000, "- " * 3000, "[" * 600 + "]" * 600])
def test_deep_nesting_is_a_recipe_error(text: str) -> None:
    assert "nested too deeply" in refusal(text)


@pytest.mark.parametrize("text", ["a: \x00", "a: \x07", "a: \ufffe"])
def test_bytes_that_are_no_text_are_refused(text: str) -> None:
    assert refusal(text).startswith("r.yaml: not a text file")


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("{a: 1}", "a mapping"),
        ("[1]", "a list"),
        ("x", "a string"),
        ("true", "a boolean"),
        ("1", "a number"),
        ("1.5", "a number"),
        ("~", "null"),
    ],
)
def test_types_are_named_as_users_call_them(text: str, name: str) -> None:
    assert type_name(value(text)) == name


def test_a_position_prints_as_editors_take_it() -> None:
    assert str(Position("r.yaml", 3, 7)) == "r.yaml:3:7"
    assert str(Position("--set a.b")) == "--set a.b"
