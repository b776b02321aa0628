"""Wing: a policy with another tokenizer than the oracle.

`alignment` finds the boundaries that two tokenizers share, `carry` carries token rewards over them, `stages` are the
stages "policy_pairs" and "transfer" of a run, which `sepo.api` and comparisons give to the method.
"""
