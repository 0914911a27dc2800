"""Recipes to start from: one template for each application, filled in for a teacher."""
