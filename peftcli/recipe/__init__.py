"""Recipes: the schema, reading with faults in their places, and writing back."""

from __future__ import annotations

from peftcli.recipe.load import LoadedRecipe, load_recipe, parse_recipe
from peftcli.recipe.schema import Recipe

__all__ = ["LoadedRecipe", "Recipe", "load_recipe", "parse_recipe"]
