"""What an evaluation writes beside its figures: all that was measured, a few answers for people, a judge's verdicts."""

GENERATIONS, EXAMPLES, ANNOTATIONS = "generations.parquet", "examples.parquet", "annotations.json"
