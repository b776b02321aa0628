"""The report from files alone: what it reads, what it puts into the page, and what it refuses."""

from __future__ import annotations

import base64
import hashlib
import html
import itertools
import json
import re
import shutil
import subprocess
import unicodedata
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

import sepo.report
from properties import examples
from report_fixtures import END, byte_tokenizer, score_table, word_tokenizer
from sepo.credit.selection import select_key_tokens
from sepo.data import tables
from sepo.data.conversation import CONVERSATION, PROMPT_KEY, conversation_text, in_words, prompt_key
from sepo.data.fingerprints import tokenizer_fingerprint
from sepo.data.ragged import flat, segment_sums
from sepo.data.vocabulary import load_vocabulary
from sepo.errors import UserError
from sepo.evaluate.statistics import mean_and_se
from sepo.report import build_report, display, save_figures
from sepo.report.payload import jsonable, pack, unpack
from sepo.report.summary import cumulative_share, summarise, training_curves
from sepo.report.token_texts import MARK_OFF, MARK_ON, TokenTexts, visible
from tiny_tokenizers import tiny_tokenizer_of

HOSTILE = "</script><script>window.pwned=1</script><img src=x onerror=pwned=1>${pwned=1}{{data}}\u202eabc"


BYTES, WORDS = byte_tokenizer(), word_tokenizer()


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("words")
    word_tokenizer().save(str(folder / "tokenizer.json"))
    return folder


@pytest.fixture(scope="module")
def raw_bytes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bytes")
    byte_tokenizer().save(str(folder / "tokenizer.json"))
    return folder


@pytest.fixture
def run(tmp_path: Path, words: Path) -> Path:
    """A run folder with everything that a report reads."""
    run = tmp_path / "my-run"
    scores = score_table(Tokenizer.from_file(str(words / "tokenizer.json")), subset=["a", "b"])
    tables.write_table(run / "scores", scores, rows_per_shard=2)
    tables.write_table(run / "selection", select_key_tokens(scores, 0.4, 0.2))
    rng = np.random.default_rng(1)
    logps = {
        f"{side}_logps": [
            (-rng.exponential(1, len(ids))).astype(np.float32) for ids in scores[f"{side}_ids"].to_pylist()
        ]
        for side in ("chosen", "rejected")
    }
    tables.write_table(run / "logps/reference", tables.make_table("logps", {"pair_id": scores["pair_id"], **logps}))
    (run / "oracle").mkdir()
    (run / "oracle/tokenizer.json").write_bytes((words / "tokenizer.json").read_bytes())
    history = [
        {"step": i, "loss": 0.7 - 0.01 * i, "rewards/chosen": 0.1 * i, "rewards/rejected": -0.1 * i} for i in range(5)
    ]
    (run / "oracle/trainer_state.json").write_text(
        json.dumps({"log_history": [*history, {"step": 5, "train_runtime": 9.0}]})
    )
    (run / "recipe.yaml").write_text("name: my-run\nselect: {k_chosen: 0.4}\n")
    (run / "manifest.json").write_text(
        json.dumps({"name": "a name", "device": {"name": "cpu"}, "stages": {"oracle": {"seconds": 61.5}}})
    )
    (run / "metrics.json").write_text('{"policy/win_rate": 0.61, "policy/kl": NaN}')
    return run


def data_of(page: Path) -> tuple[dict, dict[str, np.ndarray]]:
    block = re.search(r'id="data">([^<]*)</script>', page.read_text(encoding="utf-8"))
    assert block is not None
    return unpack(block[1])


def unmarked(shown: str) -> str:
    return shown.replace(MARK_ON, "").replace(MARK_OFF, "")


def token_texts_for(tokenizer: Tokenizer, ids: list[int]) -> list:
    table = TokenTexts(load_vocabulary(tokenizer))
    return [table.texts[number] for number in table.encode(np.array(ids, dtype=np.int32), np.array([len(ids)]))]


# ---------------------------------------------------------------- the data block


@given(
    st.dictionaries(
        st.sampled_from(["a", "b", "c"]),
        st.tuples(st.sampled_from(["uint8", "uint16", "uint32", "float32", "float64"]), st.lists(st.integers(0, 255))),
    )
)
def test_arrays_come_back_bit_for_bit_from_the_data_block(spec: dict) -> None:
    arrays = {name: np.array(values).astype(kind) for name, (kind, values) in spec.items()}
    header, found = unpack(pack({"title": HOSTILE}, arrays))
    assert header == {"title": HOSTILE}
    for name, array in arrays.items():
        assert found[name].dtype == array.dtype
        assert found[name].tobytes() == array.tobytes()


