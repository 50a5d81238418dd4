"""Texts: what is stripped, what is kept, and that calibration never sees training."""

from __future__ import annotations

import bz2
import hashlib
import sys
from pathlib import Path
from typing import Any

import pytest

from edgewise.core.errors import FormatError, SourceError
from edgewise.data import texts
from edgewise.data.texts import CALIBRATION_EVERY, Text, pages, strip_markup, text

PAGE = "<page><title>{title}</title><revision><text>{markup}</text></revision></page>"


@pytest.fixture
def wheel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that stands for the data of the gensim wheel: ten pages, one of them a redirection."""
    markup = [f"'''Page {n}''' is [[thing|a thing]].&lt;ref&gt;x&lt;/ref&gt;" for n in range(9)]
    xml = "".join(PAGE.format(title=f"T{n}", markup=body) for n, body in enumerate(markup))
    xml = ('<mediawiki xmlns="http://www.mediawiki.org/xml/export-0.10/">'
           + PAGE.format(title="Old", markup="#REDIRECT [[T0]]") + xml + "</mediawiki>")
    files = {"lee_background.cor": "Hundreds of people\nA new blaze é\n".encode(),
             next(name for name in texts._FILES if name.endswith("bz2")): bz2.compress(xml.encode())}
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
        monkeypatch.setitem(texts._FILES, name, hashlib.sha256(content).hexdigest())

    def resolve(source: str, **_: Any) -> Path:
        assert source.startswith("pip:gensim==4.4.0:gensim/test/test_data/")
        return tmp_path / source.rsplit("/", 1)[1]

    monkeypatch.setattr(texts, "resolve", resolve)
    return tmp_path


def test_a_text_is_known_by_its_hash(tmp_path: Path) -> None:
    (tmp_path / "x.txt").write_bytes("a é\r\n".encode())
    found = text(tmp_path / "x.txt")
    assert found == Text(str(tmp_path / "x.txt"), "a é\r\n", hashlib.sha256("a é\r\n".encode()).hexdigest())
    assert "a é" not in repr(found)


def test_wrong_names_and_files(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="Near it: lee_background"):
        text("lee_backgroud")
    (tmp_path / "x").write_bytes(b"ab\xff")
    with pytest.raises(FormatError, match="not UTF-8") as caught:
        text(tmp_path / "x")
    assert caught.value.offset == 2


def test_news(wheel: Path) -> None:
    assert text("lee_background").content == "Hundreds of people\nA new blaze é\n"
    (wheel / "lee_background.cor").write_bytes(b"other")
    with pytest.raises(SourceError, match=r"lee_background\.cor has SHA-256"):
        text("lee_background")


def test_pages_are_split_by_index(wheel: Path) -> None:
    everything = pages()
    assert everything[0] == "T0\n\nPage 0 is a thing."
    assert len(everything) == 9
    assert [everything.index(page) for page in pages("calibration")] == [0, 4, 8]
    assert not set(pages("calibration")) & set(pages("training"))
    assert sorted((*pages("calibration"), *pages("training"))) == sorted(everything)
    assert text("wikipedia_pages/calibration").content == "\n\n\n".join(everything[::CALIBRATION_EVERY]) + "\n"
    assert len({text(name).sha256 for name in texts.TEXTS if name.startswith("wiki")}) == 3


def test_help_topics_need_no_download() -> None:
    found = text("pydoc")
    assert len(found.content) > 100_000
    assert found == text("pydoc")
    assert "gensim" not in sys.modules


@pytest.mark.parametrize(("markup", "plain"), [
    ("a<!-- b\nc -->d", "ad"),
    ("a<ref name=x>b [[c]]</ref><ref name='y' />d", "ad"),
    ("{{a|{{b}}|c}}d", "d"),
    ("x {| class=y\n| a\n{| b |}\n|} z", "x z"),
    ("[[File:a.jpg|thumb|b [[c|d]] e]]f", "f"),
    ("[[Category:x]][[de:Blatt]]a", "a"),
    ("[[a]] [[b|c]]s [[d (e)|]]", "a cs"),
    ("[http://x.example shown words] [http://y.example]", "shown words"),
    ("''a'' '''b''' '''''c'''''", "a b c"),
    ("== Head ==\ntext\n=== Sub===\n", "Head\ntext\nSub"),
    ("* a\n** b\n# c\n: d", "a\nb\nc\nd"),
    ("a&nbsp;b &amp; c &lt;d&gt;", "a b & c"),
    ("<br/>a<small>b</small>", "ab"),
    ("E = <math>m c^2</math> x", "E = x"),
    ("a ({{lang|fr|x}}) b", "a b"),
    ("a\n\n\n\n b ", "a\n\nb"),
    ("{{never closed", "{{never closed"),
    ("5 < 6 and 7 > 3", "5 < 6 and 7 > 3"),
])
def test_strip_markup(markup: str, plain: str) -> None:
    assert strip_markup(markup) == plain


@pytest.mark.slow
def test_the_real_texts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    news = text("lee_background")
    assert (len(news.content), news.sha256[:16]) == (360_082, "5d78d6dafd953bbf")
    assert len(pages()) == 106
    whole = text("wikipedia_pages", offline=True).content
    assert len(whole) > 2_500_000
    assert sum(whole.count(mark) for mark in ("{{", "[[", "{|", "''")) < 10
    assert "gensim" not in sys.modules
