"""`sepo sample` and `sepo pairs`: one reading of a prompt, resumption, scores that fail, pairs and their card."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from judge_server import completion, serving
from sepo.cli import main
from sepo.data.loading import load_preferences
from sepo.errors import UserError
from sepo.evaluate.generate import generate_responses, prompt_sampler
from sepo.report.edges import length_caution
from sepo.sampling.answers import How, sample_all, transformers_source
from sepo.sampling.pairs import length_figures, pairs_of, strong_weak_pairs
from sepo.sampling.prompts import Prompt, read_prompts, some_prompts
from sepo.sampling.responses import Answers, Grown, read_responses, responses_table
from tiny_models import tiny_model, tiny_tokenizer

PROMPTS = [(1, 4, *range(20, 20 + i), 2, 5) for i in (3, 9, 4, 17, 6)]


def sampled(model, numbers, samples=6, seed=3, **settings):
    temperatures = [(0.7, 1.0)[i % 2] for i in range(samples)]
    with prompt_sampler(
        model, tiny_tokenizer(), PROMPTS, temperatures=temperatures, max_new_tokens=9, seed=seed, **settings
    ) as sample:
        return sample(numbers)


@pytest.mark.parametrize("architecture", ["llama", "mistral", "gemma2", "gpt2"])
def test_a_prompt_is_read_once_for_all_its_samples(architecture):
    model, read = tiny_model(architecture), []
    hook = model.get_input_embeddings().register_forward_hook(lambda module, given, out: read.append(given[0]))
    answers = sampled(model, [0, 1, 2], samples=8)
    hook.remove()
    longest = max(len(PROMPTS[i]) for i in range(3))
    assert tuple(read[0].shape) == (3, longest)  # padding is no token of a prompt
    assert int((read[0] != model.config.pad_token_id).sum()) == sum(len(PROMPTS[i]) for i in range(3))
    assert {tuple(step.shape) for step in read[1:]} <= {(24, 1)}
    assert len(answers) == 24


def test_answers_are_those_of_one_sample_at_a_time_and_of_any_batch():
    model = tiny_model("llama")
    together = sampled(model, [0, 1, 2, 3, 4])
    apart = [answer for i in range(5) for answer in sampled(model, [i])]
    assert [one.response_ids for one in together] == [one.response_ids for one in apart]
    np.testing.assert_allclose(
        np.concatenate([one.logps for one in together]), np.concatenate([one.logps for one in apart]), atol=1e-5
    )
    alone = generate_responses(
        model, tiny_tokenizer(), PROMPTS, samples=6, max_new_tokens=9, seed=3, batch_size=1, progress=False
    )
    with prompt_sampler(model, tiny_tokenizer(), PROMPTS, temperatures=[1.0] * 6, max_new_tokens=9, seed=3) as sample:
        assert [one.response_ids for one in sample(range(5))] == [one.response_ids for one in alone]


def test_each_sample_is_drawn_at_its_own_temperature():
    """A first token is the inverse of the cumulative distribution of softmax(logits / T) at its uniform number."""
    from sepo.evaluate.generate import uniforms

    model = tiny_model("llama", dtype=torch.float64)
    answers = sampled(model, [1], samples=4)
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([PROMPTS[1]])).logits[0, -1].double()
    for sample, answer in enumerate(answers):
        weights = (logits / (0.7, 1.0)[sample % 2]).softmax(-1).cumsum(-1)
        at = uniforms(3, PROMPTS[1], 0, sample, 9)[0]
        assert answer.response_ids[0] == int((weights <= at).sum())
        assert answer.logps[0] == pytest.approx(float(logits.log_softmax(-1)[answer.response_ids[0]]), abs=1e-5)


class Killed(BaseException):
    """As a signal would."""


def test_a_killed_command_loses_the_batch_in_flight_and_ends_with_the_same_bytes(tmp_path):
    model, tokenizer = tiny_model("llama"), tiny_tokenizer()
    prompts, how = [Prompt((), ids=ids) for ids in PROMPTS], How((1.0,) * 4, 8, 7)

    def source(after=None):
        run = transformers_source(model, tokenizer, prompts, how, batch_size=8)

        def killed(numbers, take):
            batches = []

            def count(batch):
                if len(batches) == after:
                    raise Killed
                batches.append(batch)
                take(batch)

            run(numbers, count)

        return killed

    sample_all(prompts, source, Grown(tmp_path / "whole.jsonl", "key"))
    with pytest.raises(Killed):
        sample_all(prompts, lambda: source(1), Grown(tmp_path / "killed.jsonl", "key"))
    with open(tmp_path / "killed.jsonl", "a") as file:
        file.write('{"torn')
    grown = Grown(tmp_path / "killed.jsonl", "key")
    assert len(grown.values) == 2
    sample_all(prompts, source, grown)
    assert (tmp_path / "killed.jsonl").read_bytes() == (tmp_path / "whole.jsonl").read_bytes()
    assert not Grown(tmp_path / "killed.jsonl", "another key").values


# --- the commands ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("sample")
    tiny_model("llama").save_pretrained(folder / "model")
    tiny_tokenizer().save_pretrained(folder / "model")
    rows = [{"prompt": f"Is it {i}?"} for i in range(5)] + [{"prompt": [{"role": "user", "content": "Is it 0?"}]}]
    (folder / "prompts.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert sample(folder, "sampled", "--gold", "plain") == 0
    return folder


def sample(folder: Path, out: str, *options: str) -> int:
    settings = ["--samples", "4", "--max-new-tokens", "60", "--device", "cpu", "--seed", "2"]
    where = ["--model", str(folder / "model"), "--prompts", str(folder / "prompts.jsonl"), "--out", str(folder / out)]
    return main(["sample", *where, *settings, *options])


def test_the_table_has_a_row_a_prompt_and_a_batch_changes_nothing(place):
    table = read_responses(place / "sampled")
    row = table.to_pylist()[0]
    assert (len(table), row["prompt"], row["plain"]) == (5, "Is it 0?", False)
    assert row["temperatures"] == [0.7, 1.0, 0.7, 1.0]
    assert {len(row[name]) for name in ("answers", "scores", "tokens", "finish_reasons", "answer_ids")} == {4}
    assert set(row["finish_reasons"]) <= {"stop", "length", "none"}
    assert all(
        (score is None) == (end == "none") for score, end in zip(row["scores"], row["finish_reasons"], strict=True)
    )
    before = (place / "sampled" / "responses.parquet").read_bytes()
    assert sample(place, "sampled", "--gold", "plain") == 0  # all is there
    assert (place / "sampled" / "responses.parquet").read_bytes() == before
    assert sample(place, "one", "--gold", "plain", "--batch-size", "4") == 0
    assert read_responses(place / "one").drop_columns(["answer_logps"]) == table.drop_columns(["answer_logps"])


def test_a_table_that_answers_a_prompt_in_two_rows_is_refused(place, tmp_path, capsys):
    """Two tables that were joined: each would be half of the prompt's answers, and the prompt would count twice."""
    table = pq.read_table(place / "sampled" / "responses.parquet")
    pq.write_table(pa.concat_tables([table, table]), tmp_path / "joined.parquet")
    joined = str(tmp_path / "joined.parquet")
    for command in (["best-of", "--responses", joined], ["pairs", "--responses", joined, "--out", str(tmp_path / "p")]):
        assert main(command) == 2
        assert "answers the prompt 'Is it 0?' in several rows" in capsys.readouterr().err


