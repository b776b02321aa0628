"""Recipes that come with the package: `sepo recipe --list`."""
