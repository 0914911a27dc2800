"""Recipes: YAML with places kept, presets and overrides, validated against the registries."""

from dreamkit.recipe.options import build_entry, build_options
from dreamkit.recipe.schema import LoadedRecipe, Recipe, read_recipe, validate_recipe

__all__ = [
    "LoadedRecipe",
    "Recipe",
    "build_entry",
    "build_options",
    "read_recipe",
    "validate_recipe",
]