def test_numbers_that_json_cannot_hold_become_text() -> None:
    assert jsonable({"a": [float("inf"), float("nan"), 1.5], "b": Path("x")}) == {"a": ["inf", "nan", 1.5], "b": "x"}


# ---------------------------------------------------------------- tokens as text


@examples(60)
@given(text=st.text(max_size=40))
def test_the_token_texts_join_to_the_tokenised_text(text: str) -> None:
    for tokenizer in (BYTES, WORDS):
        ids = tokenizer.encode(text, add_special_tokens=False).ids
        if ids:
            assert "".join(token.text for token in token_texts_for(tokenizer, ids)) == text


@examples(60)
@given(ids=st.lists(st.integers(0, 255), min_size=1, max_size=30))
def test_any_bytes_at_all_are_shown_and_decode_as_the_tokenizer_decodes_them(ids: list[int]) -> None:
    tokens = token_texts_for(BYTES, ids)
    assert all(unmarked(token.shown) for token in tokens)
    raw = b"".join(load_vocabulary(BYTES).pieces[i] or b"" for i in ids)
    # Bytes that never make a character are shown as numbers, and add no text but a replacement character.
    text = "".join(token.text for token in tokens).replace("\ufffd", "")
    assert text == raw.decode("utf-8", "ignore").replace("\ufffd", "")


@given(text=st.text(max_size=30))
def test_nothing_shown_is_invisible_or_reorders_its_surroundings(text: str) -> None:
    shown = unmarked(visible(text)).replace("\n", "").replace("\t", "")
    for i, character in enumerate(shown):
        joiner = character in "\u200c\u200d" and i > 0
        assert joiner or unicodedata.category(character) not in {"Cc", "Cf", "Zl", "Zp"}, hex(ord(character))


@pytest.mark.parametrize(
    "control", ["\u202e", "\u2066", "\u200f", "\u061c", "\ufeff", "\x00", "\x01", "\x02", "\u2028"]
)
def test_control_characters_are_shown_by_their_number(control: str) -> None:
    assert visible(f"a{control}b") == f"a{MARK_ON}⟨U+{ord(control):04X}⟩{MARK_OFF}b"


def test_white_space_is_marked_where_it_could_be_missed() -> None:
    assert visible(" the") == " the"
    assert unmarked(visible(" ")) == "·"
    assert unmarked(visible("    if")) == "····if"
    assert unmarked(visible(".\n\n")) == ".↵\n↵\n"
    assert unmarked(visible("\tx")) == "⇥\tx"
    assert unmarked(visible("a\u00a0b")) == "a␣b"


def test_a_character_split_over_tokens_is_shown_by_the_last_of_them() -> None:
    tokens = token_texts_for(BYTES, BYTES.encode("a世b").ids)
    assert [unmarked(token.shown) for token in tokens] == ["a", "⟨0xE4⟩", "⟨0xB8⟩", "世", "b"]
    assert [token.label for token in tokens] == ["a", "⟨0xE4⟩", "⟨0xB8⟩", "⟨0x96⟩", "b"]


def test_a_real_tokenizer_reads_back_text_of_every_script(smollm2_dir: str) -> None:
    text = "Café — 你好，世界! שלום עולם مرحبا नमस्ते 👩‍👩‍👧 e\u0301\n\tdone  \r\n<|im_end|>"
    tokenizer = Tokenizer.from_file(f"{smollm2_dir}/tokenizer.json")
    ids = np.array(tokenizer.encode(text, add_special_tokens=False).ids)
    table = TokenTexts(load_vocabulary(smollm2_dir))
    tokens = [table.texts[number] for number in table.encode(ids, np.array([len(ids)]))]
    assert "".join(token.text for token in tokens) == text
    assert "你好，世界" in re.sub(f"{MARK_ON}[^{MARK_OFF}]*{MARK_OFF}", "", "".join(token.shown for token in tokens))


def test_bytes_of_a_character_that_never_completes_are_shown_once() -> None:
    encode = {token: i for i, token in enumerate(load_vocabulary(BYTES).pieces)}
    ids = [encode[bytes([byte])] for byte in b"\xe4\xb8a\x96\xf0"]
    shown = [unmarked(token.shown) for token in token_texts_for(BYTES, ids)]
    assert shown == ["⟨0xE4⟩", "⟨0xB8⟩", "a", "⟨0x96⟩", "⟨0xF0⟩"]


def test_a_control_token_differs_from_the_same_text_written_out() -> None:
    special = WORDS.token_to_id(END)
    assert [token.shown for token in token_texts_for(WORDS, [special])] == [f"{MARK_ON}{END}{MARK_OFF}"]
    spelled = BYTES.encode(END).ids
    assert "".join(token.shown for token in token_texts_for(BYTES, spelled)) == END


