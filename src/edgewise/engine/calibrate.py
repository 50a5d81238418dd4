"""Statistics of every linear's inputs, gathered layer by layer while the engine runs a text."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING

import numpy as np

from edgewise.core.errors import InvalidValueError
from edgewise.core.stats import InputStats, Stats

if TYPE_CHECKING:
    from edgewise.engine.model import LanguageModel

__all__ = ["calibrate"]

def calibrate(model: LanguageModel, texts: Iterable[str | Sequence[int]], *, gram: bool = False,
              progress: Callable[[str, int, int], None] | None = None) -> Stats:
    """Stats of each linear's inputs, under the linear's name. Linears with the same inputs share one InputStats.

    Long texts are read in parts of the context's length. gram: keep X^T X too, of every site at once: for a large
    model that is more memory than the weights.
    """
    collected: dict[str, InputStats] = {}
    model.session.set_capture(True)
    try:
        batches = [ids for text in texts for ids in _parts(model, text)]
        if not batches:
            raise InvalidValueError("calibration needs at least one text with at least one token")
        for done, ids in enumerate(batches):
            model.reset()
            for start in range(0, len(ids), model.session.batch):
                part = ids[start:start + model.session.batch]
                model.session.begin(part, np.zeros(len(part), np.int32))
                for layer in range(model.layers):
                    model.session.run_layers(layer, layer + 1)
                    for site, names in model.sites[layer].items():
                        found = InputStats.from_samples(model.session.captured(site), gram=gram)
                        if names[0] in collected:
                            found = collected[names[0]] + found
                        collected.update(dict.fromkeys(names, found))
            if progress is not None:
                progress("calibrating", done + 1, len(batches))
    finally:
        model.session.set_capture(False)
        model.reset()
    return Stats(collected)


def _parts(model: LanguageModel, text: str | Sequence[int]) -> list[np.ndarray]:
    ids = np.asarray(model.encode(text, add_special=False) if isinstance(text, str) else text, np.int32)
    return [ids[start:start + model.context] for start in range(0, len(ids), model.context)]
