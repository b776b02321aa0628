"""What `mkdocs build` adds to the pages of docs/.

- pages whose source is elsewhere: README.md (the home page), CONTRIBUTING.md, results/, the notebooks, every setting
- links: a link in a source names a file of the repository; in the site it names the page of that file
- for programs: `llms.txt` (one line a page), and the Markdown of each page beside its HTML

Links, by example:

    ../results/gpu.md                   the page made from that file
    tutorials/01-your-data.ipynb        the page made from that notebook
    ../recipes/experiments, ../src/...  not in the site: text, with the path in the repository
    a file that does not exist          unchanged, so that a strict build fails
"""

from __future__ import annotations

import ast
import json
import os
import posixpath
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import griffe
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.nav import Navigation
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parent.parent
ROOT_PAGES = {"README.md": "index.md", "CONTRIBUTING.md": "contributing.md"}  # file of the repository -> page
_LINK = re.compile(r"(!?)\[([^\]]*)\]\(([^)\s]+)\)")
_MODULE = re.compile(r"^::: (\S+)$", re.MULTILINE)
_sections: dict[str, list[Page]] = {}  # pages by the heading of the navigation, in its order
_markdown: dict[str, str] = {}  # of each page, by its path in the sources


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages made from files that are outside docs/ or are not Markdown."""
    for name, uri in ROOT_PAGES.items():
        files.append(File.generated(config, uri, abs_src_path=str(ROOT / name)))
    for path in sorted((ROOT / "results").rglob("*")):
        if path.is_file():
            uri = path.relative_to(ROOT).as_posix()
            files.append(File.generated(config, uri, abs_src_path=str(path)))
    for file in list(files):
        if file.src_uri.endswith(".ipynb"):
            page = notebook_page(json.loads(file.content_string), posixpath.basename(file.src_uri))
            files.append(File.generated(config, file.src_uri.removesuffix("ipynb") + "md", content=page))
    files.append(File.generated(config, "settings.md", content=settings_page()))
    return files


def on_nav(nav: Navigation, config: MkDocsConfig, files: Files) -> Navigation:
    """Note the order of the pages for `llms.txt`."""
    _sections.clear()
    for page in nav.pages:
        heading = page.ancestors[-1].title if page.ancestors else config.site_name
        _sections.setdefault(heading, []).append(page)
    return nav


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Rewrite the links of a page for the site, and keep its Markdown."""
    _markdown[page.file.src_uri] = site_links(markdown, page.file.src_uri)
    return _markdown[page.file.src_uri]


def on_post_build(config: MkDocsConfig) -> None:
    """Write `llms.txt`, and the Markdown of each page beside its HTML."""
    site = Path(config.site_dir)
    lines = [f"# {config.site_name}", "", f"> {config.site_description}"]
    for heading, pages in _sections.items():
        lines += ["", f"## {heading}", ""]
        for page in pages:
            uri = page.file.src_uri
            lines.append(f"- [{page.title}]({uri})")
            (site / uri).write_text(_MODULE.sub(lambda match: module_text(match[1]), _markdown[uri]), encoding="utf-8")
    (site / "llms.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")


def site_links(markdown: str, uri: str) -> str:
    """Rewrite the links of the page `uri` (its path in the site's sources) that name files of the repository."""
    of_root = {page: name for name, page in ROOT_PAGES.items()}
    source = of_root.get(uri) or (uri if uri.startswith("results/") else f"docs/{uri}")

    def rewrite(match: re.Match[str]) -> str:
        image, text, target = match.groups()
        path, hash_, anchor = target.partition("#")
        if not path or re.match(r"[a-z]+:", path):
            return match[0]
        name = posixpath.normpath(posixpath.join(posixpath.dirname(source), path))
        if name.startswith("..") or not (ROOT / name).exists():
            return match[0]
        if name in ROOT_PAGES or (name.startswith(("docs/", "results/")) and (ROOT / name).is_file()):
            page = ROOT_PAGES.get(name) or re.sub(r"\.ipynb$", ".md", name.removeprefix("docs/"))
            return f"{image}[{text}]({posixpath.relpath(page, posixpath.dirname(uri) or '.')}{hash_}{anchor})"
        return f"`{name}`" if name.startswith(text.strip("`").rstrip("/")) else f"{text} (`{name}`)"

    return _LINK.sub(rewrite, markdown)


def module_text(name: str) -> str:
    """The docstring of a module, and signature and docstring of its public functions and classes, as Markdown."""
    path = ROOT / "src" / name.replace(".", "/")
    path = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
    module = ast.parse(path.read_text(encoding="utf-8"))
    parts = [f"## {name}", ast.get_docstring(module) or ""]
    for node in module.body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
            text = ast.get_docstring(node) or ""
            node.body = [ast.Expr(ast.Constant(...))]
            parts += [f"### {node.name}", f"```python\n{ast.unparse(node)}\n```", text]
    return "\n\n".join(filter(None, parts))


def notebook_page(notebook: dict, name: str) -> str:
    """The cells of a notebook as Markdown, with their stored outputs."""
    return "\n\n".join(_cells(notebook, name)) + "\n"


def _cells(notebook: dict, name: str) -> Iterator[str]:
    for index, cell in enumerate(notebook["cells"]):
        source = _text(cell["source"])
        if cell["cell_type"] == "code":
            yield f"```python\n{source}\n```"
            yield from filter(None, map(_output, cell["outputs"]))
        else:
            yield source
        if index == 0:
            yield f'This page is a notebook: <a href="{name}" download>{name}</a>, in `docs/tutorials/`.'


def _output(output: dict) -> str:
    if output["output_type"] == "stream":
        return f"```text\n{_text(output['text']).rstrip()}\n```"
    data = output.get("data", {})
    if "text/html" in data:
        return f"<div>{_text(data['text/html'])}</div>"
    return f"```text\n{_text(data['text/plain']).rstrip()}\n```" if "text/plain" in data else ""


def _text(lines: str | list[str]) -> str:
    return lines if isinstance(lines, str) else "".join(lines)


def settings_page() -> str:
    """The output of `sepo recipe` as a page."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    from sepo.cli.recipe import describe_recipe

    return (
        "# Settings\n\nEvery setting of a recipe with its default and meaning, as `sepo recipe` prints them. "
        "[Recipes and runs](recipes.md) explains how to use a recipe.\n\n"
        f"```yaml\n{describe_recipe().rstrip()}\n```\n"
    )


class SettingsFields(griffe.Extension):
    """Adds the fields of a settings class, with defaults and descriptions, to its docstring.

    The descriptions are arguments of pydantic's `Field`, which the API reference does not show.
    """

    def on_class(self, *, cls: griffe.Class, **kwargs: Any) -> None:
        if cls.module.path != "sepo.recipe.settings" or cls.docstring is None:
            return
        from sepo.recipe import settings

        lines = []
        for name, field in getattr(settings, cls.name).model_fields.items():
            default = None if field.is_required() else field.get_default(call_default_factory=True)
            value = "required" if field.is_required() else f"default `{default!r}`"
            lines.append(
                f"    {name}: {field.description}" + ("" if isinstance(default, settings.Settings) else f"; {value}")
            )
        cls.docstring.value += "\n\nAttributes:\n" + "\n".join(lines)
