"""Runs: the stages of a recipe in one folder, grids of runs, dry runs."""