def test_wrong_input_is_one_line(place, capsys):
    for options, text in {
        ("--temperature", "hot"): "--temperature hot: expected numbers such as 0.7,1.0",
        ("--temperature", "0"): "--temperature 0 gives every answer to a prompt the same text",
        ("--gold", "plain", "--judge", "function:a:b"): "--gold and --judge both score the answers",
        ("--reference", "x"): "--reference is for --oracle",
        ("--judge", "function:no_such_module:f"): "cannot be imported",
    }.items():
        assert sample(place, "wrong", *options) == 2
        assert text in capsys.readouterr().err
    assert sample(place, "sampled", "--samples", "3") == 2
    assert "holds answers with samples 4, not 3" in capsys.readouterr().err


def test_a_judge_that_fails_for_some_answers_loses_only_those(place, tmp_path, monkeypatch, capsys):
    (tmp_path / "half_blind.py").write_text(
        "def judge(prompts, answers):\n    return [float('nan') if len(a) % 2 else len(a) for a in answers]\n"
    )
    monkeypatch.chdir(tmp_path)
    assert sample(place, "half", "--judge", "function:half_blind:judge") == 0
    rows = read_responses(place / "half").to_pylist()
    for row in rows:
        for text, score in zip(row["answers"], row["scores"], strict=True):
            assert score == (None if len(text) % 2 or not text else len(text))
    lost = sum(len(text) % 2 for row in rows for text in row["answers"])
    assert lost
    assert f"{lost} answers have no score: they are in no pair" in capsys.readouterr().err


