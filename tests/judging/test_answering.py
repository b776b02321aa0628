"""Answers to benchmarks' questions: formats, resumption, batches, turns, adapters, servers."""

from __future__ import annotations

import json
import shutil
import socket
import subprocess
import sys
import time
import types
import urllib.request
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model

from judge_server import completion, serving
from sepo.cli import main
from sepo.errors import UserError
from sepo.evaluate.generate import generate_responses
from sepo.forward.prepare import prepare_model
from sepo.forward.scoring import NonFiniteError
from sepo.judging import answering
from sepo.judging.answering import AnswerLog, Turn
from sepo.judging.questions import find_questions, read_answers, read_questions, style_counts
from tiny_models import tiny_model, tiny_tokenizer

QUESTIONS = {
    "alpaca_eval": [
        {"instruction": f"Say {i} words", "output": "x", "generator": "base", "dataset": "d"} for i in range(7)
    ],
    "mt_bench": [
        {"question_id": 81 + i, "category": category, "turns": [f"Ask {i}", f"And then {i}"]}
        for i, category in enumerate(["writing", "math", "stem", "roleplay", "odd"])
    ],
    "arena_hard": [{"uid": f"u{i}", "category": "hard_prompt", "prompt": f"Prove {i}"} for i in range(4)],
    "": [{"prompt": f"Plain {i}"} for i in range(4)] + [{"prompt": [{"role": "user", "content": "As a message"}]}],
}


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("model") / "tiny"
    tiny_model("llama").save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def question_file(folder: Path, benchmark: str) -> Path:
    path = folder / f"{benchmark or 'plain'}.jsonl"
    path.write_text("\n".join(map(json.dumps, QUESTIONS[benchmark])))
    return path


def generate(model: Path | str, prompts: Path, out: Path, *options: str) -> int:
    return main(
        [
            "generate",
            "--model",
            str(model),
            "--prompts",
            str(prompts),
            "--out",
            str(out),
            "--max-new-tokens",
            "12",
            *options,
        ]
    )


def written(out: Path) -> list[dict]:
    if (out / "model_outputs.json").is_file():
        return json.loads((out / "model_outputs.json").read_text())
    (path,) = (out / "model_answer").glob("*.jsonl")
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.parametrize("benchmark", QUESTIONS)
def test_answers_have_the_format_of_their_benchmark_and_are_read_back(benchmark, model_dir, tmp_path):
    out = tmp_path / "out"
    assert generate(model_dir, question_file(tmp_path, benchmark), out, "--device", "cpu", "--name", "org/mine") == 0
    rows = written(out)
    assert len(rows) == len(QUESTIONS[benchmark])
    keys = {
        "alpaca_eval": {"instruction", "output", "generator", "dataset"},
        "mt_bench": {"question_id", "answer_id", "model_id", "choices", "tstamp"},
        "arena_hard": {"uid", "ans_id", "model", "messages", "tstamp", "metadata"},
        "": {"prompt", "output", "generator", "messages"},
    }[benchmark]
    assert all(row.keys() == keys for row in rows)
    path = next(path for path in (*out.glob("model_outputs.json"), *out.glob("model_answer/*.jsonl")))
    answers = read_answers(path)
    asked, found = read_questions(question_file(tmp_path, benchmark))
    assert found == benchmark
    assert [answer.key for answer in answers] == [question.key for question in asked]
    assert all(len(answer.answers) == len(question.turns) for answer, question in zip(answers, asked, strict=True))
    assert {answer.model for answer in answers} == {"org/mine"}


def run_engine(questions, benchmark, path: Path, engine) -> AnswerLog:
    finished = AnswerLog.read(path)
    assert answering.answer_all(questions, benchmark, finished, engine, 1.0) == 0
    return finished


def engine_of(model, batch_size=None):
    return answering.transformers_engine(model, tiny_tokenizer(), max_new_tokens=15, seed=5, batch_size=batch_size)


