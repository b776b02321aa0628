"""Evaluation of a policy: accuracy, gold rewards, generation, fidelity of token rewards, statistics.

The names are those of the files that an evaluation writes beside its metrics: all responses, a few answers to read, and
a judge's verdicts.
"""

GENERATIONS, EXAMPLES, ANNOTATIONS = "generations.parquet", "examples.parquet", "annotations.json"