def test_sentencepiece_bytes_and_spaces_are_understood() -> None:
    vocab = {"<unk>": 0, "<0xE4>": 1, "<0xB8>": 2, "<0x96>": 3, "▁hello": 4, "▁": 5, "x": 6}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[], unk_token="<unk>", byte_fallback=True))
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    tokens = token_texts_for(tokenizer, [4, 1, 2, 3, 5, 6])
    assert [unmarked(token.shown) for token in tokens] == [" hello", "⟨0xE4⟩", "⟨0xB8⟩", "世", "·", "x"]
    assert "".join(token.text for token in tokens) == tokenizer.decode([4, 1, 2, 3, 5, 6])


def test_unigram_and_wordpiece_vocabularies_are_understood() -> None:
    unigram = Tokenizer(models.Unigram([("<unk>", 0.0), ("▁the", -1.0), ("se", -2.0)], unk_id=0))
    unigram.pre_tokenizer, unigram.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    assert [token.text for token in token_texts_for(unigram, [1, 2])] == [" the", "se"]
    wordpiece = Tokenizer(models.WordPiece({"[UNK]": 0, "play": 1, "##ing": 2}, unk_token="[UNK]"))
    wordpiece.decoder = decoders.WordPiece()
    assert [token.text for token in token_texts_for(wordpiece, [1, 2])] == [" play", "ing"]


def test_added_tokens_that_are_no_control_tokens_are_plain_text() -> None:
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens([AddedToken("naïve word", special=False)])
    (token,) = token_texts_for(tokenizer, [tokenizer.token_to_id("naïve word")])
    assert token.shown == "naïve word"


def test_a_token_that_the_tokenizer_lacks_is_refused_by_number(words: Path, tmp_path: Path) -> None:
    table = tables.make_table(
        "scores",
        {
            "pair_id": [0],
            "prompt_ids": [[1]],
            "chosen_ids": [[987654]],
            "rejected_ids": [[2]],
            "chosen_rewards": [[0.1]],
            "rejected_rewards": [[0.2]],
        },
    )
    tables.write_table(tmp_path / "scores", table)
    with pytest.raises(UserError, match="no token 987654"):
        build_report(None, table=tmp_path / "scores", tokenizer=words, out=tmp_path / "report.html")


def test_the_tokenizer_of_another_model_is_refused(tmp_path: Path) -> None:
    """Its texts of the same ids would be those of other words."""
    mine, other = (tiny_tokenizer_of(name) for name in ("gpt2", "llama2"))
    other.save_pretrained(tmp_path / "other")
    provenance = {"tokenizer": tokenizer_fingerprint(mine)}
    columns = {"pair_id": [0], "prompt_ids": [[1]], "chosen_ids": [[3]], "rejected_ids": [[2]]}
    rewards = {"chosen_rewards": [[0.1]], "rejected_rewards": [[0.2]]}
    table = tables.make_table("scores", columns | rewards, provenance)
    tables.write_table(tmp_path / "scores", table)
    for named in (tmp_path / "other", other):
        with pytest.raises(UserError, match="was made with another tokenizer than that of"):
            build_report(None, table=tmp_path / "scores", tokenizer=named, out=tmp_path / "report.html")
        with pytest.raises(UserError, match="was made with another tokenizer than that of"):
            display(table, tokenizer=named)
    assert "<iframe" in display(table, tokenizer=mine).html
    assert not (tmp_path / "report.html").exists()


