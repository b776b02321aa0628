"""The documentation builds without a warning, asks nothing of the network, and names tests that exist."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    pytest.importorskip("mkdocs", reason="the site is built by mkdocs: pip install -e '.[docs]'")
    folder = tmp_path_factory.mktemp("site")
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--config-file", ROOT / "mkdocs.yml", "-d", folder],
        capture_output=True, text=True, check=False, cwd=folder,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return folder


def test_every_page_is_there_and_nothing_of_the_build_is(site):
    for page in ("index", "data", "settings", "known-failures", "how-to/your-data", "tutorials/01-your-data",
                 "api/training", "results/index", "results/gpu"):  # fmt: skip
        assert (site / f"{page}.html").is_file(), page
    assert (site / "results" / "objectives" / "frontier.png").is_file()
    assert not (site / "hooks.py").exists()


def test_the_reference_describes_what_it_names(site):
    page = (site / "api" / "training.html").read_text(encoding="utf-8")
    for name in ("objectives.dpo", "trainer.PreferenceTrainer", "fit.train_model"):
        assert f'id="sepo.training.{name}"' in page, name
    assert "strength of the KL constraint" in page
    assert "learning_rate" in (site / "settings.html").read_text(encoding="utf-8")


def test_nothing_is_fetched_when_a_page_is_read(site):
    fetched = re.compile(r"""<(?:script|img|link|iframe|source)\b[^>]*\b(?:src|href)=["']?(?:https?:)?//""")
    for page in site.rglob("*.html"):
        assert not fetched.search(page.read_text(encoding="utf-8")), page
    for sheet in site.rglob("*.css"):
        assert not re.search(r"(?:@import|url\()\s*[\"']?(?:https?:)?//", sheet.read_text(encoding="utf-8")), sheet


def test_links_out_of_docs_lead_to_the_page_or_become_text():
    pytest.importorskip("mkdocs", reason="the hooks are mkdocs': pip install -e '.[docs]'")
    sys.path.insert(0, str(DOCS))
    try:
        from hooks import site_links
    finally:
        sys.path.remove(str(DOCS))
    assert site_links("[a](../results/gpu.md)", "performance.md") == "[a](results/gpu.md)"
    assert site_links("[a](../../results/gpu.md#x)", "how-to/a.md") == "[a](../results/gpu.md#x)"
    assert site_links("[a](../docs/compare.md)", "results/README.md") == "[a](../compare.md)"
    assert site_links("![](rate/frontier.png)", "results/rate.md") == "![](rate/frontier.png)"
    assert site_links("[a](01-your-data.ipynb)", "tutorials/02-reading-the-tokens.md") == "[a](01-your-data.md)"
    assert site_links("[recipes/](../recipes)", "recipes.md") == "`recipes`"
    assert site_links("[the grids](../recipes/experiments)", "a.md") == "the grids (`recipes/experiments`)"
    for untouched in ("[a](gone.md)", "[a](../../outside.md)", "[a](https://arxiv.org)", "[a](#here)"):
        assert site_links(untouched, "recipes.md") == untouched


def test_tests_that_the_documentation_names_exist():
    """`file.py::test_name`, or `::test_name` after one that names the file."""
    tests = {path.relative_to(ROOT / "tests").as_posix(): path for path in (ROOT / "tests").rglob("*.py")}
    found = 0
    for page in sorted(DOCS.rglob("*.md")):
        file = None
        for name, test in re.findall(r"`(?:tests/)?((?:\w+/)*\w+\.py)?(?:::(test_\w+))?`", page.read_text("utf-8")):
            file = name if name in tests else file
            if test:
                assert file is not None, f"{page.name}: {name}::{test} has no such file"
                assert not name or name in tests, f"{page.name}: no file tests/{name}"
                assert f"def {test}(" in tests[file].read_text("utf-8"), f"{page.name}: no {test} in {file}"
                found += 1
    assert found > 50


def test_files_that_the_documentation_names_exist():
    """Paths such as `src/sepo/forward/logps.py`, `tests/...` and `results/...`."""
    for page in [*sorted(DOCS.rglob("*.md")), ROOT / "mkdocs.yml"]:
        for name in re.findall(r"`((?:src|tests|results|benchmarks|scripts|docs)/[\w./-]+)`", page.read_text("utf-8")):
            assert (ROOT / name).exists(), f"{page.name}: no {name}"
