"""Pages say for whom they are and soon show something. Those for users are short, and so are their sentences."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
README = ROOT / "README.md"
DOCS = ROOT / "docs"
PAGES = [README, DOCS / "index.md", *sorted([*(DOCS / "use").glob("*.md"), *(DOCS / "tutorials").glob("*.md")])]
FOR_WHOM = re.compile(r"For (?:users|people|contributors|everyone)\b|This page is for you if ")
SHOWN = re.compile(r" *(?:```|\||!\[|::: )|    \S|.*\b[Aa]n example\b")
SHOWN_WITHIN = 40
CODE = re.compile(r"^ *```.*?^ *```", re.DOTALL | re.MULTILINE)
NO_SENTENCE = re.compile(r"<!--.*?-->|^ *(?:[|#]|!!!|\?\?\?).*?$", re.DOTALL | re.MULTILINE)
LINK = re.compile(r"!?\[([^\]]*)\]\([^)]*\)")
WORD = re.compile(r"\w[\w'.-]*")
WORDS_OF_README, WORDS_OF_SENTENCE = 700, 30


def sentences(text: str) -> Iterator[str]:
    """Yield the sentences of a page: of paragraphs and list items, without code, tables and headings."""
    text = LINK.sub(r"\1", re.sub(r"`[^`]*`", "code", NO_SENTENCE.sub("", CODE.sub("\n\n", text))))
    for block in re.split(r"\n\s*\n|^ *(?:[-*]|\d+\.) ", text, flags=re.MULTILINE):
        yield from re.split(r"(?<=[.!?:])\*{0,2}\s+", " ".join(block.split()))


def test_sentences_are_told_apart() -> None:
    text = "# A title\nIt is [one](b.md) sentence. Is it\ntwo?\n\n- This `is a` third:\n\n```text\nno. sentence\n```\n"
    assert [*filter(None, sentences(text))] == ["It is one sentence.", "Is it two?", "This code third:"]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_no_sentence_is_long(page: Path) -> None:
    assert [one for one in sentences(page.read_text()) if len(WORD.findall(one)) > WORDS_OF_SENTENCE] == []


def test_the_readme_is_short() -> None:
    assert len([token for token in README.read_text().split() if WORD.search(token)]) <= WORDS_OF_README


def in_navigation(entry: Any) -> Iterator[Path]:
    """Yield the pages of a part of the navigation."""
    if isinstance(entry, str):
        yield DOCS / entry
    else:
        for part in entry.values() if isinstance(entry, dict) else entry:
            yield from in_navigation(part)


def missing(page: str) -> list[str]:
    """Return what the beginning of a page lacks: for whom it is, and something to see on the first screen."""
    _, *body = page.splitlines()
    first = next(filter(None, sentences("\n".join(body))), "")
    shown = next((number for number, line in enumerate(body, 2) if SHOWN.match(line)), SHOWN_WITHIN + 1)
    return ["for whom"] * (not FOR_WHOM.match(first)) + ["an example"] * (shown > SHOWN_WITHIN)


def test_a_beginning_that_lacks_something_is_noticed() -> None:
    reader = "For users who wait."
    assert missing(f"# A title\n\n{reader}\n\n```bash\nls\n```\n") == []
    assert missing(f"# A title\n\nThis is a page. {reader}\n\n| a |\n") == ["for whom"]
    assert missing("# A title\n\n| a |\n") == ["for whom"]
    assert missing(f"# A title\n\n{reader}\n" + "More.\n" * 40 + "| a |\n") == ["an example"]
    assert missing(f"# A title\n\n{reader}\n") == ["an example"]


NAVIGATION = yaml.safe_load((DOCS / "mkdocs" / "mkdocs.yml").read_text())["nav"]


@pytest.mark.parametrize("page", [*in_navigation(NAVIGATION)], ids=lambda page: page.relative_to(DOCS).as_posix())
def test_a_page_says_for_whom_it_is_and_soon_shows_something(page: Path) -> None:
    is_a_list = page.name == "changelog.md"  # which has nothing to show
    assert missing(page.read_text()) == ["an example"] * is_a_list


def test_the_navigation_is_by_what_a_reader_wants() -> None:
    kinds = [kind for entry in NAVIGATION for kind in entry]
    assert kinds == [
        "Quickstart",
        "Tutorials",
        "How-to guides",
        "Explanation",
        "Reference",
        "Benchmarks",
        "Contributing",
    ]
