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

import os

# oneDNN keeps the machine code of the last 1,024 shapes, half a gigabyte, and packed rows have many lengths, of which
# one needs a dozen shapes. It reads the limits with the first product that a process makes, whoever makes it: so they
# are set before anything here can. Those set outside stay.
for _name in ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY"):
    os.environ.setdefault(_name, "32")