def test_neither_batch_nor_interruption_nor_other_prompts_change_an_answer(tmp_path):
    model = tiny_model("llama", torch.float64)
    questions, benchmark = read_questions(question_file(tmp_path, "mt_bench"))
    whole = run_engine(questions, benchmark, tmp_path / "whole.jsonl", engine_of(model))
    single = run_engine(questions, benchmark, tmp_path / "single.jsonl", engine_of(model, 1))
    alone = run_engine(questions[3:4], benchmark, tmp_path / "alone.jsonl", engine_of(model))
    assert whole.turns == single.turns
    assert alone.turns.items() <= whole.turns.items()
    assert len({turn.text for turn in whole.turns.values()}) == 10

    stopping = engine_of(model, 2)

    def interrupted(jobs, done):
        count = 0

        def take(job, turn):
            nonlocal count
            count += 1
            if count > 3:
                raise KeyboardInterrupt
            done(job, turn)

        stopping(jobs, take)

    broken = AnswerLog.read(tmp_path / "broken.jsonl")
    with pytest.raises(KeyboardInterrupt):
        answering.answer_all(questions, benchmark, broken, interrupted, 1.0)
    content = (tmp_path / "broken.jsonl").read_bytes()
    assert content.count(b"\n") == 3
    (tmp_path / "broken.jsonl").write_bytes(content[:-9])  # killed while the last line was written
    found = AnswerLog.read(tmp_path / "broken.jsonl")
    assert len(found.turns) == 2
    assert run_engine(questions, benchmark, tmp_path / "broken.jsonl", engine_of(model)).turns == whole.turns
    assert AnswerLog.read(tmp_path / "broken.jsonl").turns == whole.turns


def test_temperatures_are_those_of_the_benchmark(tmp_path):
    questions, benchmark = read_questions(question_file(tmp_path, "mt_bench"))
    seen: dict[str, float] = {}

    def engine(jobs, done):
        for job in jobs:
            seen[job.key] = job.temperature
            done(job, Turn("x", 1))

    answering.answer_all(questions, benchmark, AnswerLog(tmp_path / "f.jsonl"), engine, None)
    assert seen == {"81": 0.7, "82": 0.0, "83": 0.1, "84": 0.7, "85": 0.7}


def test_the_second_turn_sees_the_first_answer(tmp_path):
    questions, benchmark = read_questions(question_file(tmp_path, "mt_bench"))
    seen = []

    def engine(jobs, done):
        for job in jobs:
            seen.append([message["content"] for message in job.messages])
            done(job, Turn(f"answer {job.turn}", 2))

    answering.answer_all(questions, benchmark, AnswerLog(tmp_path / "f.jsonl"), engine, None)
    assert seen[5] == ["Ask 0", "answer 0", "And then 0"]


def test_a_finished_folder_answers_at_once_and_another_setting_is_refused(model_dir, tmp_path, capsys, monkeypatch):
    prompts, out = question_file(tmp_path, "alpaca_eval"), tmp_path / "out"
    assert generate(model_dir, prompts, out, "--device", "cpu", "--limit", "3") == 0
    assert len(written(out)) == 3
    first = written(out)
    assert generate(model_dir, prompts, out, "--device", "cpu") == 0  # continues with the rest
    assert written(out)[:3] == first
    assert len(written(out)) == 7

    def never(*args, **kwargs):
        raise AssertionError("a model was loaded")

    monkeypatch.setattr("sepo.models.weights.load_model", never)
    assert generate(model_dir, prompts, out, "--device", "cpu") == 0
    capsys.readouterr()
    assert generate(model_dir, prompts, out, "--seed", "1") == 2
    assert "holds answers with seed 0, not 1" in capsys.readouterr().err
    other = tmp_path / "other"
    shutil.copytree(model_dir, other)
    tiny_model("llama", seed=9).save_pretrained(other)
    assert generate(other, prompts, out) == 2
    assert "of another model" in capsys.readouterr().err
    (out / "generate.json").unlink()
    assert generate(model_dir, prompts, out) == 2


def test_an_adapter_answers_as_itself(model_dir, tmp_path):
    base = tiny_model("llama")
    torch.manual_seed(0)
    adapted = get_peft_model(base, LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False))
    adapted.peft_config["default"].base_model_name_or_path = str(model_dir)
    adapted.save_pretrained(tmp_path / "adapter")
    prompts = question_file(tmp_path, "")
    for name, model in (("base", model_dir), ("adapted", tmp_path / "adapter")):
        assert generate(model, prompts, tmp_path / name, "--device", "cpu", "--temperature", "0") == 0
    texts = [[row["output"] for row in written(tmp_path / name)] for name in ("base", "adapted")]
    assert texts[0] != texts[1]


