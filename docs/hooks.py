"""What mkdocs does beside building pages: files that pages link to become pages of source.

A link such as `../videomem_jax/prpo.py#group_advantages` works where the repository is browsed, and
here leads to a page with that file's source, in parts by function.
"""

import ast
import os
import pathlib
import re

import jupytext
from mkdocs.structure.files import File

ROOT = pathlib.Path(__file__).resolve().parents[1]
_LINK = re.compile(r"\]\(\.\./([^)#\s]+)(#[\w.]+)?\)")
_LANGUAGES = {".py": "python", ".json": "json", ".ipynb": "", ".txt": "text"}
_HEAD = "---\ntitle: {0}\nsearch: {{exclude: true}}\n---\n\n# `{0}`\n"
_FENCE = '\n```` {{.{} linenums="{}"}}\n{}\n````\n'


def on_files(files, config):
    """Adds a page for each file outside of docs/ that a page links to."""
    pages = [file for file in files if file.src_uri.endswith(".md")]
    named = {name for page in pages for name, _ in _LINK.findall(page.content_string)}
    for name in sorted(named):
        path = ROOT / name
        if path.suffix in _LANGUAGES and path.is_file():
            content = _notebook(path) if path.suffix == ".ipynb" else _source(name)
            files.append(File.generated(config, _page(name), content=content))
    return files


def on_page_markdown(markdown, page, config, files):
    """Turns links to such files into links to their pages.

    A link to a file that is not there stays as it is: the strict build ends with it.
    """

    def link(match):
        name, symbol = match.groups("")
        if files.get_file_from_path(_page(name)) is None:
            return match[0]
        where = os.path.dirname(page.file.src_uri) or "."
        return f"]({os.path.relpath(_page(name), where)}{symbol})"

    return _LINK.sub(link, markdown)


def _page(name: str) -> str:
    return f"source/{name}.md"


def _notebook(path: pathlib.Path) -> str:
    """A notebook as a page of text and code, without its outputs."""
    page = jupytext.read(path.with_suffix(".py"))
    for part in (page, *page.cells):
        part.metadata = {}
    return jupytext.writes(page, "md")


def _source(name: str) -> str:
    """The page of a file, with a heading for each class, function and method of Python's."""
    path = ROOT / name
    lines, language = path.read_text().splitlines(), _LANGUAGES[path.suffix]
    starts = [(1, "", 0), *(_symbols(lines) if language == "python" else [])]
    page = _HEAD.format(name)
    for (line, symbol, level), (end, _, _) in zip(
        starts, [*starts[1:], (len(lines) + 1, "", 0)], strict=True
    ):
        code = "\n".join(lines[line - 1 : end - 1]).strip("\n")
        if symbol:
            page += f"\n{'#' * level} {symbol.split('.')[-1]} {{#{symbol}}}\n"
        if code:
            skipped = next(i for i, text in enumerate(lines[line - 1 :]) if text)
            page += _FENCE.format(language, line + skipped, code)
    return page


def _symbols(lines: list[str]) -> list[tuple[int, str, int]]:
    """First line of each class, function and method, its name ("Class.method"), and its depth."""
    found = []
    for node in ast.parse("\n".join(lines)).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            found.append((_first(node, lines), node.name, 2))
        for inner in node.body if isinstance(node, ast.ClassDef) else ():
            if isinstance(inner, ast.FunctionDef):
                found.append((_first(inner, lines), f"{node.name}.{inner.name}", 3))
    return found


def _first(node: ast.FunctionDef | ast.ClassDef, lines: list[str]) -> int:
    """Of a definition's lines, its decorators and the comment before it included."""
    line = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
    while lines[line - 2].lstrip().startswith("#"):
        line -= 1
    return line
