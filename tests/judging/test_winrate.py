"""Win rates: published rows reproduced, length control compared with scikit-learn, and imperfect files."""

from __future__ import annotations

import csv
import gzip
import hashlib
import json
import math
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from scipy.special import expit

from sepo.cli import main
from sepo.errors import UserError
from sepo.judging import judgements, winrate
from sepo.judging.benchmark_scores import arena_games, arena_scores, mt_bench_pair_scores, mt_bench_scores
from sepo.judging.logistic import fit_cross_validated, fit_logistic
from sepo.judging.winrate import judgement_of, preference_of, summarise

SHARED = Path(__file__).parents[3] / "shared" / "data" / "alpaca_eval"
needs_data = pytest.mark.skipif(not SHARED.is_dir(), reason="the annotations published with AlpacaEval are not here")


def annotation(i: int, preference, ours: str = "b" * 90, theirs: str = "a" * 100, **more) -> dict:
    return {
        "instruction": f"question {i}", "output_1": theirs, "output_2": ours, "generator_1": "base",
        "generator_2": "model", "annotator": "judge", "preference": preference, "index": i, **more,
    }  # fmt: skip


def made_up(number: int = 200, seed: int = 0) -> list[dict]:
    """Judgements by a judge that prefers long answers, on answers of all lengths."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(20, 400, (number, 2))
    chance = expit(-0.4 + 0.01 * (lengths[:, 1] - lengths[:, 0]) + rng.normal(0, 1, number))
    return [
        annotation(i, 1 + round(float(p), 6), ours="b" * int(n), theirs="a" * int(m))
        for i, (p, (m, n)) in enumerate(zip(chance, lengths, strict=True))
    ]


def write(path: Path, rows) -> Path:
    path.write_text(json.dumps(rows))
    return path


def scored(tmp_path, rows, *options: str) -> dict:
    """The output of `sepo winrate` for an annotations file."""
    out = tmp_path / "out.json"
    assert main(["winrate", str(write(tmp_path / "annotations.json", rows)), "--json", str(out), *options]) == 0
    return json.loads(out.read_text())


# --- the published rows ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def published():
    with open(SHARED / "leaderboard.csv", encoding="utf-8") as file:
        return {
            row[""]: {key: float(v) for key, v in row.items() if key not in ("", "mode") and v}
            for row in csv.DictReader(file)
        }


@pytest.fixture(scope="module")
def reproduced():
    return judgements.score_files([SHARED / "annotations.parquet"])


@needs_data
def test_raw_win_rate_error_and_counts_of_every_published_model_are_reproduced(published, reproduced):
    assert published.keys() == reproduced.keys()
    for model, row in published.items():
        for key in ("win_rate", "standard_error", "discrete_win_rate", "n_wins", "n_wins_base", "n_draws", "n_total"):
            assert reproduced[model][key] == pytest.approx(row[key], abs=1e-9), (model, key)
        assert reproduced[model]["avg_length"] == pytest.approx(row["avg_length"], abs=3)


@needs_data
def test_length_control_is_within_a_point_where_lengths_are_alike_and_warns_where_they_are_not(published, reproduced):
    near = 0
    for model, result in reproduced.items():
        warned = any("extrapolates" in line for line in result["warnings"])
        alike = 0.75 <= result["length_ratio"] <= 1.34
        assert warned == (not alike)
        if alike:
            near += 1
            assert result["length_controlled_winrate"] == pytest.approx(row_of(published, model), abs=1)
    assert near >= 3


def row_of(published: dict, model: str) -> float:
    return published[model]["length_controlled_winrate"]


@needs_data
def test_a_constant_answer_wins_and_a_warning_names_it(reproduced):
    null = reproduced["NullModel"]
    assert null["win_rate"] > 75
    assert null["length_controlled_winrate"] > 80
    assert any("written for the judge" in line for line in null["warnings"])
    for model, result in reproduced.items():
        assert model == "NullModel" or not any("written for the judge" in line for line in result["warnings"])


@needs_data
@pytest.mark.parametrize("model", ["FuseChat-Llama-3.2-1B-Instruct", "claude-2", "text_davinci_001"])
def test_length_control_is_what_scikit_learn_fits_to_the_same_rows(model):
    linear = pytest.importorskip("sklearn.linear_model", reason="scikit-learn is no dependency")
    rows = [row for row in pq.read_table(SHARED / "annotations.parquet").to_pylist() if row["model"] == model]
    result = summarise([judgement_of(row, i) for i, row in enumerate(rows)])
    rows = [row for row in rows if row["preference"] is not None]
    difference = np.array([float(row["length_1"] - row["length_2"]) for row in rows])
    features = np.column_stack([np.tanh(difference / difference.std(ddof=1)), np.ones(len(rows))])
    targets = np.array([row["preference"] for row in rows]) - 1
    theirs = linear.LogisticRegression(
        C=result["lc_strength"], l1_ratio=1.0, solver="liblinear", fit_intercept=False, tol=1e-9, max_iter=10_000
    )
    labels = np.repeat([1, 0], len(rows))
    theirs.fit(np.vstack([features, features]), labels, sample_weight=np.concatenate([targets, 1 - targets]))
    assert result["length_controlled_winrate"] == pytest.approx(100 * float(expit(theirs.coef_[0, 1])), abs=1e-3)


# --- the fit --------------------------------------------------------------------------------------------------------


def problem():
    rng = np.random.default_rng(7)
    features = np.column_stack([np.tanh(rng.normal(size=120)), rng.normal(size=120), np.ones(120)])
    targets = expit(features @ [0.8, -0.5, 0.3] + rng.normal(size=120)).round(6)
    return features, targets, np.where(np.arange(120) % 3, 1.0, 0.1)


def test_the_fit_is_the_one_that_scikit_learn_chooses_by_cross_validation():
    # LogisticRegressionCV(penalty="l1", solver="liblinear", cv=GroupKFold(5), Cs=10, fit_intercept=False, tol=1e-9) of
    # scikit-learn 1.9.1 on these rows, each twice, scored by the log loss on the soft labels.
    features, targets, weights = problem()
    found, strength = fit_cross_validated(features, targets, weights)
    assert strength == pytest.approx(SKLEARN["C"])
    np.testing.assert_allclose(found, SKLEARN["coefficients"], atol=1e-6)


SKLEARN = {"C": 21.54434690031882, "coefficients": [0.4393331, -0.45551455, 0.18636811]}


@pytest.mark.parametrize("strength", [1e-4, 0.05, 1.0, 100.0, None])
def test_no_nearby_coefficients_cost_less(strength):
    features, targets, weights = problem()
    found = fit_logistic(features, targets, weights, strength)

    def cost(at):
        logits = features @ at
        likelihood = float(weights @ (np.logaddexp(0, logits) - targets * logits))
        return likelihood if strength is None else strength * likelihood + np.abs(at).sum()

    rng = np.random.default_rng(0)
    near = [cost(found + scale * rng.normal(size=3)) for scale in (1e-3, 1e-2, 1) for _ in range(50)]
    assert min(near) >= cost(found)
    if strength == 1e-4:
        assert not found.any()


def test_a_fit_without_a_maximum_ends_at_probabilities_of_one():
    found = fit_logistic(np.ones((30, 1)), np.ones(30))
    assert expit(found)[0] > 1 - 1e-6


# --- the two official files -----------------------------------------------------------------------------------------


def official_files(folder: Path, monkeypatch, change: str = "") -> Path:
    """Invented files in the official format; their digests replace the published ones."""
    folder.mkdir()
    rng = np.random.default_rng(3)
    lines = ["model,index,preference,std_delta_len,instruction_difficulty,not_gamed_baseline"]
    hard = rng.normal(size=200).round(6)
    for name in ("concise", "verbose"):
        for i in range(200):
            lines.append(f"{name},{i},{rng.random():.6f},{rng.normal():.6f},{hard[i]},False")
    (folder / winrate.GAMED).write_text("\n".join(lines) + "\n")
    (folder / winrate.DIFFICULTY).write_text(
        "index,instruction_difficulty\n" + "\n".join(f"{i},{h}" for i, h in enumerate(hard))
    )
    digests = {name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in winrate.OFFICIAL_SHA256}
    monkeypatch.setattr(winrate, "OFFICIAL_SHA256", digests)
    if change:
        (folder / change).write_text((folder / change).read_text() + "\n")
    return folder


def test_with_the_official_files_the_full_model_is_fitted(tmp_path, monkeypatch):
    data = official_files(tmp_path / "glm", monkeypatch)
    result = scored(tmp_path, made_up(), "--glm-data", str(data))
    assert result["lc_model"] == "full"
    # scikit-learn 1.9.1 on the same rows, features and weights, with a tolerance of 1e-9.
    assert result["lc_strength"] == pytest.approx(FULL["C"])
    assert result["length_controlled_winrate"] == pytest.approx(FULL["lc"], abs=1e-5)
    assert result["lc_standard_error"] == pytest.approx(FULL["error"], abs=1e-5)


FULL = {"C": 2.782559402207126, "lc": 41.243800915553244, "error": 0.009539537761377259}


def test_a_prompt_that_is_judged_in_both_orders_counts_once_in_every_standard_error(tmp_path, monkeypatch):
    """The errors are those of the mean of both verdicts of each prompt."""
    data = official_files(tmp_path / "glm", monkeypatch)
    rows = made_up()
    rng = np.random.default_rng(5)
    twice = [{**row, "preference": row["preference"] + shift} for row, step in zip(rows, rng.uniform(0, 0.2, len(rows)),
             strict=True) for shift in ((step, -step) if 1.2 <= row["preference"] <= 1.8 else (0, 0))]  # fmt: skip
    assert (
        sum(row["preference"] != other["preference"] for row, other in zip(twice[::2], twice[1::2], strict=True)) > 20
    )
    once = [{**row, "preference": (row["preference"] + other["preference"]) / 2}
            for row, other in zip(twice[::2], twice[1::2], strict=True)]  # fmt: skip
    results = []
    for name, judged in (("once", once), ("twice", twice)):
        (tmp_path / name).mkdir()
        results.append(scored(tmp_path / name, judged, "--glm-data", str(data)))
    for name in ("win_rate", "standard_error", "n_prompts", "length_controlled_winrate", "lc_standard_error"):
        assert results[0][name] == pytest.approx(results[1][name]), name
    (tmp_path / "few").mkdir()
    warned = scored(tmp_path / "few", [row for row in made_up()[:60] for _ in range(2)])["warnings"]
    assert any("with 60 prompts" in line for line in warned)


@pytest.mark.parametrize("name", [winrate.GAMED, winrate.DIFFICULTY])
def test_a_file_that_is_not_the_published_one_is_refused(name, tmp_path, monkeypatch, capsys):
    data = official_files(tmp_path / "glm", monkeypatch, change=name)
    rows = write(tmp_path / "annotations.json", made_up())
    assert main(["winrate", str(rows), "--glm-data", str(data)]) == 2
    assert "not the published file" in capsys.readouterr().err
    (data / name).unlink()
    assert main(["winrate", str(rows), "--glm-data", str(data)]) == 2
    assert "does not exist" in capsys.readouterr().err


def test_rows_without_a_number_of_the_benchmark_are_refused_for_the_full_model(tmp_path, monkeypatch, capsys):
    data = official_files(tmp_path / "glm", monkeypatch)
    rows = made_up()
    rows[5]["index"] = 4321
    path = write(tmp_path / "annotations.json", rows)
    assert main(["winrate", str(path), "--glm-data", str(data)]) == 2
    assert "found 4321" in capsys.readouterr().err


# --- raw win rates --------------------------------------------------------------------------------------------------


def test_a_preference_is_a_number_from_one_to_two_and_zero_is_a_tie():
    good = {1: 1, 2: 2, 1.5: 1.5, 0: 1.5, "1.25": 1.25, " 2 ": 2}
    assert {value: preference_of(value) for value in good} == good
    for bad in (None, "", "n/a", 3, 0.99, -1, math.nan, math.inf, True, [1.5], {"a": 1}, 10**400):
        assert math.isnan(preference_of(bad)), bad


def test_unusable_judgements_are_counted_and_left_out(tmp_path):
    rows = [annotation(i, p) for i, p in enumerate([1, 2, 2, "1.5", 0, None, "error", 7, [2], True])]
    del rows[5]["preference"]
    rows += [None, 3, {"generator_2": "model"}]
    result = scored(tmp_path, rows)
    assert (result["n_total"], result["n_unusable"]) == (5, 8)
    assert (result["n_wins"], result["n_wins_base"], result["n_draws"]) == (2, 1, 2)
    assert result["win_rate"] == pytest.approx(60)
    assert result["standard_error"] == pytest.approx(100 * np.std([0, 1, 1, 0.5, 0.5], ddof=1) / np.sqrt(5))
    assert any("8 of 13 judgements" in line for line in result["warnings"])


@pytest.mark.parametrize("values", [[0, 100, 50, 80], [-1, 0, 1, 1], [1, 5, 3, 2], [1, 2, 3], [-0.5, 0.5]])
def test_preferences_of_another_scale_are_named(values, tmp_path, capsys):
    path = tmp_path / "a.json"
    path.write_text(json.dumps([annotation(i, value) for i, value in enumerate(values)]))
    assert main(["winrate", str(path)]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "AlpacaEval's" in error


def test_missing_answers_do_not_end_the_count(tmp_path):
    rows = made_up(60)
    rows[0]["output_2"] = None
    rows[1]["output_1"] = 17
    del rows[2]["output_2"]
    rows[3]["instruction"] = None
    rows[4]["instruction"], rows[4]["index"] = {}, "x"
    result = scored(tmp_path, rows)
    assert result["n_total"] == 60
    assert result["n_without_length"] == 3
    assert math.isfinite(result["length_controlled_winrate"])


def test_two_judgements_of_a_prompt_count_as_one_prompt_in_the_error(tmp_path):
    once = [annotation(i, p) for i, p in enumerate([1.2, 1.9, 1.4, 2.0, 1.0, 1.7])]
    twice = scored(tmp_path, once + once)
    assert twice["n_total"] == 12
    assert twice["standard_error"] == pytest.approx(scored(tmp_path, once)["standard_error"])


def test_length_control_corrects_a_judge_that_only_prefers_length(tmp_path):
    result = scored(
        tmp_path, [annotation(i, 1 + (n > 100), ours="b" * n) for i, n in enumerate([150, 160, 170, 40] * 30)]
    )
    assert result["win_rate"] == 75
    assert result["length_controlled_winrate"] < 65


def test_a_model_against_itself_wins_half_by_definition(tmp_path):
    rows = [annotation(i, 1.5, ours="a", theirs="a", generator_2="base") for i in range(20)]
    result = scored(tmp_path, rows)
    assert (result["win_rate"], result["length_controlled_winrate"], result["standard_error"]) == (50, 50, 0)


def test_one_judgement_has_no_error_and_few_no_length_control(tmp_path):
    result = scored(tmp_path, [annotation(0, 2)])
    assert result["win_rate"] == 100
    assert result["standard_error"] is None
    assert result["length_controlled_winrate"] is None


def test_results_of_several_models_have_their_names(tmp_path):
    rows = made_up(30) + [annotation(i, 1.9, generator_2="other") for i in range(8)]
    result = scored(tmp_path, rows)
    assert result.keys() == {"model", "other"}
    assert result["other"]["n_total"] == 8


def test_judges_and_baselines_are_not_mixed(tmp_path):
    rows = [annotation(i, 2) for i in range(6)] + [annotation(i, 1, annotator="strict") for i in range(6)]
    result = scored(tmp_path, rows)
    assert {name: one["win_rate"] for name, one in result.items()} == {
        "model against base by judge": 100, "model against base by strict": 0,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("a.json", "[]", "holds no row"),
        ("a.json", "[1, 2]", "holds no row"),
        ("a.json", '{"preference": 1}', "expected a list of rows"),
        ("a.json", "[{", "is not JSON"),
        ("a.json", "[" * 100_000, "is not JSON"),
        ("a.json", '[{"preference": null}]', "no judgement"),
        ("a.json", '[{"text": "hello"}]', "no known judgements"),
        ("a.jsonl", '{"preference": 1}\n{"pref', "line 2"),
        ("a.parquet", "not parquet", "is not a readable parquet file"),
        ("a.txt", "hello", "is not a dataset file"),
        ("a.json", "\udcff\udcfe", "holds no row"),
        ("a.json", "\udce9\udce9", "is not UTF-8"),
        ("a.csv", 'preference,generator_2\n1,"m" n\n', "line 2"),
        ("missing.json", None, "does not exist"),
    ],
)
def test_a_file_without_judgements_is_refused_in_one_line(name, content, says, tmp_path, capsys):
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content.encode("utf-8", "surrogateescape"))
    assert main(["winrate", str(path)]) == 2
    error = capsys.readouterr().err
    assert says in error
    assert error.count("\n") == 1


@pytest.mark.parametrize("form", ["gz", "zst", "index", "list", "split", "utf16"])
def test_annotations_are_read_in_the_forms_that_pandas_and_others_write(form, tmp_path):
    rows = made_up(12)
    columns = {name: [row[name] for row in rows] for name in rows[0]}
    text = json.dumps(rows)
    path = tmp_path / "annotations.json"
    if form == "gz":
        path = tmp_path / "annotations.json.gz"
        path.write_bytes(gzip.compress(text.encode()))
    elif form == "zst":
        path = tmp_path / "annotations.jsonl.zst"
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        with pa.CompressedOutputStream(str(path), "zstd") as out:
            out.write(lines.encode())
    elif form == "index":
        path.write_text(
            json.dumps({name: {str(i): v for i, v in enumerate(values)} for name, values in columns.items()})
        )
    elif form == "list":
        path.write_text(json.dumps(columns))
    elif form == "split":
        path.write_text(json.dumps({"columns": list(columns), "data": [list(row.values()) for row in rows]}))
    else:
        path.write_bytes(text.encode("utf-16"))
    assert judgements.read_rows(path) == rows


@pytest.mark.parametrize("name", ["annotations.json", "a.jsonl", "a.parquet", "a.csv", "a.json.gz"])
def test_a_pointer_of_git_lfs_is_named(name, tmp_path, capsys):
    (tmp_path / name).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 7\n")
    assert main(["winrate", str(tmp_path / name)]) == 2
    assert "pointer of Git LFS" in capsys.readouterr().err


def test_preferences_from_zero_to_one_are_named(tmp_path, capsys):
    shares = [1, 1, 1, 0.5, 0, 1, 1, 0, 1, 1]
    path = write(tmp_path / "own.json", [annotation(i, share) for i, share in enumerate(shares)])
    assert main(["winrate", str(path)]) == 2
    assert "no preference is above 1" in capsys.readouterr().err
    path = write(tmp_path / "own.json", [annotation(i, int(share)) for i, share in enumerate(shares)])
    assert main(["winrate", str(path)]) == 0
    assert "no preference is above 1" in capsys.readouterr().err
    path = write(tmp_path / "own.json", [annotation(i, 1 + share) for i, share in enumerate(shares)])
    assert main(["winrate", str(path)]) == 0
    assert "no preference is above 1" not in capsys.readouterr().err


def grade(question: int, score: float, judge, **more) -> dict:
    return {"question_id": question, "model": "m", "judge": judge, "score": score, "turn": 1, **more}


def duel(question: int, winner: str, judge) -> dict:
    names = {"question_id": question, "model_1": "m", "model_2": "base", "turn": 1}
    return {**names, "judge": judge, "g1_winner": winner, "g2_winner": winner}


def game(question: int, good: bool, judge: str) -> dict:
    verdicts = ("B>A", "A>B") if good else ("A>B", "B>A")
    return {**arena_row(question, *verdicts), "judge": judge}


# Rows of a judge, by the model's success; their figure; its value for success and for failure.
BY_JUDGE = {
    "arena": (game, "score", 100, 0),
    "grades": (lambda i, good, judge: grade(i, 9 if good else 2, [judge, f"single-{i % 2}"]), "score", 9, 2),
    "duels": (lambda i, good, judge: duel(i, "model_1" if good else "model_2", [judge, "pair"]), "win_rate", 100, 0),
}


@pytest.mark.parametrize("kind", BY_JUDGE)
@pytest.mark.parametrize("files", [1, 2])
def test_judgements_of_two_judges_are_split_and_a_question_counts_once(kind, files, tmp_path, capsys):
    row, figure, good, bad = BY_JUDGE[kind]
    kind_rows = [[row(i, True, "kind") for i in range(6)], [row(i, False, "strict") for i in range(6)]]
    groups = kind_rows if files == 2 else [kind_rows[0] + kind_rows[1]]
    paths = [write(tmp_path / f"{i}.json", rows) for i, rows in enumerate(groups)]
    results = [one for name, one in judgements.score_files(paths).items() if name.startswith("m")]
    assert {one["judge"]: one[figure] for one in results} == {"kind": good, "strict": bad}
    assert {one["n_total"] for one in results} == {6}
    assert main(["winrate", str(write(tmp_path / "twice.json", [*kind_rows[0], kind_rows[0][3]]))]) == 2
    assert "twice" in capsys.readouterr().err


# --- MT-Bench -------------------------------------------------------------------------------------------------------


def test_a_missing_grade_is_counted_and_not_a_zero(tmp_path):
    rows = [
        {"question_id": 81 + i // 2, "model": "m", "turn": 1 + i % 2, "score": score}
        for i, score in enumerate([8, 6, 9, -1, 7, None, "5", 11])
    ]
    result = mt_bench_scores(rows)
    assert result["score"] == pytest.approx(np.mean([8, 6, 9, 7, 5]))
    assert result["score_turn_1"] == pytest.approx(np.mean([8, 9, 7, 5]))
    assert result["score_turn_2"] == 6
    assert (result["n_total"], result["n_failed"]) == (5, 3)
    path = tmp_path / "gpt-4_single.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    assert judgements.score_files([path])["m"]["score"] == result["score"]


def test_a_pair_counts_where_both_orders_agree():
    verdicts = [
        ("model_1", "model_1"),
        ("model_1", "model_2"),
        ("tie", "tie"),
        ("model_2", "model_2"),
        ("error", "tie"),
    ]
    rows = [
        {"question_id": i, "model_1": "m", "model_2": "n", "g1_winner": a, "g2_winner": b}
        for i, (a, b) in enumerate(verdicts)
    ]
    ours, theirs = mt_bench_pair_scores(rows, "m"), mt_bench_pair_scores(rows[:1], "n")
    assert (ours["win_rate"], ours["n_total"], ours["n_failed"]) == (50, 4, 1)
    assert theirs["win_rate"] == 0


# --- Arena-Hard -----------------------------------------------------------------------------------------------------


def arena_row(i: int, first: str | None, second: str | None, model: str = "m", category: str = "hard_prompt") -> dict:
    return {"uid": f"u{i}", "model": model, "category": category, "games": [{"score": first}, {"score": second}]}


def test_the_model_comes_second_in_the_first_game_and_first_in_the_second():
    assert arena_games(arena_row(0, "B>A", "A>B")) == [1, 1]
    assert arena_games(arena_row(0, "A>>B", "A=B")) == [0.5, 0, 0, 0]
    assert arena_games(arena_row(0, "A<<B", "B<A")) == [1, 1, 1, 1]
    for missing in (arena_row(0, None, "A>B"), arena_row(0, "A>B", "?"), {"uid": 1}, {"games": [None, None]}):
        assert arena_games(missing) == []


def test_arena_scores_are_the_share_of_games_with_failures_counted():
    rows = [arena_row(i, "B>A", "A>B") for i in range(30)] + [arena_row(i, "A>B", "B>A") for i in range(30, 40)]
    rows += [arena_row(99, None, "A>B")]
    result = arena_scores({"m": rows})["m"]
    assert result["score"] == 75
    assert (result["n_total"], result["n_failed"]) == (40, 1)
    assert result["lower"] < 75 < result["upper"]
    assert result["standard_error"] == pytest.approx(100 * np.std([1] * 30 + [0] * 10, ddof=1) / np.sqrt(40))


def test_style_control_removes_the_effect_of_length(tmp_path):
    """Two equal models, one of which writes twice as much, and a judge that only looks at length."""
    rng = np.random.default_rng(0)
    rows, styles = {"long": [], "short": []}, {"long": {}, "short": {}, "base": {}}
    for i in range(150):
        styles["base"][f"u{i}"] = [float(rng.integers(80, 120)), 1.0, 0.0, 2.0]
        for model, scale in (("long", 1.6), ("short", 0.9)):
            styles[model][f"u{i}"] = [float(rng.integers(60, 140) * scale), float(rng.integers(3)), 0.0, 1.0]
            ours, theirs = styles[model][f"u{i}"][0], styles["base"][f"u{i}"][0]
            wins = rng.random() < expit(4 * (ours - theirs) / (ours + theirs))
            rows[model].append(arena_row(i, *(("B>A", "A>B") if wins else ("A>B", "B>A")), model=model))
    result = arena_scores(rows, styles, "base")
    raw = result["long"]["score"] - result["short"]["score"]
    controlled = result["long"]["style_controlled"] - result["short"]["style_controlled"]
    assert raw > 15
    assert abs(controlled) < raw / 3
    assert any(
        "one model alone" in line for line in arena_scores({"long": rows["long"]}, styles, "base")["long"]["warnings"]
    )


def test_arena_files_are_scored_with_their_answers(tmp_path, capsys):
    judged, ours, theirs = (tmp_path / f"{name}.jsonl" for name in ("judged", "ours", "theirs"))
    judged.write_text("\n".join(json.dumps(arena_row(i, "B>A" if i % 3 else "A=B", "A>B")) for i in range(20)))

    def answers(model: str, tokens: int) -> str:
        style = {"header_count": {"h1": 1, "h2": 0}, "list_count": {"ordered": 2}, "bold_count": {"**": 0}}
        lines = (
            {"uid": f"u{i}", "model": model, "metadata": {"token_len": tokens + i * i % 7, **style}} for i in range(20)
        )
        return "\n".join(map(json.dumps, lines))

    ours.write_text(answers("m", 100))
    theirs.write_text(answers("o3-mini-2025-01-31", 120))
    out = tmp_path / "out.json"
    assert main(["winrate", str(judged), "--answers", str(ours), str(theirs), "--json", str(out)]) == 0
    result = json.loads(out.read_text())
    assert result["baseline"] == "o3-mini-2025-01-31"
    assert result["style_controlled"] > 50
    capsys.readouterr()
    assert main(["winrate", str(judged), "--answers", str(ours)]) == 2
    assert "answers of its baseline" in capsys.readouterr().err


def test_games_against_several_baselines_have_a_score_each_under_the_baselines_name(tmp_path):
    """`sepo judge` and Arena-Hard v2 name the baseline in each row."""
    wins, losses = ([{**arena_row(i, *games), "baseline": name} for i in range(3)]
                    for name, games in (("weak", ("B>A", "A>B")), ("strong", ("A>B", "B>A"))))  # fmt: skip
    file = tmp_path / "judged.json"
    file.write_text(json.dumps(wins))
    (only,) = judgements.score_files([file]).values()
    assert (only["baseline"], only["score"]) == ("weak", 100)
    with pytest.raises(UserError, match="--baseline other, but the judgements name 'weak'"):
        judgements.score_files([file], baseline="other")
    file.write_text(json.dumps([*wins, *losses]))
    results = judgements.score_files([file])
    assert {name: (row["baseline"], row["score"]) for name, row in results.items()} == {
        "m against weak": ("weak", 100), "m against strong": ("strong", 0),
    }  # fmt: skip


def test_a_model_compared_with_itself_has_no_win_rate(tmp_path):
    row = {"question_id": 1, "model_1": "m", "model_2": "m", "g1_winner": "model_1", "g2_winner": "model_1", "turn": 1}
    (tmp_path / "pairs.jsonl").write_text(json.dumps(row))
    with pytest.raises(UserError, match="compares 'm' with itself"):
        judgements.score_files([tmp_path / "pairs.jsonl"])


def test_a_missing_file_is_a_user_error_of_the_function_too(tmp_path):
    with pytest.raises(UserError, match="does not exist"):
        judgements.read_rows(tmp_path / "nothing.json")


def test_printed_scores_have_even_decimals_each_warning_once_and_no_empty_column(tmp_path, capsys):
    """Own prompts too few for length control have neither its column nor its warnings."""
    rows = [{"instruction": f"q{i}", "output_1": "a" * 9, "output_2": "b" * 3 * (i + 1), "generator_2": f"m{j}",
             "preference": 1 + ((i + j) % 3) / 2} for j in range(9) for i in range(4)]  # fmt: skip
    (tmp_path / "annotations.json").write_text(json.dumps(rows))
    assert main(["winrate", str(tmp_path / "annotations.json"), "--json", str(tmp_path / "scores.json")]) == 0
    said = capsys.readouterr()
    assert "length-control" not in said.out + said.err
    cells = [line.split("│")[1].strip() for line in said.out.splitlines() if line.startswith("m")]
    assert len(cells) == 9
    assert {len(cell.split(".")[1]) for cell in cells} == {1}
    assert str(tmp_path / "scores.json") in said.out
    more = [{**row, "instruction": f"{row['instruction']} {k}"} for k in range(3) for row in rows]
    (tmp_path / "annotations.json").write_text(json.dumps(more))
    assert main(["winrate", str(tmp_path / "annotations.json")]) == 0
    said = capsys.readouterr()
    assert said.err.count("is drawn towards 50") == 1
    assert said.err.count("likewise") <= 2


@pytest.mark.parametrize("style", [[100, 0, 0, 0], [120, 1, 0, 0], [150, 3, 2, 1], [90, 2, 0, 1]])
def test_a_style_that_never_varies_changes_no_score(style):
    """Equal differences have a standard deviation of 1e-17, which is no unit to divide by: 80 became 57."""
    rows = [arena_row(i, *(("B>A", "A>B") if i < 24 else ("A>B", "B>A"))) for i in range(30)]
    styles = {"m": {f"u{i}": style for i in range(30)}, "base": {f"u{i}": [100, 0, 0, 0] for i in range(30)}}
    result = arena_scores({"m": rows}, styles, "base")["m"]
    assert result["style_controlled"] == pytest.approx(result["score"], abs=2)
