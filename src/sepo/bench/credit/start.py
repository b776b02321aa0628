"""A small start for the planted tasks, trained from scratch in minutes: it answers in the task's form, often wrongly.

SmolLM2 would do as well, but a grid of hundreds of policies should fit two cores. The start is a Llama of 0.8 million
weights with a byte-level tokenizer of the task's own texts (digits one by one). It first reads right demonstrations,
then ones in which a step is wrong with the same probability as in the pairs: it knows the task, and errs as the pairs
do.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.nn import functional
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from sepo import processes
from sepo.bars import progress_bar

END, PAD = "<|end|>", "<|pad|>"
TEMPLATE = (
    "{% for message in messages %}{{ '<|' + message.role + '|>' + message.content }}"
    "{% if message.role == 'assistant' %}{{ '<|end|>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


def make_start(
    demos: Sequence[tuple[str, str]], folder: Path, *, batch: int = 16, rate: float = 2e-3, seed: int = 0
) -> Path:
    """Train a start on (question, answer) texts, in their order, and save it with its tokenizer; returns `folder`."""
    torch.manual_seed(seed)
    tokenizer = train_tokenizer([f"{question} {answer}" for question, answer in demos[:2000]])
    end, pad = (tokenizer.get_vocab()[name] for name in (END, PAD))
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer), hidden_size=128, intermediate_size=384, num_hidden_layers=4,
            num_attention_heads=4, num_key_value_heads=4, max_position_embeddings=512, tie_word_embeddings=True,
            bos_token_id=None, eos_token_id=end, pad_token_id=pad,
        )
    )  # fmt: skip
    steps = len(demos) // batch
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, betas=(0.9, 0.98), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1.0, (step + 1) / 100) * 0.5 * (1 + math.cos(math.pi * step / steps))
    )
    with progress_bar(True, total=steps, desc="start") as progress:
        for step in range(steps):
            ids, labels = _batch(tokenizer, demos[step * batch : (step + 1) * batch])
            logits = model(ids).logits[:, :-1]
            loss = functional.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
            progress.update()
    processes.log(f"  start: {steps} steps, loss {loss.item():.3f} nats a token")
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def train_tokenizer(texts: Sequence[str]) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer of the texts, with digits one by one and a chat template."""
    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    inner.decoder = decoders.ByteLevel()
    special = [PAD, END, "<|system|>", "<|user|>", "<|assistant|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    inner.train_from_iterator(
        texts,
        trainers.BpeTrainer(vocab_size=512, special_tokens=special, initial_alphabet=alphabet, show_progress=False),
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=inner,
        eos_token=END,
        pad_token=PAD,
        additional_special_tokens=special[2:],
        chat_template=TEMPLATE,
    )


def _batch(tokenizer: PreTrainedTokenizerFast, demos: Sequence[tuple[str, str]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Padded ids and labels `[demos, tokens]`; only answers are labelled."""
    texts = [(f"<|user|>{question}<|assistant|>", f"{answer}{END}") for question, answer in demos]
    prompts, answers = (
        [tokenizer(part, add_special_tokens=False)["input_ids"] for part in side] for side in zip(*texts, strict=True)
    )
    width = max(len(prompt) + len(answer) for prompt, answer in zip(prompts, answers, strict=True))
    ids = torch.full((len(texts), width), tokenizer.pad_token_id)
    labels = torch.full_like(ids, -100)
    for row, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
        end = len(prompt) + len(answer)
        ids[row, :end] = torch.tensor(prompt + answer)
        labels[row, len(prompt) : end] = torch.tensor(answer)
    return ids, labels
