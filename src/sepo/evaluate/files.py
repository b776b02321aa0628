"""What an evaluation writes beside its figures: all that was measured, a few answers for people, a judge's verdicts;
and until it is done the finished answers of each model, from which an interrupted one goes on.
"""

GENERATIONS, EXAMPLES, ANNOTATIONS = "generations.parquet", "examples.parquet", "annotations.json"
FINISHED = "finished-{}.jsonl"