def test_an_oracle_scores_by_beta_times_its_summed_token_rewards(place):
    oracle = tiny_model("llama", seed=4)
    oracle.save_pretrained(place / "oracle")
    tiny_tokenizer().save_pretrained(place / "oracle")
    options = ["--oracle", str(place / "oracle"), "--reference", str(place / "model"), "--judge-beta", "0.5"]
    assert sample(place, "by_oracle", *options) == 0
    reference, tokenizer = tiny_model("llama"), tiny_tokenizer()
    for row in read_responses(place / "by_oracle").to_pylist()[:2]:
        for text, score in zip(row["answers"], row["scores"], strict=True):
            asked = tokenizer.apply_chat_template(
                [{"role": "user", "content": row["prompt"]}], add_generation_prompt=True
            )
            start, ids = asked["input_ids"], [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]
            sums = []
            for model in (oracle, reference):
                with torch.no_grad():
                    logps = model(input_ids=torch.tensor([[*start, *ids]])).logits[0].double().log_softmax(-1)
                sums.append(sum(float(logps[len(start) + t - 1, token]) for t, token in enumerate(ids)))
            assert score == pytest.approx(0.5 * (sums[0] - sums[1]), abs=1e-3)


def test_a_server_answers_and_another_grades(place, tmp_path, capsys):
    prompt = {"name": "grade", "type": "single", "system_prompt": "", "description": "", "category": "general",
              "prompt_template": "Grade {answer} to {question}", "output_format": "[[rating]]"}  # fmt: skip
    (tmp_path / "grade.jsonl").write_text(json.dumps(prompt))

    def reply(body, before):
        text = body["messages"][-1]["content"]
        if "Grade" not in text:
            return completion(f"{text} seed {body['seed'] % 1000}")
        if "Is it 3?" in text:
            return 400
        return completion(f"Rating: [[{len(text) % 10 + 1}]]")

    with serving(reply) as server:
        options = ["--server", server.url, "--judge", f"server:{server.url}", "--model-name", "j", "--retries", "0"]
        options += ["--prompt", str(tmp_path / "grade.jsonl"), "--cache", str(tmp_path / "cache")]
        assert sample(place, "served", *options) == 0  # a refused question is an answer without a score
        asked = [body for body in server.asked if "Grade" not in body["messages"][-1]["content"]]
        assert len(asked) == 20
        assert len({body["seed"] for body in asked}) == 20
        assert {body["temperature"] for body in asked} == {0.7, 1.0}
        rows = {row["prompt"]: row for row in read_responses(place / "served").to_pylist()}
        assert rows.pop("Is it 3?")["scores"] == [None] * 4
        assert all(1 <= score <= 10 for row in rows.values() for score in row["scores"])
        assert all(end == "unknown" for row in rows.values() for end in row["finish_reasons"])


