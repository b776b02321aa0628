"""A library of tensor operations that are faster, or keep less, than the ordinary ones and give the same numbers.

It knows nothing of pairs, recipes or stages; the forward path is built on it, as it is on PyTorch.

layout                     where the documents of a packed row are
attention_cpu  _cuda       attention within each document
layers  _cuda  rotary      linear layers, embeddings, norms, gated MLPs, rotary embeddings
gradients                  matmuls, and weight gradients added in place by the matmul
lm_head  _cuda             log-probabilities without a [targets, vocabulary] tensor
"""

import os

# oneDNN caches the machine code of its last 1,024 shapes: half a gigabyte, because packed rows have many lengths and
# each length needs a dozen shapes. It reads these limits at the first matmul of the process, so they are set on import.
# Values that the user has set stay.
for _name in ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY"):
    os.environ.setdefault(_name, "32")
