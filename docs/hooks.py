"""What `mkdocs build` adds to the pages of docs/: the pages of results/, the notebooks as pages, every setting of a
recipe (as a page, and in the API reference); and it leads links that leave docs/ to where they lead in the site.

On disk a link goes to the file it names, so that pages can be read in the repository. In the site

    ../results/gpu.md                   leads to the page that was made of it
    tutorials/01-your-data.ipynb        leads to the page that was made of it
    ../recipes/experiments, ../src/...  becomes text: the path in the repository
    anything that is not there          stays, and a strict build fails on it
"""

from __future__ import annotations

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
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parent.parent
_LINK = re.compile(r"(!?)\[([^\]]*)\]\(([^)\s]+)\)")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages that are made from files outside of docs/, or that are no Markdown."""
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


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Lead the links of a page to where they lead in the site."""
    return site_links(markdown, page.file.src_uri)


def site_links(markdown: str, uri: str) -> str:
    """Rewrite the links of the page `uri` (its path in the site's sources) that name files of the repository."""
    here = posixpath.dirname(uri if uri.startswith("results/") else f"docs/{uri}")

    def lead(match: re.Match[str]) -> str:
        image, text, target = match.groups()
        path, hash_, anchor = target.partition("#")
        if not path or re.match(r"[a-z]+:", path):
            return match[0]
        place = posixpath.normpath(posixpath.join(here, path))
        if place.startswith("..") or not (ROOT / place).exists():
            return match[0]
        if place.startswith(("docs/", "results/")) and (ROOT / place).is_file():
            place = re.sub(r"\.ipynb$", ".md", place.removeprefix("docs/"))
            return f"{image}[{text}]({posixpath.relpath(place, posixpath.dirname(uri) or '.')}{hash_}{anchor})"
        return f"`{place}`" if place.startswith(text.strip("`").rstrip("/")) else f"{text} (`{place}`)"

    return _LINK.sub(lead, markdown)


def notebook_page(notebook: dict, name: str) -> str:
    """The cells of a notebook as Markdown, with the outputs that are kept in it."""
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
    """What `sepo recipe` prints."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    from sepo.recipe.reading import describe_recipe

    return (
        "# Every setting\n\nA recipe with all settings, their defaults and meanings: what `sepo recipe` prints. "
        "[Recipes, stages and Python](recipes.md) says how a recipe is used.\n\n"
        f"```yaml\n{describe_recipe().rstrip()}\n```\n"
    )


class SettingsFields(griffe.Extension):
    """The fields of a class of settings, with their defaults and descriptions, as a section of its docstring.

    They are told to pydantic, where a reader of the source finds them and a reader of docstrings does not.
    """

    def on_class(self, *, cls: griffe.Class, **kwargs: Any) -> None:
        if cls.module.path != "sepo.recipe.settings" or cls.docstring is None:
            return
        from sepo.recipe import settings

        lines = []
        for name, field in getattr(settings, cls.name).model_fields.items():
            default = None if field.is_required() else field.get_default(call_default_factory=True)
            told = "required" if field.is_required() else f"default `{default!r}`"
            lines.append(
                f"    {name}: {field.description}" + ("" if isinstance(default, settings.Settings) else f"; {told}")
            )
        cls.docstring.value += "\n\nAttributes:\n" + "\n".join(lines)
