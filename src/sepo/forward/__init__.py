"""The one forward path: log-probabilities of target tokens, given packed pairs.

packing          pairs -> rows without padding, every prompt once
attention        attention within each document of a packed row
logps  token_kl  token_logps(model, batch), and the KL at every target
prepare          picks a model's layout by trying it
scoring          log-probabilities of a dataset under a frozen model
memory           freed memory kept for the next tensor; peak memory
"""