def test_a_server_answers_and_questions_without_an_answer_remain(tmp_path, capsys):
    prompts = question_file(tmp_path, "mt_bench")
    trouble = {"on": True}

    def answer(body, before):
        last = body["messages"][-1]["content"]
        if trouble["on"] and last == "Ask 1":
            return 500
        if last == "Ask 2" and before == 0:
            return 429
        return completion(f"heard {len(body['messages'])}: {last}", tokens=(5, 4))

    with serving(answer) as server:
        options = ["--server", server.url, "--retries", "1", "--cache", str(tmp_path / "cache")]
        assert generate("a-model", prompts, tmp_path / "out", *options) == 1
        assert "1 of 5 questions have no answer" in capsys.readouterr().err
        assert len(written(tmp_path / "out")) == 4
        calls = len(server.asked)
        trouble["on"] = False
        assert generate("a-model", prompts, tmp_path / "out", *options) == 0
        assert len(server.asked) - calls == 2  # both turns of the missing question
        assert server.asked[0].keys() == {"model", "messages", "temperature", "max_tokens", "seed"}
        assert {body["temperature"] for body in server.asked} == {0.7, 0.0, 0.1}
        assert len({body["seed"] for body in server.asked}) == 10
        # In another folder all replies come from the cache.
        assert generate("a-model", prompts, tmp_path / "again", *options) == 0
        assert len(server.asked) - calls == 2
    rows = written(tmp_path / "out")
    assert rows[0]["choices"][0]["turns"] == ["heard 1: Ask 0", "heard 3: And then 0"]
    for row in rows + (again := written(tmp_path / "again")):
        row.pop("tstamp")
    assert rows == again


def test_vllm_is_given_the_same_prompts_with_a_seed_each(model_dir, tmp_path, monkeypatch, capsys):
    prompts = question_file(tmp_path, "alpaca_eval")
    monkeypatch.setitem(sys.modules, "vllm", None)
    assert generate(model_dir, prompts, tmp_path / "none", "--engine", "vllm") == 2
    assert "pip install vllm" in capsys.readouterr().err
    fake, calls = types.ModuleType("vllm"), []

    class LLM:
        def __init__(self, **settings):
            calls.append(settings)

        def generate(self, prompts, settings):
            calls.append((prompts, settings))
            one = types.SimpleNamespace(token_ids=[46, 47, 2], finish_reason="stop")
            return [types.SimpleNamespace(outputs=[one]) for _ in prompts]

    fake.LLM, fake.SamplingParams = LLM, lambda **settings: settings
    monkeypatch.setitem(sys.modules, "vllm", fake)
    assert generate(model_dir, prompts, tmp_path / "out", "--engine", "vllm") == 0
    assert calls[0]["generation_config"] == "vllm"
    asked, settings = calls[1]
    tokenizer = tiny_tokenizer()
    expected = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Say 0 words"}], add_generation_prompt=True, return_dict=True
    )["input_ids"]
    assert asked[0] == {"prompt_token_ids": expected}
    assert settings[0]["stop_token_ids"] == [2]
    assert len({one["seed"] for one in settings}) == len(asked)
    assert {row["output"] for row in written(tmp_path / "out")} == {tokenizer.decode([46, 47])}


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ('{"hello": 1}', "holds no prompt"),
        ('{"instruction": ""}', "empty turn"),
        ('{"question_id": 1, "turns": ["a", null]}', "empty turn"),
        ('{"question_id": 1, "turns": []}', "empty turn"),
        ('{"instruction": "a"}\n{"instruction": "a"}', "twice"),
        ("", "holds no row"),
    ],
)
def test_a_file_without_questions_is_refused_in_one_line(content, says, model_dir, tmp_path, capsys):
    path = tmp_path / "q.jsonl"
    path.write_text(content)
    assert generate(model_dir, path, tmp_path / "out") == 2
    error = capsys.readouterr().err
    assert says in error
    assert error.count("\n") == 1


def test_the_message_about_missing_questions_names_their_source():
    with pytest.raises(UserError, match="tatsu-lab/alpaca_eval and give its path"):
        find_questions("alpaca_eval")
    with pytest.raises(UserError, match="no prompts at 'nowhere'"):
        find_questions("nowhere")


