"""Tokenising in several processes: the same table and report, the same errors, and no process is left."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from contextlib import closing
from dataclasses import asdict

import pyarrow as pa
import pytest

from sepo.data import encoding
from sepo.data.encoding import tokenize_pairs
from sepo.data.loading import load_preferences
from sepo.data.workers import in_workers
from sepo.errors import UserError, check_number
from sepo.recipe.settings import Recipe
from sepo.stages import data
from tiny_models import tiny_tokenizer

REFUSING = "{% if messages[0]['content'] == 'no' %}{{ raise_exception('said no') }}{% endif %}"
PID = "__import__('os').getpid()"


def mixed_rows() -> list[dict]:
    """Rows that are kept, truncated, noted, or dropped for several reasons; prompts repeat far apart."""
    rows = []
    for i in range(60):
        row = {"prompt": f"Is it {i % 5}?", "chosen": f"yes {i} " * (1 + i % 7), "rejected": f"no {i}", "tie": i}
        other = {1: {"chosen": None}, 2: {"prompt": "no"}, 3: {"rejected": row["chosen"]}, 4: {"chosen": [1, i]}}
        row |= other.get(i % 12, {})
        if i % 9 == 5:
            row |= {
                "prompt": "word " * 12,
                "chosen": "w" * 60 + f"a{i}",
                "rejected": "w" * (60 if i % 2 else 9) + f"b{i}",
            }
        if i % 10 == 7:
            row["chosen"] = [{"role": f"judge {i}", "content": "x"}]
        rows.append(row)
    return rows


def test_the_table_and_the_report_are_the_same_for_any_number_of_workers(tmp_path, monkeypatch):
    """To the last byte, and in the order of the keys."""
    monkeypatch.setattr(encoding, "ROWS_AT_ONCE", 4)
    (tmp_path / "prefs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in mixed_rows()))
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = REFUSING + tokenizer.chat_template
    rows = load_preferences(tmp_path / "prefs.jsonl")
    made = [
        tokenize_pairs(rows, tokenizer, as_chat=True, max_length=64, workers=number, progress=False)
        for number in (1, 2)
    ]
    (table, report), (other, other_report) = made
    assert other.equals(table, check_metadata=True)
    assert json.dumps(asdict(report)) == json.dumps(asdict(other_report))
    assert len(report.dropped) >= 5
    assert report.truncated_prompts
    assert report.truncated_responses


def test_few_rows_start_no_worker_and_many_at_most_one_a_core():
    encoder = encoding.make_encoder(tiny_tokenizer(), {})
    assert encoding._workers("auto", 2 * encoding.ROWS_OF_A_WORKER - 1, encoder) == 1
    assert encoding._workers("auto", 10**9, encoder) == len(os.sched_getaffinity(0))
    assert encoding._workers(8, 2500, encoder) == 3  # no more than parts
    encoder.tokenizer = type("OfAScript", (), {"__module__": "__main__"})()
    assert encoding._workers("auto", 10**9, encoder) == 1


def test_the_number_of_workers_makes_no_data_anew(tmp_path):
    depends = [
        data.stage(Recipe(name="a", data={"workers": number}), tiny_tokenizer()).depends for number in ("auto", 1, 7)
    ]
    assert depends[0] == depends[1] == depends[2]


def test_results_come_in_order_and_few_parts_are_in_memory():
    read: list[int] = []
    parts = (read.append(i) or {"i": i} for i in range(40))
    for i, result in enumerate(in_workers(eval, "i * i", parts, 2)):
        assert result == i * i
        assert len(read) <= i + 4


def test_bad_input_in_a_worker_is_the_error_of_one_process():
    results = in_workers(check_number, "n", [1, 2, "x", 3], 2)
    with pytest.raises(UserError, match="n is 'x'"):
        list(results)
    with pytest.raises(RuntimeError, match=r"in a worker process:\n(.|\n)*ZeroDivisionError"):
        list(in_workers(eval, "1 / i", [{"i": 0}], 1))


def test_a_killed_worker_is_named_in_one_line():
    with pytest.raises(
        UserError, match=r"was killed \(SIGKILL\), out of memory\? Set data.workers to a smaller number"
    ):
        list(in_workers(os.kill, 0, [signal.SIGKILL], 2))  # 0: the worker's group, which is the worker alone


def _ends(pid: int) -> bool:
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return True
        time.sleep(0.05)
    return False


def test_an_interruption_ends_the_workers():
    pids: list[int] = []

    def interrupted() -> None:
        with closing(in_workers(eval, PID, ({} for _ in range(99)), 2)) as results:
            for pid in results:
                pids.append(pid)
                if len(pids) == 5:
                    raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert all(map(_ends, pids))


def test_workers_end_with_a_killed_parent_and_never_run_its_script(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(
        "import os\nfrom sepo.data.workers import in_workers\n"
        f"for pid in in_workers(eval, {PID!r}, ({{}} for _ in range(9)), 1):\n"
        "    print(pid, flush=True)\n    os.kill(os.getpid(), 9)\n"
    )
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == -signal.SIGKILL
    (pid,) = done.stdout.split()
    assert _ends(int(pid))


def test_a_worker_gets_its_rows_only():
    table = pa.table({"text": ["x" * 1000] * 1000})
    assert len(encoding._to_bytes(table.slice(10, 5))) < 10_000
