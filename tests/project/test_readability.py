"""The README, the quickstart and the how-to guides are short, and so are their sentences."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
README = ROOT / "README.md"
PAGES = [README, ROOT / "docs" / "index.md", *sorted((ROOT / "docs" / "use").glob("*.md"))]
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