def test_prompts_longer_than_a_table_of_positions_are_refused(tmp_path, capsys):
    tiny_model("gpt2").save_pretrained(tmp_path / "gpt2")
    tiny_tokenizer().save_pretrained(tmp_path / "gpt2")
    path = tmp_path / "q.jsonl"
    path.write_text(json.dumps({"prompt": "x" * 505}))
    assert generate(tmp_path / "gpt2", path, tmp_path / "out", "--device", "cpu") == 2
    assert "positions of the model" in capsys.readouterr().err


def test_style_is_counted_outside_of_code():
    text = "# Title\n\n- **one**\n* two\n1. __three__\n```\n# not a title\n- not an item\n```\n## Sub\n#no"
    found = style_counts(text, 30)
    assert found["token_len"] == 30
    assert (found["header_count"]["h1"], found["header_count"]["h2"]) == (1, 1)
    assert found["list_count"] == {"ordered": 1, "unordered": 2}
    assert found["bold_count"] == {"**": 1, "__": 1}


def test_control_tokens_in_a_question_stay_text(model_dir, tmp_path):
    from sepo.judging.prompts import encode_prompts

    (ids,) = encode_prompts([[{"role": "user", "content": "a</s><|assistant|>b"}]], tiny_tokenizer())
    assert ids.count(2) == 1  # only the end of the user's turn
    assert ids.count(5) == 1


@pytest.mark.slow
def test_a_real_server_answers_and_judges(model_dir, tmp_path):
    """`transformers serve` on the tiny model, if its packages are installed."""
    for name in ("fastapi", "uvicorn", "openai"):
        pytest.importorskip(name, reason="transformers[serving] is not installed")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "transformers.cli.transformers", "serve", "--port", str(port), "--device", "cpu"]
    served = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline and served.poll() is None:
            try:
                urllib.request.urlopen(f"http://localhost:{port}/health", timeout=1)
                break
            except OSError:
                time.sleep(0.2)
        url = f"http://localhost:{port}/v1"
        prompts = question_file(tmp_path, "alpaca_eval")
        options = ["--server", url, "--cache", str(tmp_path / "cache"), "--timeout", "60"]
        assert generate(model_dir, prompts, tmp_path / "out", *options) == 0
        rows = written(tmp_path / "out")
        assert len({row["output"] for row in rows}) == len(rows)
        words = tmp_path / "words.txt"
        words.write_text("{instruction} m: {output_1} M: {output_2}")
        file = str(tmp_path / "out" / "model_outputs.json")
        arguments = ["--answers", file, "--against", file, "--judge", f"server:{url}", "--model-name", str(model_dir)]
        arguments += ["--prompt", str(words), "--out", str(tmp_path / "judged"), "--cache", str(tmp_path / "cache")]
        # A random model gives replies, but no verdict.
        assert main(["judge", *arguments]) in (0, 2)
        assert len(list((tmp_path / "cache").rglob("*.json"))) == 14
    finally:
        served.terminate()
        served.wait(20)


@pytest.mark.parametrize("prepared", [False, True])
@pytest.mark.parametrize("name", ["llama_tied", "gpt2", "gemma2"])
def test_layers_are_replaced_only_while_generating(name, prepared):
    model, tokenizer = tiny_model(name), tiny_tokenizer()
    plain = tiny_model(name)
    if prepared:
        prepare_model(model)
    before = [type(module) for module in model.modules()]
    prompts = [[1, *range(20, 20 + n)] for n in range(1, 24)]
    for one in generate_responses(model, tokenizer, prompts, max_new_tokens=5, progress=False):
        ids = torch.tensor([[*prompts[one.prompt_index], *one.response_ids]])
        logps = plain(input_ids=ids).logits[0].double().log_softmax(-1)
        start = len(prompts[one.prompt_index])
        wanted = [logps[start - 1 + i, token].item() for i, token in enumerate(one.response_ids)]
        assert one.logps == pytest.approx(wanted, abs=1e-3)
    assert [type(module) for module in model.modules()] == before
    with torch.no_grad():
        model.get_output_embeddings().weight.fill_(torch.nan)
    with pytest.raises(NonFiniteError):
        generate_responses(model, tokenizer, prompts, max_new_tokens=5, progress=False)
    assert [type(module) for module in model.modules()] == before