def test_a_folder_without_a_tokenizer_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no tokenizer\.json in"):
        load_vocabulary(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(UserError, match=r"not a readable tokenizer\.json"):
        load_vocabulary(tmp_path)


# ---------------------------------------------------------------- the numbers


def test_the_cumulative_share_averages_the_curves_of_the_responses() -> None:
    rewards = np.array([3.0, -1.0, 0.0, 0.0, 1.0, 1.0], dtype=np.float32)
    shares = cumulative_share(rewards, np.array([4, 2]), np.array([0.0, 0.25, 0.5, 0.75, 1.0]))
    # Of the first response one token in four carries 3/4 of the total, of the second each carries half.
    np.testing.assert_allclose(shares, [0, (0.75 + 0.25) / 2, (1 + 0.5) / 2, (1 + 0.75) / 2, 1])


def test_rewards_that_are_all_zero_have_no_cumulative_share() -> None:
    assert cumulative_share(np.zeros(3, np.float32), np.array([3]), np.array([0.5])) is None


def test_segments_of_any_length_are_summed() -> None:
    np.testing.assert_array_equal(segment_sums(np.array([1, 2, 4], np.float32), np.array([2, 0, 1])), [3, 0, 4])


def test_the_summary_counts_pairs_as_a_plain_loop_does() -> None:
    rng = np.random.default_rng(0)
    lengths = {side: rng.integers(1, 9, 50) for side in ("chosen", "rejected")}
    sides = {side: (rng.normal(0.1, 1, n.sum()).astype(np.float32), n) for side, n in lengths.items()}
    summary = summarise(sides, np.arange(50))
    rows = {side: np.split(values, np.cumsum(n)[:-1]) for side, (values, n) in sides.items()}
    right = [
        float(w.sum(dtype=np.float64)) > float(v.sum(dtype=np.float64)) for w, v in zip(*rows.values(), strict=True)
    ]
    assert summary["pairs"] == 50
    assert summary["accuracy"] == pytest.approx(np.mean(right))
    assert summary["chosen_longer"] == pytest.approx(np.mean(lengths["chosen"] > lengths["rejected"]))
    first = summary["positions"]["chosen"]["mean"][0]
    assert first == pytest.approx(np.mean([row[0] for row in rows["chosen"]]), abs=1e-5)
    assert 0.97 < sum(summary["rewards"]["chosen"]) <= 1


def test_a_pair_whose_sums_are_equal_counts_half_as_everywhere_else() -> None:
    sides = {side: (np.array([0.1, 0.2], np.float32), np.array([2])) for side in ("chosen", "rejected")}
    assert summarise(sides, np.arange(1))["accuracy"] == 0.5


def test_the_errors_of_rewards_by_position_are_clustered_by_prompt() -> None:
    rng = np.random.default_rng(1)
    # Responses of one prompt share a level, and so do the tokens of a response.
    prompts = np.repeat(np.arange(30), 4)[rng.permutation(120)]
    lengths = rng.integers(1, 40, 120)
    level = rng.normal(size=30)[prompts] + rng.normal(size=120)
    rewards = (np.repeat(level, lengths) + 0.1 * rng.normal(size=lengths.sum())).astype(np.float32)
    figure = summarise(dict.fromkeys(("chosen", "rejected"), (rewards, lengths)), prompts)["positions"]
    rows = np.split(rewards.astype(np.float64), np.cumsum(lengths)[:-1])
    edges = [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17, 19, 21, 23, 25, 28, 31, 34, 38]
    for at, (start, stop) in enumerate(itertools.pairwise(edges)):
        inside = [(value, prompt) for row, prompt in zip(rows, prompts, strict=True) for value in row[start:stop]]
        mean, error = mean_and_se([value for value, _ in inside], [prompt for _, prompt in inside])
        reach = stats.t.ppf(0.975, len({prompt for _, prompt in inside}) - 1)
        assert figure["chosen"]["mean"][at] == pytest.approx(mean, abs=1e-5)
        assert figure["chosen"]["high"][at] - mean == pytest.approx(reach * error, abs=1e-5)
        assert mean - figure["chosen"]["low"][at] == pytest.approx(reach * error, abs=1e-5)


def test_a_position_with_one_prompt_has_no_interval() -> None:
    sides = {side: (np.array([0.1, 0.2, 0.4], np.float32), np.array([2, 1])) for side in ("chosen", "rejected")}
    figure = summarise(sides, np.array([0, 0]))["positions"]["chosen"]
    assert None not in figure["mean"]
    assert figure["low"] == figure["high"] == [None] * len(figure["mean"])


def test_training_logs_become_one_chart_a_quantity() -> None:
    history = [
        {"step": 1, "epoch": 0.1, "loss": 0.7, "rewards/chosen": 0.0, "rewards/rejected": 0.1, "note": "text"},
        {"step": 2, "epoch": 0.2, "loss": float("nan"), "rewards/chosen": 0.2, "rewards/rejected": 0.0},
        {"step": 2, "eval_loss": 0.6, "eval_runtime": 3.0, "eval_samples_per_second": 9.0},
        {"step": 2, "train_runtime": 5.0, "train_loss": 0.65},
    ]
    charts = {chart["name"]: {line["name"]: line for line in chart["series"]} for chart in training_curves(history)}
    assert list(charts) == ["loss", "rewards"]
    assert charts["loss"]["training"] == {"name": "training", "step": [1], "value": [0.7]}
    assert charts["loss"]["evaluation"]["value"] == [0.6]
    assert charts["rewards"]["rejected"]["value"] == [0.1, 0.0]


def test_a_long_training_log_keeps_its_ends() -> None:
    (chart,) = training_curves([{"step": i, "loss": float(i)} for i in range(10_000)])
    steps = chart["series"][0]["step"]
    assert len(steps) <= 600
    assert (steps[0], steps[-1]) == (0, 9999)


# ---------------------------------------------------------------- the page


def test_the_page_holds_the_table_bit_for_bit(run: Path) -> None:
    header, arrays = data_of(build_report(run, out=run / "report.html"))
    scores = tables.read_table(run / "scores", "scores")
    assert header["pair_ids"] == scores["pair_id"].to_pylist()
    for side in ("chosen", "rejected"):
        values, lengths = flat(scores[f"{side}_rewards"])
        assert arrays[f"{side}_rewards"].tobytes() == values.tobytes()
        assert arrays[f"{side}_lengths"].tolist() == lengths.tolist()
        ids = [header["pieces"]["id"][number] for number in arrays[f"{side}_pieces"]]
        assert ids == flat(scores[f"{side}_ids"])[0].tolist()
    expected = [
        sum(w) - sum(v)
        for w, v in zip(*(scores[f"{s}_rewards"].to_pylist() for s in ("chosen", "rejected")), strict=True)
    ]
    np.testing.assert_allclose(arrays["margins"], expected, atol=1e-12)


def test_the_page_marks_the_selection_that_the_policy_was_trained_on(run: Path) -> None:
    header, arrays = data_of(build_report(run, out=run / "report.html"))
    assert header["k"] == {"chosen": 0.4, "rejected": 0.2}
    selection = tables.read_table(run / "selection", "selection")
    for side in ("chosen", "rejected"):
        weights = np.split(arrays[f"{side}_weights"], np.cumsum(arrays[f"{side}_lengths"])[:-1])
        assert [np.flatnonzero(w).tolist() for w in weights] == selection[f"{side}_positions"].to_pylist()


def test_soft_weights_of_a_selection_are_kept(run: Path) -> None:
    selection = tables.read_table(run / "selection", "selection").to_pydict()
    selection["chosen_weights"] = [[0.25] * len(row) for row in selection["chosen_weights"]]
    tables.write_table(run / "soft", tables.make_table("selection", selection))
    _, arrays = data_of(build_report(run, selection=run / "soft", out=run / "report.html"))
    assert set(arrays["chosen_weights"].tolist()) == {0.0, 0.25}


def test_given_rates_win_over_those_of_the_selection(run: Path) -> None:
    header, _ = data_of(build_report(run, k_chosen=0.7, out=run / "report.html"))
    assert header["k"] == {"chosen": 0.7, "rejected": 0.2}


def test_reference_log_probabilities_are_kept_to_a_thousandth(run: Path) -> None:
    header, arrays = data_of(build_report(run, out=run / "report.html"))
    stored = flat(tables.read_table(run / "logps/reference", "logps")["chosen_logps"])[0]
    np.testing.assert_allclose(-arrays["chosen_logps"].astype(float) / header["logp_scale"], stored, atol=0.00051)


def test_pairs_without_log_probabilities_say_so(run: Path) -> None:
    store = tables.read_table(run / "logps/reference", "logps")
    tables.write_table(run / "logps/reference", store.slice(1))
    _, arrays = data_of(build_report(run, out=run / "report.html"))
    first = arrays["chosen_lengths"][0]
    assert set(arrays["chosen_logps"][:first].tolist()) == {65535}
    assert 65535 not in arrays["chosen_logps"][first:]


def test_the_page_documents_the_run(run: Path) -> None:
    header, _ = data_of(build_report(run, out=run / "report.html"))
    documents = header["documents"]
    assert header["title"] == "a name"
    assert documents["recipe"].startswith("name: my-run")
    assert documents["manifest"]["stages"]["oracle"]["seconds"] == 61.5
    assert documents["metrics"] == {"policy/win_rate": 0.61, "policy/kl": "nan"}
    (oracle,) = documents["training"]
    assert oracle["model"] == "oracle"
    assert [chart["name"] for chart in oracle["charts"]] == ["loss", "rewards"]


def test_a_score_table_alone_makes_a_report_with_ids_for_tokens(run: Path, tmp_path: Path) -> None:
    single = tmp_path / "score.parquet"
    pq.write_table(tables.read_table(run / "scores", "scores"), single)
    header, arrays = data_of(build_report(None, table=single, out=tmp_path / "out" / "report.html"))
    assert header["pieces"]["label"][0] == f"⟨{header['pieces']['id'][0]}⟩"
    assert not any(name.endswith(("_weights", "_logps")) for name in arrays)


def test_few_distinct_words_of_an_extra_column_become_a_filter(run: Path) -> None:
    header, _ = data_of(build_report(run, out=run / "report.html"))
    subsets = tables.read_table(run / "scores", "scores")["subset"].to_pylist()
    facet = header["facets"]["subset"]
    assert [facet["values"][code] for code in facet["codes"]] == subsets


def test_at_most_max_pairs_are_shown_and_all_are_counted(run: Path) -> None:
    header, _ = data_of(build_report(run, max_pairs=3, out=run / "report.html"))
    ids = tables.read_table(run / "scores", "scores")["pair_id"].to_pylist()
    assert len(header["pair_ids"]) == 3
    assert (header["pair_ids"][0], header["pair_ids"][-1]) == (ids[0], ids[-1])
    assert header["summary"]["pairs"] == len(ids)


def test_the_prompt_preview_leaves_out_what_most_prompts_share(run: Path) -> None:
    columns = tables.read_table(run / "scores", "scores").to_pydict()
    columns["prompt_ids"][2] = columns["prompt_ids"][2][1:]  # cut off at the left
    tables.write_table(run / "scores", tables.make_table("scores", columns))
    header, arrays = data_of(build_report(run, out=run / "report.html"))
    ends = np.cumsum(arrays["prompt_lengths"])
    previews = []
    for i, end in enumerate(ends):
        numbers = arrays["prompt_pieces"][end - arrays["prompt_lengths"][i] + arrays["prompt_starts"][i] : end]
        numbers = numbers[: len(numbers) - arrays["prompt_ends"][i]]
        previews.append("".join(header["pieces"]["text"].get(str(n), header["pieces"]["shown"][n]) for n in numbers))
    whole = "".join(WORDS.decode(columns["prompt_ids"][2]))
    assert previews == [
        "Question 0",
        "Question 1",
        whole.removesuffix("\nassistant\n"),
        *(f"Question {i}" for i in (3, 4, 5)),
    ]


def test_a_pair_is_headed_by_the_words_of_its_conversation(run: Path) -> None:
    columns = tables.read_table(run / "scores", "scores").to_pydict()
    messages = [[{"role": "user", "content": f"Why {i}?"}] for i in columns["pair_id"]]
    messages[1].insert(0, {"role": "system", "content": "Be brief."})
    columns[CONVERSATION] = list(map(conversation_text, messages))
    columns[PROMPT_KEY] = list(map(prompt_key, messages))
    tables.write_table(run / "scores", tables.make_table("scores", columns))
    header, _ = data_of(build_report(run, out=run / "report.html"))
    assert header["questions"] == list(map(in_words, messages))
    assert header["questions"][1] == f"System: Be brief.\n\nUser: Why {columns['pair_id'][1]}?"
    assert not {CONVERSATION, PROMPT_KEY} & header["facets"].keys()


def test_the_page_allows_its_own_script_and_style_and_nothing_else(run: Path) -> None:
    page = build_report(run, out=run / "report.html").read_text(encoding="utf-8")
    policy = html.unescape(re.search(r'Content-Security-Policy" content="([^"]*)"', page)[1])  # type: ignore[index]
    assert policy.startswith("default-src 'none'; ")
    assert "unsafe" not in policy
    for tag, source in (
        ("script", re.findall(r"<script>(.*?)</script>", page, re.S)),
        ("style", re.findall(r"<style>(.*?)</style>", page, re.S)),
    ):
        assert len(source) == 1
        digest = base64.b64encode(hashlib.sha256(source[0].encode()).digest()).decode()
        assert f"{tag}-src 'sha256-{digest}'" in policy
    assert not re.search(r"""(src|href)=["']?(https?:|//)""", page)


def test_hostile_text_cannot_leave_the_data_block(tmp_path: Path, raw_bytes: Path) -> None:
    tokenizer = Tokenizer.from_file(str(raw_bytes / "tokenizer.json"))
    table = score_table(tokenizer, subset=[HOSTILE, "b"], texts=[HOSTILE] * 2)
    tables.write_table(tmp_path / "scores", table)
    (tmp_path / "recipe.yaml").write_text(HOSTILE)
    (tmp_path / "manifest.json").write_text(json.dumps({HOSTILE: HOSTILE}))
    path = build_report(tmp_path, tokenizer=raw_bytes, title=HOSTILE, out=tmp_path / "report.html")
    page = path.read_text(encoding="utf-8")
    assert len(re.findall(r"<script", page)) == 2
    assert "pwned=1</script>" not in page
    assert "<img" not in page
    assert data_of(path)[0]["title"] == HOSTILE


def test_the_same_files_give_the_same_page(run: Path) -> None:
    first = build_report(run, out=run / "a.html").read_bytes()
    assert build_report(run, out=run / "b.html").read_bytes() == first
    assert not list(run.glob(".*.tmp"))


# ---------------------------------------------------------------- what is refused


def test_a_report_on_nothing_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="give a run folder or a score table"):
        build_report(None, out=tmp_path / "report.html")
    with pytest.raises(UserError, match="no run folder at"):
        build_report(tmp_path / "absent", out=tmp_path / "report.html")
    with pytest.raises(UserError, match="no scores table at"):
        build_report(tmp_path, out=tmp_path / "report.html")


