"""Preference data: a source -> validated pairs -> token ids -> train and held out -> tables on disk.

loading  formats    any source: hub id, folder, file, rows in memory
pairing             labels, scores and ranks -> chosen and rejected
messages  rows      any preference format -> prompt, chosen, rejected
templates  chat     conversations as the model's chat template writes them
encoding            text -> token ids, with a firm boundary between prompt and response
splits              train and held out by prompt
tables  ragged      parquet tables with provenance; list columns as flat arrays
fingerprints        what a tokenizer and a dataset are
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
