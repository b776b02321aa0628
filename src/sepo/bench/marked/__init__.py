"""Texts of people and of real models in which the wrong part is marked, to test token rewards against."""
