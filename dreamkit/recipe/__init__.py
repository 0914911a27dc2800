"""Recipes: YAML with places kept, presets and overrides, validated against the registries."""

from dreamkit.recipe.schema import (
    LoadedRecipe,
    Recipe,
    build_entry,
    build_options,
    read_recipe,
    validate_recipe,
)

__all__ = [
    "LoadedRecipe",
    "Recipe",
    "build_entry",
    "build_options",
    "read_recipe",
    "validate_recipe",
]
