"""The documentation builds without a warning, fetches nothing, and names files and tests that exist."""

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
                 "api/training", "results/index", "results/gpu", "contributing"):  # fmt: skip
        assert (site / f"{page}.html").is_file(), page
    assert (site / "results" / "objectives" / "frontier.png").is_file()
    assert not (site / "hooks.py").exists()


def test_the_readme_is_the_home_page(site):
    page = (site / "index.html").read_text(encoding="utf-8")
    assert "Selective preference optimization: align a language model" in page
    assert 'src="images/report.png"' in page
    assert (site / "images" / "report.png").is_file()
    assert 'href="install.html"' in page
    assert 'href="results/index.html"' in page


def test_llms_txt_has_a_line_for_each_page_and_the_markdown_lies_beside_its_html(site):
    lines = (site / "llms.txt").read_text(encoding="utf-8").splitlines()
    assert lines[0] == "# sepo"
    assert lines[2].startswith("> Selective preference optimization")
    headings = [line for line in lines if line.startswith("## ")]
    assert headings == ["## " + name for name in (
        "Start", "Guide", "Compare and judge", "Scale", "Reference", "Development"
    )]  # fmt: skip
    named = [match[1] for line in lines if (match := re.fullmatch(r"- \[.+\]\((\S+\.md)\)", line))]
    pages = [path.relative_to(site) for path in site.rglob("*.html") if path.name != "404.html"]
    beside = {str(path.with_suffix(".md")).replace("results/index.md", "results/README.md") for path in pages}
    assert len(named) == len(set(named))
    assert set(named) == beside
    links = re.compile(r"\]\(([^)\s:#]+\.md)")
    for name in named:
        for link in links.findall((site / name).read_text(encoding="utf-8")):
            assert (site / name).parent.joinpath(link).resolve().is_file(), f"{name}: {link}"


def test_the_markdown_of_the_reference_has_the_docstrings(site):
    page = (site / "api" / "training.md").read_text(encoding="utf-8")
    assert "\n:::" not in page
    assert "## sepo.training.objectives" in page
    assert "def dpo(" in page
    assert "strength of the KL constraint" in page


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
    assert site_links("[a](docs/recipes.md)", "index.md") == "[a](recipes.md)"
    assert site_links("![](docs/images/report.png)", "index.md") == "![](images/report.png)"
    assert site_links("[a](../README.md)", "install.md") == "[a](index.md)"
    assert site_links("[a](../../CONTRIBUTING.md)", "how-to/a.md") == "[a](../contributing.md)"
    assert site_links("[a](../results/README.md)", "data.md") == "[a](results/README.md)"
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


def test_no_stored_result_names_a_folder_of_a_machine():
    files = [path for path in (ROOT / "results").rglob("*") if path.suffix in (".md", ".json")]
    assert len(files) > 50
    folder = re.compile(r"(?<![\w.~}/-])/(?:tmp|work|root|home|Users)/\w[\w./-]*")
    found = {path.name: folder.findall(path.read_text(encoding="utf-8")) for path in files}
    assert {name: names for name, names in found.items() if names} == {}


def test_files_that_the_documentation_names_exist():
    """Paths such as `src/sepo/forward/logps.py`, `tests/...` and `results/...`."""
    for page in [*sorted(DOCS.rglob("*.md")), ROOT / "mkdocs.yml"]:
        for name in re.findall(r"`((?:src|tests|results|benchmarks|scripts|docs)/[\w./-]+)`", page.read_text("utf-8")):
            assert (ROOT / name).exists(), f"{page.name}: no {name}"


def test_the_file_tree_of_the_architecture_names_every_file_once():
    """Folders and files of src/sepo, as `docs/architecture.md` lists them."""
    text = (DOCS / "architecture.md").read_text("utf-8")
    named, folders = [], []
    for line in text.split("```text\nsepo/\n")[1].split("```")[0].splitlines():
        indent, name = re.match(r"( +)(\S+) ", line).groups()
        folders = folders[: len(indent) // 2 - 1]
        if name.endswith(".py"):
            named.append("".join(folders) + name)
        folders.append(name)
    package = ROOT / "src" / "sepo"
    files = {path.relative_to(package).as_posix() for path in package.rglob("*.py")}
    files -= {name for name in files if name.endswith("/__init__.py")}
    assert len(named) == len(set(named))
    assert not files - set(named), f"without a line in architecture.md: {sorted(files - set(named))}"
    assert not set(named) - files, f"in architecture.md, not in src/sepo: {sorted(set(named) - files)}"
