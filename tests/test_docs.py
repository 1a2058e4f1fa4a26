"""The documentation: links lead somewhere, and what is made from the source is as it would be made.

`make docs` builds the site as well, where mkdocs checks the links once more.
"""

import ast
import re
import runpy

import pytest

from tests.commands import ROOT

PAGES = sorted([ROOT / "README.md", *(ROOT / "docs").glob("*.md")])
_LINK = re.compile(r"\]\(([^)\s]+)\)")


def anchors(path):
    """What a link may name in a file: headings of a page, definitions of a module."""
    text = path.read_text()
    if path.suffix == ".md":
        heads = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
        return {
            re.sub(r"\s+", "-", re.sub(r"[^\w\s-]", "", head.lower()).strip()) for head in heads
        }
    found = set()
    for node in ast.parse(text).body if path.suffix == ".py" else ():
        name = getattr(node, "name", None)
        found |= {name, *(f"{name}.{getattr(n, 'name', '')}" for n in getattr(node, "body", ()))}
    return found


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links(page):
    bad = []
    for link in _LINK.findall(page.read_text()):
        if re.match(r"https?://", link):
            continue
        name, _, anchor = link.partition("#")
        target = (page.parent / name).resolve() if name else page
        if not target.exists() or (anchor and anchor not in anchors(target)):
            bad.append(link)
    assert not bad


def test_the_reference_of_keys_is_as_the_source_says():
    made = runpy.run_path(str(ROOT / "docs" / "config_page.py"))
    found = made["PAGE"].read_text()
    assert found == made["page"](), "docs/config.md is old: run python docs/config_page.py"


def test_every_page_is_in_the_navigation():
    text = (ROOT / "mkdocs.yml").read_text()
    named = re.findall(r": (\w+\.md)$", text, re.MULTILINE)
    assert sorted(named) == sorted(page.name for page in (ROOT / "docs").glob("*.md"))


def test_commands_in_the_pages_are_there():
    for page in PAGES:
        for module in re.findall(
            r"python -m (videomem_jax[\w.]*|benchmarks[\w.]*)", page.read_text()
        ):
            path = ROOT / module.rstrip(".").replace(".", "/")
            assert path.with_suffix(".py").is_file() or (path / "__main__.py").is_file(), module
        for script in re.findall(r"python ((?:\w+/)*\w+\.py)", page.read_text()):
            known = (ROOT / script).is_file() or page.name == "extending.md"
            assert known, f"{page.name}: {script}"


def test_keys_in_the_pages_are_there():
    """Every --config.KEY of a command is a key of training or of a benchmark."""
    from videomem_jax import keys, settings
    from videomem_jax.benchmark import config as benchmark

    known = {
        key.name
        for cls in (settings.Settings, benchmark.Config)
        for part in keys.parts(cls)
        for key in part.keys
    }
    for page in PAGES:
        for name in re.findall(r"--config\.([a-z_.0-9]+)=", page.read_text()):
            assert name in known, f"{page.name}: {name}"
