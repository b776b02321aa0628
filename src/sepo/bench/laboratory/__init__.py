"""The laboratory of token credit: a language that can be enumerated, so that the truth of every token is known.

tree.py       the language, its rewards, and exact values
training.py   pairs, and oracles and policies trained on them
measures.py   how well token scores agree with a truth
study.py      the experiments
page.py       the results as Markdown and a figure
"""