def test_a_rate_or_a_count_out_of_range_is_refused(run: Path) -> None:
    with pytest.raises(UserError, match=r"k_rejected is 1\.5"):
        build_report(run, k_rejected=1.5, out=run / "report.html")
    with pytest.raises(UserError, match="max_pairs is 0"):
        build_report(run, max_pairs=0, out=run / "report.html")


@pytest.mark.parametrize(
    ("rewards", "problem"),
    [([0.1, float("nan")], "pair 7: a chosen reward is nan"), ([0.1], "pair 7: 1 chosen rewards for 2 tokens")],
)
def test_rewards_that_cannot_be_ranked_are_refused(tmp_path: Path, rewards: list[float], problem: str) -> None:
    columns = {
        "pair_id": [4, 7],
        "prompt_ids": [[1], [1]],
        "chosen_ids": [[5], [5, 6]],
        "rejected_ids": [[5], [5]],
        "chosen_rewards": [[0.5], rewards],
        "rejected_rewards": [[0.0], [0.0]],
    }
    tables.write_table(tmp_path / "scores", tables.make_table("scores", columns))
    with pytest.raises(UserError, match=problem):
        build_report(None, table=tmp_path / "scores", out=tmp_path / "report.html")


def test_an_empty_table_is_refused(tmp_path: Path) -> None:
    empty = tables.make_table("scores", {name: [] for name in tables.SCHEMAS["scores"].names})
    tables.write_table(tmp_path / "scores", empty)
    with pytest.raises(UserError, match="holds no pair"):
        build_report(None, table=tmp_path / "scores", out=tmp_path / "report.html")


