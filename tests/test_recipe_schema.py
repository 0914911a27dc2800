"""The JSON Schema of a recipe: what editors check and complete recipes by."""

from __future__ import annotations

import json
from typing import Any

import pytest

from dreamkit.plugins import build_registries
from dreamkit.recipe.json_schema import recipe_schema
from dreamkit.recipe.signature import options_of
from dreamkit.registry import KINDS, name_key


@pytest.fixture(scope="module")
def schema() -> dict[str, Any]:
    made = recipe_schema(build_registries())
    assert json.loads(json.dumps(made)) == made
    return made


def entry(schema: dict[str, Any], definition: str, name: str) -> dict[str, Any]:
    (found,) = (
        candidate
        for candidate in schema["$defs"][definition]["anyOf"][1:]
        if {"const": name} in candidate.get("properties", {}).values()
    )
    return dict(found)


def test_every_entry_and_option_is_in_it(schema: dict[str, Any]) -> None:
    registries = build_registries()
    for kind in KINDS:
        names, key = list(registries[kind]), name_key(kind)
        assert schema["$defs"][kind]["anyOf"][0] == {"enum": names}
        for name in names:
            options = options_of(registries[kind].resolve(name))
            found = entry(schema, kind, name)
            assert set(found["properties"]) == {key, *options}
            required = {option.name for option in options.values() if option.required}
            assert set(found["required"]) == {key, *required}
            assert found["additionalProperties"] is False


def test_every_reference_leads_somewhere(schema: dict[str, Any]) -> None:
    def references(part: Any) -> list[str]:
        if isinstance(part, list):
            return [found for inner in part for found in references(inner)]
        if not isinstance(part, dict):
            return []
        own = [part["$ref"]] if "$ref" in part else []
        return own + references(list(part.values()))

    found = set(references(schema))
    assert found >= {f"#/$defs/{kind}" for kind in ("teachers", "sources", "applications")}
    assert {reference.removeprefix("#/$defs/") for reference in found} <= set(schema["$defs"])
    assert "$entry" not in json.dumps(schema)


def test_ranges_weights_and_descriptions(schema: dict[str, Any]) -> None:
    dreams = entry(schema, "synthesizers", "deepinversion")["properties"]
    assert dreams["lr"]["exclusiveMinimum"] == 0
    assert dreams["lr"]["description"] == "Adam's learning rate"
    listed, alone, weights, auto = dreams["regularizers"]["anyOf"]
    assert auto == {"const": "auto"}
    assert alone == listed["items"]
    assert listed == {"type": "array", "items": {"$ref": "#/$defs/weighted_regularizers"}}
    assert weights["additionalProperties"] == {"type": "number", "minimum": 0}
    assert "weight" in entry(schema, "weighted_regularizers", "tv")["properties"]
    student = dreams["student"]["anyOf"]
    assert student == [{"$ref": "#/$defs/teachers"}, {"type": "null"}]
    one, several = schema["properties"]["synthesis"]["anyOf"][0]["anyOf"]
    assert one == {"$ref": "#/$defs/synthesizers"}
    assert several == {"type": "array", "items": {"$ref": "#/$defs/shared_synthesizers"}}
    shared = entry(schema, "shared_synthesizers", "deepinversion")["properties"]["share"]
    assert shared == {"type": "number", "exclusiveMinimum": 0}
    assert schema["required"] == ["name", "teacher", "application"]
    assert schema["$defs"]["Stage"]["additionalProperties"] is False
    assert {"steps", "size", "lr"} == set(schema["$defs"]["Stage"]["properties"])
