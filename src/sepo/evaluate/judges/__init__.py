"""Judges: what compares two answers, or grades one (`JudgeSettings` in recipe/settings.py). A reward model, a function, or a language model behind a server.

spec.py          what a judge is called, on the command line and in a recipe
templates.py     the words that a language model is asked with, read from files, and what its reply means
server.py        a language model behind an OpenAI-compatible server: pairs in both orders, single grades
scores.py        a reward model or a Python function: a number for each answer
compare.py       two files of answers and a judge -> annotations that `sepo winrate` reads
"""