def test_a_selection_of_other_pairs_is_refused(run: Path) -> None:
    selection = tables.read_table(run / "selection", "selection").to_pydict()
    selection["chosen_positions"][0] = [10_000]
    selection["chosen_weights"][0] = [1.0]
    tables.write_table(run / "selection", tables.make_table("selection", selection))
    with pytest.raises(UserError, match="key token 10000 lies beyond the chosen response"):
        build_report(run, out=run / "report.html")


def test_a_broken_json_file_is_named(run: Path) -> None:
    (run / "metrics.json").write_text("{")
    with pytest.raises(UserError, match=r"metrics\.json' is not readable JSON"):
        build_report(run, out=run / "report.html")
    assert not (run / "report.html").exists()


# ---------------------------------------------------------------- notebooks and papers


def framed(view: str) -> str:
    """The page in the frame of a notebook's output."""
    (source,) = re.findall(r'<iframe srcdoc="([^"]*)"', view)
    return html.unescape(source)


def test_a_pair_in_a_notebook_is_escaped_and_marks_its_key_tokens(raw_bytes: Path) -> None:
    tokenizer = Tokenizer.from_file(str(raw_bytes / "tokenizer.json"))
    table = score_table(tokenizer, texts=[HOSTILE])
    view = display(table, 0, tokenizer=raw_bytes, k_chosen=0.25, k_rejected=1.0)._repr_html_()
    assert "<script" not in view
    assert "<img" not in view
    assert "\u202e" not in view
    assert view.count("<") == 2  # the frame and its end
    page = framed(view)
    assert len(re.findall(r"<script", page)) == 2
    assert "pwned=1</script>" not in page
    assert "\u202e" not in page
    header, arrays = unpack(re.search(r'id="data">([^<]*)</script>', page)[1])  # type: ignore[index]
    assert header["k"] == {"chosen": 0.25, "rejected": 1.0}  # the script marks key tokens at these rates
    assert header["single_pair"] is True
    for side in ("chosen", "rejected"):
        assert arrays[f"{side}_rewards"].tolist() == table[f"{side}_rewards"][0].as_py()
        assert arrays[f"{side}_ended"].tolist() == [0]