@pytest.mark.parametrize("cause", ["cut", "empty", "filtered", "refused"])
def test_an_answer_that_a_server_has_not_is_empty_and_its_prompt_keeps_the_others(cause, place, tmp_path, capsys):
    """A model that thinks is cut off in some of its samples: its prompts would have no answer at all."""
    none = {
        "cut": completion("<think>hm"), "empty": completion(None), "filtered": completion("Well"),
        "refused": (400, {}, b"the prompt is too long"),
    }[cause]  # fmt: skip
    if cause in ("cut", "filtered"):
        none["choices"][0]["finish_reason"] = {"cut": "length", "filtered": "content_filter"}[cause]
    heals = []

    def reply(body, before):
        odd = "Is it 3?" in body["messages"][-1]["content"] and body["seed"] % 2
        return completion(f"seed {body['seed']}") if heals or not odd else none

    with serving(reply) as server:
        options = ["--server", server.url, "--retries", "0", "--cache", str(tmp_path / "cache")]
        assert sample(place, cause, *options) == 0
        assert "--retry-failed asks again" in capsys.readouterr().err
        rows = {row["prompt"]: row for row in read_responses(place / cause).to_pylist()}
        ends = rows["Is it 3?"]["finish_reasons"]
        assert set(ends) == {"none", "unknown"}
        assert [text == "" for text in rows["Is it 3?"]["answers"]] == [end == "none" for end in ends]
        asked = len(server.asked)
        assert sample(place, cause, *options) == 0
        assert len(server.asked) == asked
        heals.append(True)
        assert sample(place, cause, *options, "--retry-failed") == 0
        assert len(server.asked) == asked + ends.count("none")
        again = {row["prompt"]: row for row in read_responses(place / cause).to_pylist()}["Is it 3?"]["answers"]
        assert all(again)
        assert {text for text in rows["Is it 3?"]["answers"] if text} < set(again)


