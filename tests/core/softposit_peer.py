"""What SoftPosit says of (8, 0) and (16, 1), as digests: every code, every boundary with its neighbours, dot products.

`python tests/core/softposit_peer.py` asks the package (pip install softposit==0.3.4.4, an extension module of 2019
that is built from source) and rewrites softposit_peer.json; the tests compare our own answers with that file.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np

from edgewise.core.elements import posit_format, rounding_table

ANSWERS = Path(__file__).with_name("softposit_peer.json")
TERMS, PRODUCTS = 24, 1500


def digest(values: np.ndarray, kind: str) -> str:
    return hashlib.sha256(np.ascontiguousarray(values, np.dtype(kind)).tobytes()).hexdigest()


def points(bits: int, es: int) -> np.ndarray:
    """Every boundary of the standard and its two neighbours, and what is far out; zero left out."""
    exact = rounding_table(posit_format(bits, es, "standard")).exact
    far = np.array([1e-300, 1e-30, 1e30, 1e300])
    found = np.concatenate([exact, np.nextafter(exact, np.inf), np.nextafter(exact, -np.inf), far, -far])
    return found[np.abs(found) > 1e-301]


def operands(bits: int) -> np.ndarray:
    """Codes (products, 2, terms) of a linear congruential generator, never NaR; their sizes grow with the product."""
    state, codes = 12345, np.zeros((PRODUCTS, 2, TERMS), np.int64)
    near = 1 << (bits - 2)  # the code of one
    for product in range(PRODUCTS):
        reach = near * (1 + product % 8) // 8
        for place in range(2 * TERMS):
            state = (1103515245 * state + 12345) % 2**31
            code = near + (state >> 8) % (2 * reach - 1) - reach + 1
            codes[product, place % 2, place // 2] = code if state >> 30 else ((1 << bits) - code) % (1 << bits)
    return codes


def asked() -> dict[str, str]:
    import softposit

    answers = {}
    for bits, es, kind, quire in ((8, 0, softposit.posit8, softposit.quire8),
                                  (16, 1, softposit.posit16, softposit.quire16)):
        nar = 1 << (bits - 1)
        answers[f"decode {bits} {es}"] = digest(np.array(
            [float(kind(bits=code)) for code in range(1 << bits) if code != nar]), "<f8")
        answers[f"encode {bits} {es}"] = digest(np.array([kind(float(x)).v.v for x in points(bits, es)]), "<u2")
        sums = []
        for left, right in operands(bits):
            whole = quire()
            for a, b in zip(left, right, strict=True):
                whole.qma(kind(bits=int(a)), kind(bits=int(b)))
            sums.append(whole.toPosit().v.v)
        answers[f"quire {bits} {es}"] = digest(np.array(sums), "<u2")
    return answers


if __name__ == "__main__":
    ANSWERS.write_text(json.dumps(asked(), indent=1) + "\n", "utf-8")
