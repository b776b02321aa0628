"""Wing: trainings that end at a KL or an accuracy instead of after a number of steps.

`until` ends a training, `kl_probe` says when a measurement of the KL is due, and `stages` has what the stages of oracle
and policy use, which `sepo.api` and comparisons give to the method.
"""
