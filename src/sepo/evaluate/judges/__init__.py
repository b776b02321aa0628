"""Judges: what compares two answers, or grades one. `JudgeSettings` (recipe/settings.py) says which and how.

templates.py     the words that a language model is asked with, read from files, and what its reply means
server.py        a language model behind an OpenAI-compatible server: pairs in both orders, single grades
scores.py        a reward model or a Python function: a number for each answer
oracle.py        an oracle of DPO as a reward model: its summed log-ratio to the model that it was trained from
compare.py       two files of answers and a judge -> annotations that `sepo winrate` reads
in_run.py        a judge in a run: the policy's answers against the base's
"""
