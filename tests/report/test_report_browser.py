"""The report as a reader uses it, in headless Chromium: sliders, filters, hover, keys, and hostile text."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pyarrow as pa
import pytest

from report_fixtures import byte_tokenizer, score_table, word_tokenizer
from sepo.credit.selection import select_key_tokens
from sepo.data import tables
from sepo.report import build_report, display

sync_api = pytest.importorskip("playwright.sync_api", reason="the browser tests need the package playwright")

SIDES = ("chosen", "rejected")
HOSTILE = [
    "</script><script>window.pwned = 1</script>",
    "<img src=x onerror='window.pwned = 1'><svg onload='window.pwned = 1'>",
    "${window.pwned = 1} {{data}} {{constructor.constructor('window.pwned=1')()}} `${pwned=1}`",
    "<!-- <script> --!> ]]> &lt;b&gt; javascript:window.pwned=1 <iframe srcdoc='<script>parent.pwned=1</script>'>",
    "safe \u202egnp.exe\u202c \u2066isolate\u2069 \u200fmark\u200e \x00\x01\x02\x1b[31m \ufeff",
]
LAUNCH = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--no-first-run",
]


@pytest.fixture(scope="module")
def browser() -> Iterator[sync_api.Browser]:
    names = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
    found = next((path for name in names if (path := shutil.which(name))), None)
    with sync_api.sync_playwright() as playwright:
        path = found or playwright.chromium.executable_path
        if not Path(path).exists():
            pytest.skip("the browser tests need chromium: install it, or run `playwright install chromium`")
        browser = playwright.chromium.launch(executable_path=path, args=LAUNCH)
        yield browser
        browser.close()


@pytest.fixture
def page(browser: sync_api.Browser) -> Iterator[sync_api.Page]:
    """A page that fails the test on any script error, policy violation or request beyond the file."""
    context = browser.new_context(viewport={"width": 1400, "height": 900}, color_scheme="light")
    page = context.new_page()
    problems: list[str] = []
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.on("console", lambda message: problems.append(message.text) if message.type == "error" else None)
    page.on("dialog", lambda dialog: (problems.append(dialog.message), dialog.dismiss()))
    local = ("file:", "blob:", "about:srcdoc")
    page.on("request", lambda request: None if request.url.startswith(local) else problems.append(request.url))
    yield page
    context.close()
    assert problems == []


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("runs") / "quickstart"
    tokenizer = word_tokenizer()
    scores = score_table(tokenizer, subset=["easy", "hard"])
    tables.write_table(run / "scores", scores)
    tables.write_table(run / "selection", select_key_tokens(scores, 0.5, 0.1))
    logps = {
        f"{side}_logps": [np.full(len(ids), -1.25, np.float32) for ids in scores[f"{side}_ids"].to_pylist()]
        for side in SIDES
    }
    tables.write_table(run / "logps/reference", tables.make_table("logps", {"pair_id": scores["pair_id"], **logps}))
    (run / "oracle").mkdir()
    tokenizer.save(str(run / "oracle/tokenizer.json"))
    history = [{"step": i, "loss": 0.7 - 0.01 * i, "eval_loss": 0.71} for i in range(1, 9)]
    (run / "oracle/trainer_state.json").write_text(json.dumps({"log_history": history}))
    (run / "recipe.yaml").write_text("seed: 7\nselect:\n  k_chosen: 0.5\n")
    (run / "manifest.json").write_text(
        json.dumps(
            {
                "device": {"name": "a device"},
                "versions": {"torch": "9.9"},
                "stages": {"oracle": {"seconds": 61}, "score": {"seconds": 5}},
            }
        )
    )
    (run / "metrics.json").write_text(json.dumps({"policy/win_rate": 0.612, "policy/kl": 3.25}))
    build_report(run, out=run / "report.html")
    return run


def open_report(page: sync_api.Page, path: Path) -> None:
    page.goto(path.as_uri())
    page.wait_for_selector("html[data-ready]", state="attached")
    page.wait_for_selector(".token", state="attached")


def shown_pairs(page: sync_api.Page) -> list[int]:
    return [int(name.removeprefix("pair-")) for name in page.eval_on_selector_all(".pair", "all => all.map(a => a.id)")]


def wait_for_pairs(page: sync_api.Page, ids: list[int]) -> None:
    """Wait until exactly these pairs are listed, in this order."""
    selectors = [f"pair-{pair_id}" for pair_id in ids]
    for _ in range(200):
        if page.eval_on_selector_all(".pair", "all => all.map(a => a.id)") == selectors:
            return
        page.wait_for_timeout(25)
    assert shown_pairs(page) == ids


def marked(page: sync_api.Page, pair_id: int, side: str) -> list[int]:
    selector = f"#pair-{pair_id} .side.{side} .token.key"
    return [int(i) for i in page.eval_on_selector_all(selector, "all => all.map(t => t.dataset.i)")]


def set_rate(page: sync_api.Page, side: str, k: float) -> None:
    page.locator(f"#k-{side}").fill(str(k))
    page.evaluate("new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)))")


def margins(scores: pa.Table) -> dict[int, float]:
    sums = [[sum(row) for row in scores[f"{side}_rewards"].to_pylist()] for side in SIDES]
    return {pair: w - v for pair, w, v in zip(scores["pair_id"].to_pylist(), *sums, strict=True)}


@pytest.fixture(scope="module")
def scores(run: Path) -> pa.Table:
    return tables.read_table(run / "scores", "scores")


@pytest.mark.parametrize(("k_chosen", "k_rejected"), [(0.3, 0.3), (0.29, 0.07), (0.01, 1.0), (0.58, 0.14)])
@pytest.mark.daily(1)
def test_the_sliders_select_the_tokens_that_the_selection_stage_selects(
    page: sync_api.Page, run: Path, scores: pa.Table, k_chosen: float, k_rejected: float
) -> None:
    open_report(page, run / "report.html")
    set_rate(page, "chosen", k_chosen)
    set_rate(page, "rejected", k_rejected)
    expected = select_key_tokens(scores, k_chosen, k_rejected)
    for row in expected.to_pylist():
        for side in SIDES:
            assert marked(page, row["pair_id"], side) == row[f"{side}_positions"]
    total = sum(len(row) for side in SIDES for row in expected[f"{side}_positions"].to_pylist())
    assert page.inner_text("#key-count").startswith(f"{total} key tokens")


def test_a_rate_that_misses_a_whole_number_by_rounding_selects_that_number(page: sync_api.Page, tmp_path: Path) -> None:
    table = score_table(byte_tokenizer(), texts=["a" * 100])  # 0.29 * 100 is 28.999999999999996
    tables.write_table(tmp_path / "scores", table)
    build_report(None, table=tmp_path / "scores", k_chosen=0.29, out=tmp_path / "report.html")
    open_report(page, tmp_path / "report.html")
    assert marked(page, 1, "chosen") == select_key_tokens(table, 0.29)["chosen_positions"][0].as_py()


def test_a_run_opens_with_the_tokens_that_the_policy_was_trained_on(page: sync_api.Page, run: Path) -> None:
    open_report(page, run / "report.html")
    trained = tables.read_table(run / "selection", "selection").to_pylist()
    assert page.is_checked("#stored")
    assert [marked(page, row["pair_id"], "chosen") for row in trained] == [row["chosen_positions"] for row in trained]
    set_rate(page, "chosen", 1.0)
    assert not page.is_checked("#stored")
    assert len(marked(page, trained[0]["pair_id"], "chosen")) == len(trained[0]["chosen_ids"])
    page.check("#stored")
    sync_api.expect(page.locator("#pair-1 .side.chosen .key")).to_have_count(len(trained[0]["chosen_positions"]))


def test_a_notebook_shows_one_pair_with_the_key_tokens_of_the_selection_stage(
    page: sync_api.Page, run: Path, scores: pa.Table, tmp_path: Path
) -> None:
    view = display(run, 1, k_chosen=0.4, k_rejected=0.2)
    (tmp_path / "notebook.html").write_text(f"<!doctype html>{view.html}", encoding="utf-8")
    page.goto((tmp_path / "notebook.html").as_uri())
    expected = select_key_tokens(scores, 0.4, 0.2).to_pylist()[1]
    frame = page.frame_locator("iframe")
    for side in SIDES:
        sync_api.expect(frame.locator(f".side.{side} .key")).to_have_count(len(expected[f"{side}_positions"]))
    sync_api.expect(frame.locator(".masthead")).to_be_hidden()
    sync_api.expect(frame.locator("#k-chosen")).to_be_visible()


def test_filters_keep_the_pairs_that_they_name(page: sync_api.Page, run: Path, scores: pa.Table) -> None:
    open_report(page, run / "report.html")
    by_margin = margins(scores)
    page.select_option("#verdict", "wrong")
    wait_for_pairs(page, [pair for pair, margin in by_margin.items() if margin <= 0])
    assert page.locator(".pair .wrong").count() == len(shown_pairs(page))
    page.click("#clear")
    assert len(shown_pairs(page)) == len(scores)
    page.select_option("[data-facet=subset]", label="hard")
    wait_for_pairs(page, [row["pair_id"] for row in scores.to_pylist() if row["subset"] == "hard"])


def test_length_filters_look_at_the_longer_response(page: sync_api.Page, run: Path, scores: pa.Table) -> None:
    open_report(page, run / "report.html")
    lengths = {row["pair_id"]: [len(row[f"{side}_ids"]) for side in SIDES] for row in scores.to_pylist()}
    bound = sorted(max(pair) for pair in lengths.values())[2]
    page.fill("#longest", str(bound))
    expected = [pair for pair, both in lengths.items() if max(both) <= bound]
    wait_for_pairs(page, expected)
    page.fill("#longest", "")
    page.select_option("#longer", "rejected")
    expected = [pair for pair, (chosen, rejected) in lengths.items() if rejected > chosen]
    wait_for_pairs(page, expected)


def test_search_finds_text_across_tokens_and_outlines_it(page: sync_api.Page, run: Path) -> None:
    open_report(page, run / "report.html")
    page.fill("#search", "ANSWER IS 4, AND")
    wait_for_pairs(page, [13])
    found = page.eval_on_selector_all(".side.chosen .token.hit", "all => all.map(t => t.textContent)")
    assert "".join(found).startswith("answeris4,and")
    page.fill("#search", "question 5")
    wait_for_pairs(page, [16])
    assert page.locator(".prompt[open] .text").inner_text().startswith("user\nQuestion 5\nassistant")
    page.fill("#search", "no such words")
    wait_for_pairs(page, [])
    assert "nothing matches" in page.inner_text("#count")


@pytest.mark.parametrize(("order", "reverse"), [("margin-down", True), ("margin-up", False)])
def test_pairs_sort_by_margin(page: sync_api.Page, run: Path, scores: pa.Table, order: str, reverse: bool) -> None:
    open_report(page, run / "report.html")
    by_margin = margins(scores)
    page.select_option("#sort", order)
    expected = sorted(by_margin, key=lambda pair: by_margin[pair], reverse=reverse)
    wait_for_pairs(page, expected)


def test_hovering_a_token_tells_its_numbers(page: sync_api.Page, run: Path, scores: pa.Table) -> None:
    open_report(page, run / "report.html")
    row = scores.to_pylist()[0]
    page.hover("#pair-1 .side.rejected .token[data-i='2']")
    text = page.inner_text("#tooltip")
    reward = row["rejected_rewards"][2]
    rank = sorted(range(len(row["rejected_ids"])), key=lambda i: (row["rejected_rewards"][i], i)).index(2) + 1
    assert f"{abs(reward):.3f}" in text
    assert f"{rank} of {len(row['rejected_ids'])}, lowest first" in text
    assert "−1.250" in text
    assert f"{abs(-1.25 + reward):.3f}" in text
    assert str(row["rejected_ids"][2]) in text
    page.mouse.move(5, 5)
    assert not page.is_visible("#tooltip")


def test_tokens_are_reached_and_read_by_keyboard(page: sync_api.Page, run: Path) -> None:
    open_report(page, run / "report.html")
    page.focus("#pair-1 .side.chosen .tokens")
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowRight")
    focused = "document.activeElement.dataset.i"
    assert page.evaluate(focused) == "1"
    assert page.is_visible("#tooltip")
    assert page.evaluate("document.activeElement.getAttribute('aria-describedby')") == "tooltip"
    page.keyboard.press("ArrowDown")
    keys = marked(page, 1, "chosen")
    assert int(page.evaluate(focused)) == next(i for i in keys if i > 1)
    page.keyboard.press("Escape")
    assert not page.is_visible("#tooltip")
    page.keyboard.press("PageDown")
    assert page.evaluate("document.activeElement.id") == "pair-4"
    page.focus("#tab-pairs")
    page.keyboard.press("ArrowRight")
    assert page.is_visible("#figures")
    assert page.get_attribute("#tab-figures", "aria-selected") == "true"


def test_hostile_text_is_shown_as_text_and_nothing_runs(page: sync_api.Page, tmp_path: Path) -> None:
    tokenizer = byte_tokenizer()
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    run = tmp_path / "run"
    table = score_table(tokenizer, subset=HOSTILE, texts=HOSTILE)
    tables.write_table(run / "scores", table)
    (run / "recipe.yaml").write_text("\n".join(HOSTILE))
    (run / "manifest.json").write_text(json.dumps({text: {text: text} for text in HOSTILE}))
    (run / "metrics.json").write_text(json.dumps(dict.fromkeys(HOSTILE, 0.5)))
    (run / "oracle").mkdir()
    history = [{"step": i, HOSTILE[0]: 0.5, f"{HOSTILE[1]}/chosen": i} for i in range(3)]
    (run / "oracle/trainer_state.json").write_text(json.dumps({"log_history": history}))
    build_report(run, tokenizer=tmp_path, title=HOSTILE[0], out=tmp_path / "report.html")
    open_report(page, tmp_path / "report.html")
    for text, pair in zip(HOSTILE[:4], shown_pairs(page), strict=False):
        assert page.text_content(f"#pair-{pair} .side.chosen .tokens") == text.replace(" ", "·")
    shown = page.text_content(f"#pair-{shown_pairs(page)[4]} .side.chosen .tokens")
    assert shown.startswith("safe·⟨0xE2⟩⟨0x80⟩⟨U+202E⟩gnp.exe")
    assert "⟨U+0000⟩⟨U+0001⟩⟨U+0002⟩⟨U+001B⟩[31m" in shown
    for tab in ("figures", "run", "pairs"):
        page.click(f"#tab-{tab}")
    for summary in page.locator(".prompt summary").all():
        summary.click()
    page.hover(".token")
    page.fill("#search", HOSTILE[0])
    wait_for_pairs(page, [1])
    assert page.inner_text("h1") == HOSTILE[0]
    assert page.evaluate("window.pwned") is None
    assert page.evaluate("document.querySelectorAll('script').length") == 2
    assert page.evaluate("document.querySelectorAll('img, iframe, svg[onload], [onerror]').length") == 0
    body = page.evaluate("document.body.innerText + document.title")
    assert not any(control in body for control in "\u202e\u202c\u2066\u2069\u200f\u200e\x1b")


def test_a_script_put_into_the_page_is_blocked_by_the_policy(browser: sync_api.Browser, run: Path) -> None:
    page = browser.new_page()
    open_report(page, run / "report.html")
    page.evaluate(
        """() => {
          const script = document.createElement('script');
          script.textContent = 'window.pwned = 1';
          document.body.append(script);
          document.body.insertAdjacentHTML('beforeend', '<img src="data:," onerror="window.pwned = 1">');
        }"""
    )
    page.wait_for_timeout(100)
    assert page.evaluate("window.pwned") is None
    page.close()


def test_right_to_left_and_split_characters_are_laid_out_as_text(page: sync_api.Page, tmp_path: Path) -> None:
    tokenizer = byte_tokenizer()
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    tables.write_table(tmp_path / "scores", score_table(tokenizer, texts=["שלום עולם", "你好 世界", "plain"]))
    build_report(None, table=tmp_path / "scores", tokenizer=tmp_path, out=tmp_path / "report.html")
    open_report(page, tmp_path / "report.html")
    direction = "e => getComputedStyle(e).direction"
    assert page.eval_on_selector("#pair-1 .chosen .tokens", direction) == "rtl"
    assert page.eval_on_selector("#pair-7 .chosen .tokens", direction) == "ltr"
    spans = page.eval_on_selector_all("#pair-4 .chosen .token", "all => all.map(t => t.textContent)")
    assert [text for text in spans if "⟨" not in text] == ["你", "好", "·", "世", "界"]
    page.fill("#search", "好 世")
    wait_for_pairs(page, [4])


def test_only_the_pairs_near_the_screen_are_in_the_page(page: sync_api.Page, tmp_path: Path) -> None:
    tokenizer = word_tokenizer()
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    texts = [f"The answer is {i}, and that is all.\n" * 6 for i in range(1500)]
    tables.write_table(tmp_path / "scores", score_table(tokenizer, texts=texts))
    build_report(None, table=tmp_path / "scores", tokenizer=tmp_path, out=tmp_path / "report.html")
    open_report(page, tmp_path / "report.html")
    filled = "document.querySelectorAll('.pair .sides').length"
    assert len(shown_pairs(page)) == 1500
    assert page.evaluate(filled) < 40
    page.evaluate("scrollTo(0, document.documentElement.scrollHeight)")
    page.wait_for_selector("#pair-4498 .token", state="attached")
    sync_api.expect(page.locator("#pair-1 .token")).to_have_count(0)
    assert page.evaluate(filled) < 40
    set_rate(page, "chosen", 0.5)
    n = page.locator("#pair-4498 .chosen .token").count()
    assert len(marked(page, 4498, "chosen")) == n // 2


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_text_keeps_its_contrast_on_every_shade_of_both_themes(page: sync_api.Page, run: Path, theme: str) -> None:
    page.emulate_media(color_scheme="dark" if theme == "light" else "light")
    open_report(page, run / "report.html")
    page.click("#theme")  # the button overrides the scheme of the system
    ratios = page.evaluate(
        """() => {
          const context = document.createElement('canvas').getContext('2d', { willReadFrequently: true });
          const luminance = (...colours) => {
            for (const colour of colours) { context.fillStyle = colour; context.fillRect(0, 0, 1, 1); }
            const [r, g, b] = [...context.getImageData(0, 0, 1, 1).data].map(v => v / 255)
              .map(v => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
            return 0.2126 * r + 0.7152 * g + 0.0722 * b;
          };
          const probe = document.body.appendChild(document.createElement('span'));
          const paper = getComputedStyle(document.documentElement).backgroundColor;
          const shades = ['', ...Array.from({ length: 10 }, (_, i) => [`p${i + 1}`, `n${i + 1}`]).flat()];
          return shades.map(shade => {
            probe.className = `token ${shade}`;
            const style = getComputedStyle(probe);
            const pair = [luminance(paper, style.backgroundColor), luminance(style.color)].sort((a, b) => b - a);
            return (pair[0] + 0.05) / (pair[1] + 0.05);
          });
        }"""
    )
    assert page.evaluate("document.documentElement.dataset.theme") == theme
    assert len(ratios) == 21
    assert min(ratios) >= 4.5
    assert len({round(ratio, 3) for ratio in ratios}) == 21


def test_figures_are_read_by_pointer_and_exported(page: sync_api.Page, run: Path) -> None:
    open_report(page, run / "report.html")
    page.click("#tab-figures")
    titles = page.eval_on_selector_all("#figures .chart h3", "all => all.map(h => h.textContent)")
    assert titles[:2] == ["Cumulative share of reward", "Distribution of token rewards"]
    assert "Loss" in titles
    chart = page.locator("#figures .chart").first
    chart.locator("svg").focus()
    for _ in range(31):
        page.keyboard.press("ArrowRight")
    assert chart.locator(".readout").inner_text().startswith("Share of tokens 30\u00a0%: chosen ")
    with page.expect_download() as download:
        chart.get_by_role("button", name="SVG").click()
    assert download.value.suggested_filename == "cumulative-share.svg"
    drawing = ElementTree.fromstring(Path(download.value.path()).read_bytes())
    assert "chosen" in [element.text for element in drawing.iter("{http://www.w3.org/2000/svg}text")]
    with page.expect_download() as download:
        chart.get_by_role("button", name="PNG").click()
    assert Path(download.value.path()).read_bytes().startswith(b"\x89PNG")


def test_the_run_is_documented_in_words(page: sync_api.Page, run: Path) -> None:
    open_report(page, run / "report.html")
    page.click("#tab-run")
    text = page.inner_text("#run")
    for part in ("Policy · win rate", "61.2\u00a0%", "Policy · KL", "3.25", "a device", "9.9", "1 min 1 s", "seed: 7"):
        assert part in text


@pytest.mark.parametrize("width", [320, 420, 1400])
def test_no_view_is_wider_than_its_screen(page: sync_api.Page, run: Path, width: int) -> None:
    page.set_viewport_size({"width": width, "height": 800})
    open_report(page, run / "report.html")
    for tab in ("figures", "run", "pairs"):
        page.click(f"#tab-{tab}")
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth"), tab
    chosen, rejected = (page.locator(f"#pair-1 .side.{side}").bounding_box() for side in SIDES)
    stacked = rejected["y"] >= chosen["y"] + chosen["height"]
    assert stacked == (width < 860)


@pytest.mark.parametrize("width", [390, 1400])
def test_a_finished_run_is_read_without_scrolling_sideways(
    browser: sync_api.Browser, finished_run: Path, width: int
) -> None:
    """N8: rows stay one screen high, tables within their place, and figures draw within their axes."""
    page = browser.new_page(viewport={"width": width, "height": 900})
    open_report(page, finished_run / "run" / "report.html")
    page.click("#tab-run")
    rows = page.eval_on_selector_all("#run tr", "all => all.map(row => [row.offsetHeight, row.innerText.slice(0, 60)])")
    assert [row for row in rows if row[0] > 900] == []
    cells = (
        "all => all.map(c => [c.offsetWidth, c.innerText]).filter(([w, text]) => text.length > 12 && w > 0 && w < 60)"
    )
    assert page.eval_on_selector_all("#run td", cells) == []  # no column of single letters
    wide = "all => all.filter(e => e.scrollWidth > e.clientWidth + 1).map(e => e.innerText.slice(0, 60))"
    assert page.eval_on_selector_all("#run .scroll", wide) == []
    page.click("#tab-figures")
    outside = page.evaluate(
        """() => [...document.querySelectorAll("#figures .chart")].flatMap((chart) => {
          const box = (e) => e.getBoundingClientRect();
          const grid = [...chart.querySelectorAll("svg line")].map(box);
          const [left, right] = [Math.min(...grid.map((b) => b.left)), Math.max(...grid.map((b) => b.right))];
          return [...chart.querySelectorAll("svg path, svg polyline, svg rect.bar")].map(box)
            .filter((b) => b.width > 0 && (b.left < left - 3 || b.right > right + 3))
            .map((b) => [chart.querySelector("h3").textContent, b.left - left, right - b.right]);
        })"""
    )
    assert outside == []
    page.close()


def test_the_accuracy_in_large_type_is_that_of_held_out_pairs(page: sync_api.Page, finished_run: Path) -> None:
    """N4: training pairs, which the oracle has seen, stand smaller beside it, and are named."""
    run = finished_run / "run"
    open_report(page, run / "report.html")
    facts = page.eval_on_selector_all(
        ".facts > div",
        "all => all.map(f => [f.innerText, parseFloat(getComputedStyle(f.querySelector('dd')).fontSize)])",
    )
    metrics = json.loads((run / "metrics.json").read_text())
    share = f"{100 * metrics['oracle/accuracy']:.1f}"
    held_out = [size for text, size in facts if "held-out" in text and share in text]
    training = [size for text, size in facts if "training pairs" in text]
    assert len(held_out) == len(training) == 1
    assert held_out[0] > training[0]


def test_a_file_cut_short_says_so(browser: sync_api.Browser, run: Path, tmp_path: Path) -> None:
    text = (run / "report.html").read_text(encoding="utf-8")
    start = text.index('id="data">') + len('id="data">')
    (tmp_path / "cut.html").write_text(text[: start + 400] + text[text.index("</script>", start) :], encoding="utf-8")
    page = browser.new_page()
    page.goto((tmp_path / "cut.html").as_uri())
    sync_api.expect(page.locator("#loading")).to_contain_text("cannot be read")
    page.close()
