"""Answers before and after training in the report: within the size budget, filterable, never markup."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from report_fixtures import score_table, word_tokenizer
from sepo.data import tables
from sepo.errors import UserError
from sepo.report import build_report
from sepo.report.payload import unpack
from sepo.report.reading import read_answers

HOSTILE = "</script><img src=x onerror='window.pwned = 1'>{{data}}"


def write_answers(path: Path, number: int = 6, judged: bool = True) -> Path:
    columns = {
        "prompt": [f"<|user|>\nQuestion {i} {HOSTILE} {i}\n<|assistant|>\n" for i in range(number)],
        "base": [f"before {i} {HOSTILE}" for i in range(number)],
        "policy": [f"after {i}" if i else "" for i in range(number)],
        "base_gold": [0.0] * number,
        "policy_gold": [(-1) ** i * i / 10 for i in range(number)],
        "policy_kl": np.linspace(0, 3, number),
    }
    if judged:
        columns["preference"] = [(1.9, 1.1, 1.5, float("nan"))[i % 4] for i in range(number)]
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns), path)
    return path


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("answers") / "run"
    tokenizer = word_tokenizer()
    tables.write_table(folder / "scores", score_table(tokenizer))
    (folder / "oracle").mkdir()
    tokenizer.save(str(folder / "oracle/tokenizer.json"))
    write_answers(folder / "eval" / "generations.parquet")
    build_report(folder, out=folder / "report.html")
    return folder


def test_the_page_holds_answers_as_data_and_never_as_markup(run):
    page = (run / "report.html").read_text()
    assert "window.pwned" not in page
    block = re.search(r'id="data">([^<]*)</script>', page)
    assert block is not None
    answers = unpack(block[1])[0]["answers"]
    assert answers["total"] == 6
    assert answers["prompt"][1] == f"Question 1 {HOSTILE} 1"  # without what the chat template writes
    assert answers["preference"] == [1.9, 1.1, 1.5, None, 1.9, 1.1]
    assert answers["policy_gold"][3] == -0.3


def test_a_run_without_answers_or_without_a_judge_lacks_them(tmp_path):
    assert read_answers(tmp_path / "generations.parquet") is None
    assert "preference" not in read_answers(write_answers(tmp_path / "g.parquet", judged=False))
    (tmp_path / "g.parquet").write_bytes(b"no parquet")
    with pytest.raises(UserError, match="no table of answers"):
        read_answers(tmp_path / "g.parquet")


def test_the_size_is_limited_and_rows_are_evenly_spaced_over_the_run(tmp_path):
    path = write_answers(tmp_path / "g.parquet", 300)
    whole = read_answers(path)
    part = read_answers(path, 10_000)
    assert whole["total"] == part["total"] == 300
    assert len(whole["prompt"]) == 300
    sizes = sum(len(text) for name in ("prompt", "base", "policy") for text in part[name])
    assert 5_000 < sizes <= 10_000
    assert part["base"][0].startswith("before 0 ")
    assert int(part["base"][-1].split()[1]) > 250
    assert len(read_answers(path, 1)["base"]) == 1


@pytest.mark.slow
def test_a_reader_filters_and_sorts_the_answers(run):
    sync_api = pytest.importorskip("playwright.sync_api", reason="the browser tests need the package playwright")
    names = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
    found = next((path for name in names if (path := shutil.which(name))), None)
    with sync_api.sync_playwright() as playwright:
        place = found or playwright.chromium.executable_path
        if not Path(place).exists():
            pytest.skip("the browser tests need chromium: install it, or run `playwright install chromium`")
        browser = playwright.chromium.launch(executable_path=place, args=["--headless", "--no-sandbox"])
        page = browser.new_page()
        problems: list[str] = []
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.on("console", lambda message: problems.append(message.text) if message.type == "error" else None)
        page.goto((run / "report.html").as_uri())
        page.wait_for_selector("html[data-ready]", state="attached")
        page.click("#tab-answers")

        def rows() -> list[int]:
            return page.eval_on_selector_all(".answer", "all => all.map(a => Number(a.dataset.row))")

        assert rows() == [0, 1, 2, 3, 4, 5]
        assert HOSTILE in page.inner_text(".answer >> nth=1")
        assert page.evaluate("window.pwned") is None
        page.select_option("#answers-judge", "after")
        assert rows() == [0, 4]
        page.select_option("#answers-judge", "none")
        assert rows() == [3]
        page.select_option("#answers-judge", "")
        page.select_option("#answers-gold", "before")
        assert rows() == [1, 3, 5]
        page.select_option("#answers-sort", "gold-up")
        assert rows() == [5, 3, 1]
        page.fill("#answers-search", "AFTER 3")
        assert rows() == [3]
        assert page.inner_text("#answers-count") == "1 of 6 answers"
        page.focus("#tab-answers")
        page.keyboard.press("ArrowLeft")
        assert page.get_attribute("#tab-pairs", "aria-selected") == "true"
        browser.close()
        assert problems == []
