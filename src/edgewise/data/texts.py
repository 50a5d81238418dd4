"""Texts to measure and to learn from, each known by its SHA-256.

    lee_background              300 news articles, 360 KB: evaluation
    wikipedia_pages             English Wikipedia pages of 2016 without their markup, 3 MB
    wikipedia_pages/calibration every fourth of these pages, from the first: page index 0, 4, 8, ...
    wikipedia_pages/training    the other pages
    pydoc                       Python's own help topics: needs no download, but differs between versions of Python
    a path                      a UTF-8 file

The first two lie in the wheel of gensim 4.4.0 and are fetched like a model; gensim itself is not imported.
"""

from __future__ import annotations

import bz2
import difflib
import hashlib
import html
import io
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Literal
from xml.etree import ElementTree

from edgewise.core.errors import FormatError, SourceError
from edgewise.formats.cache import Progress
from edgewise.formats.sources import resolve

__all__ = ["CALIBRATION_EVERY", "TEXTS", "Text", "pages", "strip_markup", "text"]

TEXTS = ("lee_background", "wikipedia_pages", "wikipedia_pages/calibration", "wikipedia_pages/training", "pydoc")
CALIBRATION_EVERY = 4
"""Of the Wikipedia pages, in their order, this share (one in four) is calibration and the rest is training."""
Split = Literal["all", "calibration", "training"]

_WHEEL = "pip:gensim==4.4.0:gensim/test/test_data/"
_FILES = {
    "lee_background.cor": "5d78d6dafd953bbf65797bef09a9ffb9ec430583381be705f8fd460000f370fb",
    "enwiki-latest-pages-articles1.xml-p000000010p000030302-shortened.bz2":
        "a53f4648dec40467ebdcbc7a1307eddb51fe6e28e9309f6ebde81ba0d04bea2d",
}
_LIMIT_BYTES = 1_000_000_000


@dataclass(frozen=True)
class Text:
    """name: as asked for. sha256: of the content's UTF-8 bytes, in hex; a measured value holds for it alone."""

    name: str
    content: str = field(repr=False)
    sha256: str

    @classmethod
    def of(cls, name: str, content: str) -> Text:
        return cls(name, content, hashlib.sha256(content.encode("utf-8")).hexdigest())


def text(name: str | os.PathLike[str], *, offline: bool | None = None, progress: Progress | None = None) -> Text:
    """The text of that name or at that path. Raises SourceError or FormatError."""
    known = os.fspath(name)
    if known == "lee_background":
        return Text.of(known, _fetched("lee_background.cor", offline, progress).decode("utf-8"))
    if known in TEXTS and known.startswith("wikipedia_pages"):
        split: Split = ("calibration" if known.endswith("/calibration")
                        else "training" if known.endswith("/training") else "all")
        return Text.of(known, "\n\n\n".join(pages(split, offline=offline, progress=progress)) + "\n")
    if known == "pydoc":
        return Text.of(known, _help_topics())
    return Text.of(known, _file(known))


def pages(split: Split = "all", *, offline: bool | None = None, progress: Progress | None = None) -> tuple[str, ...]:
    """Wikipedia pages, one string each, in the order of the file; redirections are not pages.

    calibration and training share no page: a page belongs to one by its index (CALIBRATION_EVERY).
    """
    name = next(name for name in _FILES if name.startswith("enwiki"))
    found = _pages(_fetched(name, offline, progress))
    if split == "calibration":
        return found[::CALIBRATION_EVERY]
    if split == "training":
        return tuple(page for index, page in enumerate(found) if index % CALIBRATION_EVERY)
    return found


def _fetched(name: str, offline: bool | None, progress: Progress | None) -> bytes:
    content = resolve(_WHEEL + name, offline=offline, progress=progress).read_bytes()
    digest = hashlib.sha256(content).hexdigest()
    if digest != _FILES[name]:
        raise SourceError(f"{name} has SHA-256 {digest}; expected {_FILES[name]}; remove it from the cache, or "
                          "reinstall gensim, and try again")
    return content


