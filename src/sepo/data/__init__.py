"""Preference data: a source -> validated pairs -> token ids -> train and held out -> tables on disk.

loading  formats    sources: hub id, folder, file, rows in memory; file formats
pairing             labels, scores and ranks -> chosen and rejected
messages  rows      any preference format -> prompt, chosen, rejected
templates  chat     rendering of conversations by the model's chat template
thinking            the thinking before an answer
encoding            text -> token ids, with a fixed boundary between prompt and response
workers             work on parts of a dataset in other processes
vocabulary          token id -> bytes
spool               rows of a table larger than memory, on disk
splits              train and held-out pairs by prompt
tables  ragged      parquet tables with provenance; list columns as flat arrays
fingerprints        hashes of tokenizers and datasets
previews            prompts without the text that all of them share
"""

from sepo.lazy import lazy_names

__getattr__ = lazy_names(
    __name__,
    {
        "load_preferences": "sepo.data.loading",
        "sample_pairs": "sepo.data.splits",
        "split_pairs": "sepo.data.splits",
        "tokenize_pairs": "sepo.data.encoding",
    },
)