def test_pairs_are_preference_data_with_a_card(place, capsys):
    out = place / "pairs"
    assert main(["pairs", "--responses", str(place / "sampled"), "--min-gap", "0.01", "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    record = json.loads((out / "pairs.json").read_text())
    assert f"{record['pairs']} pairs of 5 prompts" in printed
    assert "the longer one is chosen in" in printed
    rows = pq.read_table(out / "data" / "train.parquet").to_pylist()
    assert rows
    for row in rows:
        assert row["chosen_score"] - row["rejected_score"] >= 0.01
        assert row["prompt"][0]["content"].startswith("Is it")
    assert len(load_preferences(str(out))) == len(rows)
    card = (out / "README.md").read_text()
    for text in ("gold reward plain", "model", "0.7, 1.0", "best whole answer", "on-policy"):
        assert text in card
    assert str(place) not in card
    assert main(["push", str(out), "--what", "pairs", "--to", "a/b", "--dry-run"]) == 0
    assert "data/train.parquet" in capsys.readouterr().out
    assert main(["pairs", "--responses", str(place / "sampled"), "--min-gap", "9", "--out", str(place / "none")]) == 2
    assert "no pair can be made" in capsys.readouterr().err
    assert main(["pairs", "--responses", str(place / "sampled"), "--out", str(place / "model")]) == 2
    assert "holds other files" in capsys.readouterr().err
    assert main(["pairs", "--strong", str(out), "--out", str(place / "none")]) == 2
    assert "expected --responses DIR, or --strong DIR and --weak DIR" in capsys.readouterr().err


# --- pairs ----------------------------------------------------------------------------------------------------------


def table_of(*prompts):
    """A responses table; each prompt is a list of (text, score, end, tokens)."""
    asked = [Prompt(({"role": "user", "content": f"Q{i}"},)) for i in range(len(prompts))]
    answers = [
        Answers([t for t, *_ in rows], [e for *_, e, _ in rows], [n for *_, n in rows], *[[[]] * len(rows)] * 2)
        for rows in prompts
    ]
    scores = [[score for _, score, *_ in rows] for rows in prompts]
    return responses_table(asked, answers, scores, temperatures=[1.0] * len(prompts[0]), seed=0, made_with={})


def texts(made):
    return [(pair["chosen"][0]["content"], pair["rejected"][0]["content"]) for pair in made.pairs]


def test_every_rule_of_pairing_and_every_drop_is_counted():
    table = table_of(
        [("a", 3.0, "length", 5), ("b", 2.0, "stop", 5), ("c", 1.0, "length", 5), ("d", 1.5, "stop", 5)],
        [("a", 1.0, "stop", 5), ("a ", 2.0, "stop", 5), ("c", 1.5, "stop", 5), ("d", None, "stop", 5)],  # a tie
        [("a", 1.0, "stop", 5), ("a", 1.0, "stop", 5), ("a", 1.0, "stop", 5), ("", None, "none", 0)],
        [("a", 1.0, "length", 5), ("b", 2.0, "length", 5), ("c", 3.0, "length", 5), ("d", 4.0, "length", 5)],
        [("a", 1.0, "stop", 5), ("b", 1.2, "stop", 5), ("c", 1.1, "stop", 5), ("d", 9.0, "length", 5)],
    )
    made = pairs_of(table, "best-worst", min_gap=0.5)
    assert texts(made) == [("b", "c")]
    assert made.counts == {
        "prompts": 5, "pairs": 1, "merged": 3, "cut": 7, "no_score": 2, "one_answer": 1, "no_whole_answer": 1,
        "tie": 1, "gap": 1,
    }  # fmt: skip
    assert texts(pairs_of(table, "all", min_gap=0.5)) == [("b", "d"), ("b", "c"), ("d", "c")]
    drawn = {texts(pairs_of(table, "best-random", 0.5, seed))[0] for seed in range(20)}
    assert drawn == {("b", "d"), ("b", "c")}
    assert "1 prompts whose answers are all cut off: no pair" in made.lines()


def test_strong_against_weak_needs_no_score():
    strong = table_of([("good", None, "stop", 3), ("same", None, "stop", 3), ("cut", None, "length", 9)])
    weak = table_of([("bad", None, "stop", 2), ("same", None, "length", 2), ("x", None, "stop", 2)])
    made = strong_weak_pairs(strong, weak)
    assert texts(made) == [("good", "bad")]
    assert made.counts["merged"] == 1


def test_a_score_that_is_length_is_said_so():
    rng = np.random.default_rng(0)
    lengths = rng.integers(5, 50, (30, 4))
    by_length = table_of(*[[(f"{i} {n}", float(n), "stop", int(n)) for i, n in enumerate(row)] for row in lengths])
    figures = length_figures(pairs_of(by_length).pairs, by_length)
    assert figures["length/rank_correlation"] == pytest.approx(1)
    assert figures["length/longer_chosen"] == 1
    assert length_caution({**figures, "prompts": 30}).startswith("length explains everything: the longer")
    some = table_of(*[[(f"{i}", float(rng.random()), "stop", int(n)) for i, n in enumerate(row)] for row in lengths])
    assert not length_caution(length_figures(pairs_of(some).pairs, some))


def test_prompts_of_embedded_tasks_count_once_and_parts_are_disjoint():
    prompts = read_prompts("embedded:sentiment")
    assert len({prompt.words for prompt in prompts}) == len(prompts)
    parts = [some_prompts(prompts, part=(i, 3), seed=1) for i in (1, 2, 3)]
    assert sorted(prompt.words for part in parts for prompt in part) == sorted(prompt.words for prompt in prompts)
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


def test_the_best_of_n_is_the_mean_over_all_draws():
    from itertools import combinations

    from sepo.sampling.best import best_of, best_shares, kl_bound

    rng = np.random.default_rng(1)
    scores = [3.0, 1.0, 3.0, -2.0, 0.5]
    for n in range(1, 6):
        draws = [max(draw) for draw in combinations(scores, n)]
        assert best_shares(scores, n) @ scores == pytest.approx(np.mean(draws))
        assert best_shares(scores, n).sum() == pytest.approx(1)
    values = rng.normal(size=(6, 4))
    table = table_of(*[[(f"{i}{j}", v, "stop", 5) for j, v in enumerate(row)] for i, row in enumerate(values)])
    one, four = best_of(table, [1, 4])
    assert one.gain == pytest.approx(0)
    assert four.score == pytest.approx(values.max(1).mean())
    assert kl_bound(4) == pytest.approx(np.log(4) - 0.75)
    with pytest.raises(UserError, match="expected 1 to 4"):
        best_of(table, [5])
    with pytest.raises(UserError, match="other answers"):
        best_of(table, [2], table_of([("x", 1.0, "stop", 1)] * 4))