def _file(name: str) -> str:
    path = Path(name).expanduser()
    if not path.is_file():
        near = difflib.get_close_matches(name, TEXTS, 2, 0.5)
        hint = f" Near it: {', '.join(near)}." if near else ""
        raise SourceError(f"no text {name!r}: it is not a file and not a known text.{hint} "
                          f"Expected a path, or one of {', '.join(TEXTS)}")
    if path.stat().st_size > _LIMIT_BYTES:
        raise FormatError(f"the file has more than {_LIMIT_BYTES} bytes; give a part of it", path=path)
    try:
        return path.read_bytes().decode("utf-8")
    except UnicodeDecodeError as error:
        raise FormatError("the text is not UTF-8", path=path, offset=error.start) from None


def _help_topics() -> str:
    from pydoc_data.topics import topics

    return "\n\n".join(topics[key] for key in sorted(topics)) + "\n"


@lru_cache(maxsize=1)
def _pages(packed: bytes) -> tuple[str, ...]:
    return tuple(stripped for title, markup in _articles(bz2.decompress(packed))
                 if (stripped := f"{title}\n\n{strip_markup(markup)}"))


def _articles(xml: bytes) -> Iterator[tuple[str, str]]:
    """Title and markup of each page that is not a redirection."""
    title = ""
    for _, element in ElementTree.iterparse(io.BytesIO(xml)):
        tag = element.tag.rpartition("}")[2]
        if tag == "title":
            title = element.text or ""
        elif tag == "text":
            markup = element.text or ""
            if not markup.lstrip().lower().startswith("#redirect"):
                yield title, markup
        elif tag == "page":
            element.clear()


_INNERMOST_TEMPLATE = re.compile(r"\{\{[^{}]*\}\}")
_INNERMOST_TABLE = re.compile(r"\{\|(?:(?!\{\||\|\}).)*\|\}", re.DOTALL)
_MEDIA = re.compile(r"\[\[(?:File|Image|Category|[a-z]{2,3}(?:-[a-z]+)?):(?:[^\[\]]|\[\[[^\[\]]*\]\])*\]\]",
                    re.IGNORECASE)
_SUBSTITUTIONS = [(re.compile(pattern, flags), replacement) for pattern, replacement, flags in (
    (r"<!--.*?-->", "", re.DOTALL),
    (r"<(ref|gallery|math|timeline|nowiki|code|source|syntaxhighlight|score)\b[^<>]*?/>", "", re.IGNORECASE),
    (r"<(ref|gallery|math|timeline|code|source|syntaxhighlight|score)\b[^<>]*>.*?</\1\s*>", "",
     re.DOTALL | re.IGNORECASE),
)]
_AFTER_TEMPLATES = [(re.compile(pattern, flags), replacement) for pattern, replacement, flags in (
    (r"\[\[(?:[^\[\]|]*\|)?([^\[\]|]*)\]\]", r"\1", 0),               # [[page|shown]] -> shown
    (r"\[(?:https?|ftp)?:?//[^\s\]]+\s*([^\]]*)\]", r"\1", 0),        # [address shown] -> shown
    (r"</?[a-zA-Z][^<>]*>", "", 0),                                    # what is left of HTML
    (r"'{2,5}", "", 0),                                                # bold and italic
    (r"^=+\s*(.*?)\s*=+\s*$", r"\1", re.MULTILINE),                    # headings stay, as lines
    (r"^[*#:;]+\s*", "", re.MULTILINE),                                # list marks go, items stay
    (r"__[A-Z]+__", "", 0),
    (r"\(\s*[,;]?\s*\)", "", 0),                                       # brackets that held only a template
    (r"[ \t\u00a0]+", " ", 0),
    (r" *\n *", "\n", 0),
    (r"\n{3,}", "\n\n", 0),
)]


def strip_markup(markup: str) -> str:
    """Plain prose from wiki markup, simply: what has no plain form is dropped, not rendered.

    Dropped: comments, references, templates, tables, galleries, formulas, code, pictures, categories, links to other
    languages, HTML tags. Kept: the shown words of links, headings and list items as lines of their own.
    """
    for pattern, replacement in _SUBSTITUTIONS:
        markup = pattern.sub(replacement, markup)
    for pattern in (_INNERMOST_TEMPLATE, _INNERMOST_TABLE):
        # From the inside out; markup that never closes stays as it is.
        for _ in range(40):
            markup, count = pattern.subn("", markup)
            if not count:
                break
    markup = html.unescape(_MEDIA.sub("", markup))
    for pattern, replacement in _AFTER_TEMPLATES:
        markup = pattern.sub(replacement, markup)
    return markup.strip()
