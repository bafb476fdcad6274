"""What README and docs name is there: files, links, verbs and their flags, scripts and theirs."""

import re
import shlex
from pathlib import Path

import pytest
import typer

from pipeserve.launch.cli import app

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
FILES = {
    path.relative_to(ROOT).as_posix()
    for room in ("pipeserve", "stages", "profiling", "launch", "configs", "tests", "bench", "docs")
    for path in (ROOT / room).rglob("*.*")
}
TEXT_FILE = re.compile(r"`([\w./-]+\.(?:py|c|h|md))`")
COMMAND = re.compile(r"(?m)^ *\$? ?((?:pipeserve|python bench/\w+\.py) (?:[^\n]*\\\n)*[^\n]*)")
INLINE = re.compile(r"`(python\s+bench/\w+\.py[^`]*)`")
VERBS = typer.main.get_command(app).commands


def commands(page):
    """-> words of each command: of those on lines of their own, without a closing remark, and of
    scripts that the text names."""
    text = page.read_text()
    for block in re.findall(r"(?s)```\w*\n(.*?)```", text):
        for line in COMMAND.findall(block):
            yield shlex.split(line.replace("\\\n", " "), comments=True)
    for named in INLINE.findall(text):
        yield named.split()


def options_of(verb):
    return {name for one in VERBS[verb].params for name in (*one.opts, *one.secondary_opts)}


def anchors(page):
    """What a link may have behind #: its headings, as GitHub writes them."""
    headings = re.findall(r"(?m)^#+ (.*)$", page.read_text())
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_files_that_it_names(page):
    text = page.read_text()
    missing = {
        name
        for name in TEXT_FILE.findall(text)
        if not any(file == name or file.endswith(f"/{name}") for file in FILES)
    }
    links = re.findall(r"\]\((?!http)([^)#]+)", text)
    missing |= {link for link in links if not (page.parent / link).exists()}
    assert not missing


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_headings_that_it_links_to(page):
    links = re.findall(r"\]\((?!http)([^)#]*)#([^)]+)\)", page.read_text())
    missing = {
        f"{name}#{heading}"
        for name, heading in links
        if heading not in anchors(page.parent / name if name else page)
    }
    assert not missing


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_flags_of_its_commands(page):
    """Every flag of a verb, by the verb itself; of a script, by its own text, or those of `bench`,
    which some hand on."""
    for words in commands(page):
        flags = {
            word.split("=")[0].strip("[]") for word in words if word.strip("[").startswith("-")
        }
        if words[0] == "python":
            known = (ROOT / words[1]).read_text() + (ROOT / "bench/commands.py").read_text()
            unknown = {flag for flag in flags if f'"{flag}"' not in known}
            assert not unknown - options_of("bench"), words
        elif words[1] in VERBS:
            assert not flags - options_of(words[1]), words


def test_the_pages_have_commands():
    """What finds them still does."""
    assert sum(1 for page in PAGES for _ in commands(page)) > 30
