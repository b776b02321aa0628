"""The one forward path: log-probabilities of target tokens, given packed pairs.

packing                          pairs -> rows without padding, every prompt once
attention  _cpu  _cuda           every document of a row on its own
layers  rotary  last_block       what is faster, or keeps less, than a model's own
gradients  memory                gradients added by the matmul; freed memory kept
lm_head                          log-probabilities without a [targets, vocabulary] tensor
logps  token_kl                  token_logps(model, batch), and the KL at every target
prepare                          which layout a model takes: tried out, not believed
passes  speed                    a frozen model over a dataset; how fast a device is
"""
