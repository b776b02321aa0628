"""Preference data from a model's own answers: sample, score, pair, and rounds of it (wing).

prompts      prompts of a file, an embedded task, or a table of pairs
answers      several answers to each prompt by Transformers, vLLM or a server, resumable
scores       their scores: gold reward, judge, or oracle
responses    the responses table: one row a prompt
pairs        preference pairs of it, and what score and length have in common
folder       the folder of pairs with its data card
stages       the stages that `data.on_policy` adds to a run before its data
rounds  rounds_report     `rounds`: one run after the other, each on the answers of the policy before
best         best of n, a baseline without training
commands     `sepo sample`, `sepo pairs`, `sepo best-of`
"""