def test_the_token_that_ends_a_response_is_no_key_token_in_a_notebook(words: Path) -> None:
    row = score_table(word_tokenizer()).to_pylist()[0]
    view = display({**row, "end_ids": [row["chosen_ids"][-1]]}, tokenizer=words).html
    _, arrays = unpack(re.search(r'id="data">([^<]*)</script>', framed(view))[1])  # type: ignore[index]
    assert arrays["chosen_ended"].tolist() == [1]


def test_a_notebook_s_page_allows_its_own_script_and_style_and_nothing_else(run: Path) -> None:
    policies = [
        re.search(r'Content-Security-Policy" content="([^"]*)"', page)[1]  # type: ignore[index]
        for page in (framed(display(run).html), build_report(run, out=run / "report.html").read_text("utf-8"))
    ]
    assert policies[0] == policies[1]


@pytest.mark.parametrize(
    ("changed", "problem"),
    [
        ({"chosen_rewards": [0.1]}, "1 chosen rewards for"),
        ({"chosen_rewards": [], "chosen_ids": []}, "0 chosen rewards for 0 tokens"),
        ({"chosen_rewards": [float("nan")], "chosen_ids": [5]}, "not finite"),
    ],
)
def test_a_pair_that_cannot_be_ranked_is_refused(run: Path, changed: dict, problem: str) -> None:
    row = tables.read_table(run / "scores", "scores").slice(0, 1).to_pylist()[0]
    with pytest.raises(UserError, match=problem):
        display({**row, **changed})


