"""Recipes: every setting of a run, and grids of them, read from YAML."""
