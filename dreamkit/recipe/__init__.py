"""Recipes: YAML with places kept, presets and overrides, validated against the registries."""

from dreamkit.recipe.schema import LoadedRecipe, Recipe, read_recipe

__all__ = ["LoadedRecipe", "Recipe", "read_recipe"]
