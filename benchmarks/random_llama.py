"""Write a Llama of about one billion random weights, for timings: speed does not depend on what a model knows.

    python benchmarks/random_llama.py --tokenizer MODEL --out DIR

The shape is that of Llama 3.2 1B (16 layers of 2,048, 32 heads over 8 key-value heads, MLP of 8,192, tied embeddings);
the vocabulary is the tokenizer's, rounded up to 128.
"""

from __future__ import annotations

import argparse

import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from sepo.models.names import resolve_model
from sepo.models.tokenizer import load_tokenizer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokenizer", required=True, help="model whose tokenizer and vocabulary it takes")
    parser.add_argument("--out", required=True, help="folder to write")
    parser.add_argument("--layers", type=int, default=16)
    arguments = parser.parse_args()
    tokenizer = load_tokenizer(resolve_model(arguments.tokenizer))
    config = LlamaConfig(
        vocab_size=-(-len(tokenizer) // 128) * 128,
        hidden_size=2048,
        intermediate_size=8192,
        num_hidden_layers=arguments.layers,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=64,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(arguments.out)
    tokenizer.save_pretrained(arguments.out)
    print(f"{sum(p.numel() for p in model.parameters()) / 1e9:.2f} billion weights in {arguments.out}")


if __name__ == "__main__":
    main()
