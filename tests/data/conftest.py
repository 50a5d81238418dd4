"""Random Unicode text, and vocabularies small enough to train while a test waits."""

from __future__ import annotations

import pydoc_data.topics
import random

import pytest

ALPHABETS = (
    [chr(c) for c in range(0x20, 0x7F)],
    [chr(c) for c in range(0xA1, 0x250)],
    list("αβγδεζηθικλμνξοπρστυφχψωάέήίό ΑΒΓΔΩ"),
    list("абвгдежзийклмнопрстуфхцчшщъыьэюя АБВГД"),
    list("שלוםעולם مرحبابالعالم كيف حالك"),
    list("नमस्ते दुनिया கட்டளை ภาษาไทย"),
    list("你好世界漢字かなカナ한국어조선말"),
    list("😀😅🤷‍♀️👩‍👩‍👧‍👦🇩🇪🏴󠁧󠁢󠁥󠁮󠁧󠁿✌🏽❤️"),
    list("0123456789٠١٢٣४५६Ⅷ²½①"),
    list(" \t\n\r\u00a0\u2003\u3000\u200b\u2028"),
    list("\x00\x01\x07\x1b\x7f\x85\ufeff\ufffd\ufffc"),
    list("e\u0301o\u0308n\u0303a\u030a\u0327\u0489Ａｆﬁﬀ"),
    list("'s't're've'm'll'd 'S'LL can't I'm they're"),
    list("!?.,;:()[]{}<>|/\\\"`~@#$%^&*-_=+…—“”«»"),
    [chr(c) for c in (0x1D400, 0x10400, 0x20000, 0x1F9D1, 0xE000, 0x10FFFD, 0xFDFA, 0x0130, 0x1E9E)],
)


def random_texts(count: int, seed: int) -> list[str]:
    """Different strings of up to some eighty characters: runs from a few alphabets, words, and runs of white space."""
    rng = random.Random(seed)
    words = ["the", "quick", "brown", "fox", "HTTPServer", "don't", "3.14", "user_name", "Straße", "naïve", "北京",
             "<unk>", "▁", "##", "[CLS"]
    texts = ["", " ", "  ", "\n", " a", "a ", "  a  b  ", "\n\n\n", "a\r\n\r\nb", "12345678901", "▁", "▁▁a", "\u200d"]
    while len(texts) < count:
        parts = []
        for _ in range(rng.randint(1, 6)):
            kind = rng.random()
            if kind < 0.55:
                alphabet = rng.choice(ALPHABETS)
                parts.append("".join(rng.choice(alphabet) for _ in range(rng.randint(1, 12))))
            elif kind < 0.8:
                parts.append(rng.choice(words))
            else:
                parts.append(rng.choice(" \n\t") * rng.randint(1, 9))
        text = rng.choice(("", " ")).join(parts)
        if text not in texts:
            texts.append(text)
    return texts


@pytest.fixture(scope="session")
def unicode_texts() -> list[str]:
    """1,000 strings, always the same."""
    return random_texts(1000, seed=20240817)


@pytest.fixture(scope="session")
def corpus() -> list[str]:
    """Text to train vocabularies on: the interpreter's own documentation, and every alphabet of the test."""
    manual = [line for topic in sorted(pydoc_data.topics.topics) for line in
              pydoc_data.topics.topics[topic].splitlines() if line.strip()][:4000]
    return manual + random_texts(600, seed=7)
