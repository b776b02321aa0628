"""Small real tokenizers, one for each way in which tokens encode bytes, and texts that test them.

gpt2        byte-level BPE
qwen        byte-level BPE after NFC, other splits
llama2      "▁" with byte fallback, a space put before every text
gemma       "▁" with byte fallback, no such space; its chat template trims
wordpiece   lower case, without accents or white space, with an unknown token
"""

from __future__ import annotations

import json

import numpy as np
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

CORPUS = [
    "The sky is blue and the grass is green. What colour is the sky? It is blue, I think; truly wonderful weather.",
    "def total(rows):\n    return sum(row['price'] * 1.2 for row in rows)\n\nprint(total([]))  # nothing\n",
    "Müller's café serves naïve crêpes, voilà! Ça coûte 3,50 €. Ελληνικά και русский текст, день за днём.",
    "東京の天気はよいです。今日は世界へ。 한국어 문장입니다. שלום עולם. مرحبا بالعالم. नमस्ते दुनिया।",
    "1 2 3 2024 3.14159 0xFF 👩‍👩‍👧 ☕ 🇩🇪 hello hello world world unhappiness wonderful terrible\t\ttabs\n\n\nlines",
]
KINDS = ("gpt2", "qwen", "llama2", "gemma", "wordpiece")
_TURN = (
    "{{% for m in messages %}}{{{{ '<|' + m['role'] + '|>\n' + m['content']{trim} + '{end}\n' }}}}{{% endfor %}}"
    "{{% if add_generation_prompt %}}{{{{ '<|assistant|>\n' }}}}{{% endif %}}"
)
_SPECIAL = ["<pad>", "<unk>", "<s>", "</s>", "<|user|>", "<|assistant|>", "<|end|>"]


def tiny_tokenizer_of(kind: str) -> PreTrainedTokenizerFast:
    """Train a tokenizer of this kind on `CORPUS`; it has a chat template."""
    backend = {"gpt2": _byte_level, "qwen": _byte_level, "wordpiece": _word_piece}.get(kind, _sentence_piece)(kind)
    backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in _SPECIAL])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", bos_token="<s>", eos_token="<|end|>",
        unk_token="<unk>" if kind == "wordpiece" else None,
    )  # fmt: skip
    tokenizer.chat_template = _TURN.format(trim=" | trim" if kind == "gemma" else "", end="<|end|>")
    return tokenizer


def _byte_level(kind: str) -> Tokenizer:
    backend = Tokenizer(models.BPE())
    if kind == "qwen":
        backend.normalizer = normalizers.NFC()
        split = pre_tokenizers.Split(Regex(r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s+"), "isolated")
        backend.pre_tokenizer = pre_tokenizers.Sequence(
            [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
        )
    else:
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    letters = pre_tokenizers.ByteLevel.alphabet()
    size = 420 if kind == "qwen" else 360
    backend.train_from_iterator(
        CORPUS, trainers.BpeTrainer(vocab_size=size, initial_alphabet=letters, show_progress=False)
    )
    return backend


def _sentence_piece(kind: str) -> Tokenizer:
    backend = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    replace = normalizers.Replace(" ", "▁")
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), replace]) if kind == "llama2" else replace
    byte_tokens = [f"<0x{i:02X}>" for i in range(256)]
    if kind == "gemma":
        backend.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    backend.train_from_iterator(
        CORPUS,
        trainers.BpeTrainer(
            vocab_size=520 if kind == "gemma" else 460, special_tokens=[*_SPECIAL, *byte_tokens],
            limit_alphabet=70, show_progress=False,
        ),
    )  # fmt: skip
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    backend.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)] if kind == "llama2" else steps)
    content = json.loads(backend.to_str())  # byte tokens are vocabulary, not added tokens
    content["added_tokens"] = [token for token in content["added_tokens"] if token["content"] in _SPECIAL]
    return Tokenizer.from_str(json.dumps(content))


def _word_piece(kind: str) -> Tokenizer:
    """A WordPiece tokenizer of the letters of all `PIECES` but `_UNKNOWN`, at the start of a word and within it."""
    normalizer = normalizers.BertNormalizer(lowercase=True)
    known = "".join(map(chr, range(33, 127))) + "".join(piece for piece in PIECES if piece not in _UNKNOWN)
    letters = dict.fromkeys(normalizer.normalize_str(known).replace(" ", ""))
    words = ["hello", "the", "world", "wonder", "##ful", "terri", "##ble", "12", "##34", "ca", "##fe", "東", "def"]
    vocabulary = dict.fromkeys(["<unk>", *letters, *(f"##{letter}" for letter in letters), *words])
    backend = Tokenizer(models.WordPiece({piece: i for i, piece in enumerate(vocabulary)}, unk_token="<unk>"))
    backend.normalizer, backend.pre_tokenizer = normalizer, pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.WordPiece()
    return backend


PIECES = [
    "hello", "The", " world", "wonderful", " terrible", ".", ", ", "!", "?\n", " ", "  ", "      ", "\n", "\n\n\n",
    "\t", " \t ", "\r\n", "café", "cafe\u0301", "a\u0308o\u0302\u0323", "ﬁne", "Å", "Å", "ｆｕｌｌ", "①", "\u00a0",
    "\u3000",
    "👩\u200d👩\u200d👧", "☕\ufe0f", "🇩🇪", "👍🏽", "שָׁלוֹם", "مرحبا", "\u202eabc\u202c", "東京の天気", "한국어",
    "\u1112\u1161\u11ab", "नमस्ते",
    "நி", "<|user|>", "<|end|>", "</s>", "<0x41>", "▁", "##ing", "[UNK]", "def f(x):\n    return x[0] ** 2\n", "0xFF",
    "1234567", "3.14", "\u200b", "\x00", "\x7f", "\U0001d49c", "Ǆ", "ß", "İ",
]  # fmt: skip


_UNKNOWN = ("🇩🇪", "①")  # to the WordPiece vocabulary


def odd_texts(number: int, seed: int = 0) -> list[str]:
    """Texts of 1 to 14 pieces, each with at least one letter, so that no text is blank."""
    rng = np.random.default_rng(seed)
    texts = []
    for size in rng.integers(1, 15, number):
        pieces = [PIECES[i] for i in rng.integers(len(PIECES), size=size)]
        pieces.insert(int(rng.integers(len(pieces) + 1)), "ok"[int(rng.integers(2)) :])
        texts.append("".join(pieces))
    return texts