def test_a_run_folder_a_table_and_a_row_show_the_same_pair(run: Path, words: Path) -> None:
    table = tables.read_table(run / "scores", "scores")
    row = table.slice(2, 1).to_pylist()[0]
    views = [
        display(run, 2).html,
        display(table, 2, tokenizer=words).html,
        display(row, tokenizer=Tokenizer.from_file(str(words / "tokenizer.json"))).html,
    ]
    assert views[0] == views[1] == views[2]


def test_a_row_beyond_the_table_is_refused(run: Path) -> None:
    with pytest.raises(UserError, match="no pair at row 99"):
        display(run, 99)


@pytest.mark.slow
def test_figures_for_papers_are_written_and_reproducible(run: Path, tmp_path: Path) -> None:
    written = save_figures(run, tmp_path / "a")
    stems = {path.stem for path in written}
    assert {"cumulative-share", "token-rewards", "reward-by-position", "pair-margins"} <= stems
    assert {"oracle-loss", "oracle-rewards"} <= stems
    for path in written:
        content = path.read_bytes()
        if path.suffix == ".png":
            assert content.startswith(b"\x89PNG")
        else:
            assert ElementTree.fromstring(content).tag.endswith("svg")
    again = save_figures(run, tmp_path / "b", formats=["svg"])
    assert all(path.read_bytes() == (tmp_path / "a" / path.name).read_bytes() for path in again)


def test_figures_of_a_score_table_alone_leave_out_training(run: Path, tmp_path: Path) -> None:
    written = save_figures(run / "scores", tmp_path, formats=["svg"])
    assert {path.stem for path in written} == {
        "cumulative-share",
        "token-rewards",
        "reward-by-position",
        "pair-margins",
    }


def test_an_unknown_figure_format_is_refused(run: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no figure format 'bmp'"):
        save_figures(run, tmp_path, formats=["bmp"])


def test_columns_of_other_kinds_are_no_filter(run: Path) -> None:
    scores = tables.read_table(run / "scores", "scores").append_column("score", pa.array(np.arange(6) / 6))
    tables.write_table(run / "scores", scores)
    header, _ = data_of(build_report(run, out=run / "report.html"))
    assert list(header["facets"]) == ["subset"]


def test_the_figures_of_a_large_table_are_of_a_sample_and_its_counts_of_all(tmp_path: Path) -> None:
    from sepo.report.reading import read_scores

    table = score_table(word_tokenizer(), texts=[f"Answer {i} is {'long ' * (i % 5)}here." for i in range(60)])
    tables.write_table(tmp_path / "scores", table, rows_per_shard=7)
    whole, part = (read_scores(tmp_path / "scores", 5, most) for most in (1000, 20))
    assert len(part.prompts) == 20
    assert [len(lengths) for _, lengths in part.rewards.values()] == [20, 20]
    summaries = [scores.summary() for scores in (whole, part)]
    assert [summary["figure_pairs"] for summary in summaries] == [60, 20]
    for name in ("pairs", "tokens", "accuracy", "chosen_longer"):
        assert summaries[0][name] == pytest.approx(summaries[1][name]), name
    assert whole.rows.equals(part.rows)
    exact = summarise(whole.rewards, whole.prompts)
    assert all(summaries[0][name] == pytest.approx(exact[name]) for name in ("pairs", "tokens", "accuracy"))


@pytest.mark.skipif(shutil.which("node") is None, reason="needs Node.js")
def test_a_chart_is_drawn_inside_its_axes() -> None:
    """Margins that are all positive: neither the guide at 0 nor the outer bins lie outside."""
    script = Path(__file__).with_name("drawn_axes.mjs")
    source = Path(sepo.report.__file__).with_name("report.js")
    outside, drawn = subprocess.run(
        ["node", str(script), str(source)], capture_output=True, text=True, check=True
    ).stdout.split()  # fmt: skip
    assert int(outside) == 0
    assert int(drawn) > 10
