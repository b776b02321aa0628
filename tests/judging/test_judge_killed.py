"""A run that is killed while it generates and while it is judged repeats no finished response and no paid request."""

from __future__ import annotations

import json
import os
import signal
from collections import Counter
from pathlib import Path

import pyarrow.parquet as pq
import pytest

import spawn
from judge_server import Server, completion, serving
from sepo.cli import main
from sepo.evaluate.generate import FinishedResponses
from tiny_run import prepare

RECIPE = """
data: {source: prefs.jsonl, held_out: 6, as_chat: true}
reference: {model: model}
device: cpu
oracle: {training: {learning_rate: 0.002, batch_size: 8}}
policy: {training: {learning_rate: 0.001, batch_size: 8}}
eval: {prompts: 4, samples: 2, max_new_tokens: 8, batch_size: 2, examples: 2}
"""
# `sepo run`, which reports each stored batch of responses, and kills itself before it stores the n-th.
WATCHED = """
import os, signal, sys
from sepo.cli import main
left = int(sys.argv[1])
def hook(event, arguments):
    global left
    if event == "open" and arguments[1] == "a" and "finished-" in str(arguments[0]):
        if not left:
            os.kill(os.getpid(), signal.SIGKILL)
        left -= 1
        os.write(1, b"#kept\\n")
sys.addaudithook(hook)
sys.exit(main(sys.argv[2:]))
"""


@pytest.fixture
def workplace(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    prepare(tmp_path, RECIPE)
    (tmp_path / "words.txt").write_text("{instruction} m: {output_1} M: {output_2}")
    return tmp_path


def judged_by(server: Server, cache: str) -> str:
    settings = f"server: '{server.url}', model: j, prompt: words.txt, cache: {cache}, concurrency: 1, retries: 0"
    return f"eval.judge={{{settings}}}"


def verdict(body: dict) -> dict:
    """The reply of a judge that prefers the answer with more letters "a"."""
    first, second = body["messages"][-1]["content"].split(" m: ")[1].split(" M: ")
    return completion("m" if first.count("a") >= second.count("a") else "M")


def questions(server: Server) -> Counter[str]:
    return Counter(json.dumps(body, sort_keys=True) for body in server.asked)


def test_a_killed_run_repeats_no_finished_response_and_no_paid_request(workplace):
    children: list[int] = []
    deadly = 3  # the run is killed at this question, which gets no reply

    def answer(body, before):
        if len(served.asked) == deadly:
            os.kill(children[-1], signal.SIGKILL)
            return None
        return verdict(body)

    with serving(answer) as served:
        arguments = ["run", "recipe.yaml", "output_dir=run", judged_by(served, "cache")]

        def start(batches: int) -> tuple[int, int]:
            """Run until killed or done; returns the exit code and the number of stored batches."""
            with open("kept", "wb") as kept, open("run.log", "ab") as log:
                command = ["-c", WATCHED, batches, *arguments]
                child = spawn.start(command, stdout=kept.fileno(), stderr=log.fileno())
                children.append(child.pid)
                return child.wait(300), Path("kept").read_text().count("#kept\n")

        whole = 2 * (4 + 1)  # policy and base: 8 responses and 2 examples each, 2 in a batch
        assert start(3) == (-signal.SIGKILL, 3)
        assert not served.asked
        assert start(99) == (-signal.SIGKILL, whole - 3)
        assert len(served.asked) == deadly
        assert start(99) == (0, 0), Path("run.log").read_text()[-2000:]
        asked = questions(served)
    lost = json.dumps(served.asked[deadly - 1], sort_keys=True)
    assert asked.pop(lost) == 2
    assert set(asked.values()) == {1}
    metrics = json.loads((workplace / "run" / "metrics.json").read_text())
    assert metrics["judge/unanswered"] == metrics["judge/failed"] == 0
    assert not list((workplace / "run" / "eval").glob("finished-*"))

    with serving(lambda body, before: verdict(body)) as undisturbed:
        assert main(["run", "recipe.yaml", "output_dir=clean", judged_by(undisturbed, "cache-2")]) == 0
        assert questions(undisturbed).keys() == {*asked, lost}
    clean = json.loads((workplace / "clean" / "metrics.json").read_text())
    assert {k: v for k, v in metrics.items() if not k.startswith(("seconds", "memory"))} == {
        k: v for k, v in clean.items() if not k.startswith(("seconds", "memory"))
    }
    for name in ("generations", "examples"):
        one, other = (pq.read_table(workplace / place / "eval" / f"{name}.parquet") for place in ("run", "clean"))
        assert one.equals(other)


def hard(body: dict) -> bool:
    """True for one of the two orders of a pair of different answers."""
    first, second = body["messages"][-1]["content"].split(" m: ")[1].split(" M: ")
    return first < second


def test_only_questions_without_a_reply_are_asked_again(workplace, capsys, monkeypatch):
    kept = []
    add = FinishedResponses.add
    monkeypatch.setattr(FinishedResponses, "add", lambda self, batch: (kept.append(batch), add(self, batch))[1])
    (workplace / "questions.jsonl").write_text("".join(json.dumps({"prompt": f"Why {i}?"}) + "\n" for i in range(3)))
    healed = False

    with serving(lambda body, before: 500 if not healed and hard(body) else verdict(body)) as served:

        def run(*overrides: str) -> tuple[list[bool], str]:
            """For each question whether it is hard; and the log of the run."""
            before = len(served.asked)
            assert main(["run", "recipe.yaml", "output_dir=run", judged_by(served, "cache"), *overrides]) == 0
            return [hard(body) for body in served.asked[before:]], capsys.readouterr().err

        asked, _ = run()
        silent = sum(asked)
        assert silent >= 3
        metrics = json.loads((workplace / "run" / "metrics.json").read_text())
        assert metrics["judge/unanswered"] == silent
        assert len(kept) == 10
        healed = True
        again, said = run()
        assert again == [True] * silent
        assert f"[eval] {silent} questions to the judge have no reply: done again" in said
        assert len(kept) == 10
        metrics = json.loads((workplace / "run" / "metrics.json").read_text())
        assert (metrics["judge/unanswered"], metrics["judge/failed"], metrics["judge/judged"]) == (0, 0, 8)
        asked, said = run()
        assert not asked
        assert "[eval] unchanged" in said

        healed = False
        benchmark = ["eval.benchmarks={ours: questions.jsonl}", "eval.benchmark_max_new_tokens=6"]
        asked, _ = run(*benchmark)
        assert any(asked)
        healed = True
        again, said = run(*benchmark)
        assert again == [True] * sum(asked)
        assert "[benchmark-ours] unchanged" in said
        assert "[benchmark-ours_judge]" in said
        assert not run(*benchmark)[0]
