"""The one forward path: log-probabilities of target tokens, given packed pairs.

packing                   pairs -> rows without padding, every prompt once
attention  _cpu  _cuda    attention within each document of a packed row
layers  _cuda  rotary     faster layers that keep less for the backward pass
gradients                 matmuls, and weight gradients added in place by the matmul
lm_head  _cuda            log-probabilities without a [targets, vocabulary] tensor
logps  token_kl           token_logps(model, batch), and the KL at every target
prepare                   picks a model's layout by trying it
scoring                   log-probabilities of a dataset under a frozen model
memory                    freed memory kept for the next tensor; peak memory
"""

import os

# oneDNN caches the machine code of its last 1,024 shapes: half a gigabyte, because packed rows have many lengths and
# each length needs a dozen shapes. It reads these limits at the first matmul of the process, so they are set on import.
# Values that the user has set stay.
for _name in ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY"):
    os.environ.setdefault(_name, "32")
