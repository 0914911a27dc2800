"""The JSON Schema of a recipe, by which an editor completes and checks one as it is written."""

from __future__ import annotations

from typing import Any

from pydantic import TypeAdapter
from pydantic.json_schema import GenerateJsonSchema

from dreamkit.recipe.construct import options_adapter
from dreamkit.recipe.schema import Recipe
from dreamkit.recipe.shares import SHARE_SCHEMA
from dreamkit.recipe.signature import option_rows
from dreamkit.registry import KINDS, WEIGHT_SCHEMA, Registries, name_key


class _Quiet(GenerateJsonSchema):
    """Leaves out defaults that JSON cannot say, without a warning."""

    ignored_warning_kinds = {"skipped-choice", "non-serializable-default"}  # noqa: RUF012


def recipe_schema(registries: Registries) -> dict[str, Any]:
    """Return the JSON Schema of a recipe, with the entries that there are.

    It says less than reading a recipe does: constructors' own checks are not in it.

    Raises:
        PluginError: an entry registered by reference cannot be imported.
    """
    classes: dict[Any, type[Any]] = {
        (kind, name): registries[kind].resolve(name) for kind in KINDS for name in registries[kind]
    }
    classes["recipe"] = Recipe
    adapters = [(key, "validation", options_adapter(cls)) for key, cls in classes.items()]
    made, shared = TypeAdapter.json_schemas(adapters, schema_generator=_Quiet)  # type: ignore[arg-type]
    for key, cls in classes.items():
        for row in option_rows(cls):
            made[key, "validation"]["properties"][row.name]["description"] = row.help
    root = made["recipe", "validation"]
    root["properties"]["presets"] = {"type": ["object", "null"]}
    definitions = dict(shared.get("$defs", {}))
    for kind in KINDS:
        names, key = list(registries[kind]), name_key(kind)
        weight, share = {"weight": WEIGHT_SCHEMA}, {"share": SHARE_SCHEMA}
        for prefix, more in (("", {}), ("weighted_", weight), ("shared_", share)):
            entries: list[Any] = [{"enum": names}]
            if kind == "teachers":
                entries.append({"type": "string", "pattern": "^[^:]+:.+$"})
            for name in names:
                entry = made[(kind, name), "validation"]
                properties = {key: {"const": name}, **more, **entry.get("properties", {})}
                required = [key, *entry.get("required", [])]
                entries.append({**entry, "properties": properties, "required": required})
            definitions[f"{prefix}{kind}"] = {"anyOf": entries}
    schema = _closed({**root, "$defs": definitions})
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema}


def _closed(schema: Any) -> Any:
    """Return the schema with references to entries followed and unknown options refused."""
    if isinstance(schema, list):
        return [_closed(part) for part in schema]
    if not isinstance(schema, dict):
        return schema
    closed = {"$ref" if key == "$entry" else key: _closed(v) for key, v in schema.items()}
    return {**closed, "additionalProperties": False} if "properties" in schema else closed
