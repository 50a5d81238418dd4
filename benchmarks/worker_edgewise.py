"""A process that times edgewise on request: one JSON line in, one JSON line out. Started by llm.py."""

from __future__ import annotations

import json
import sys
import time

import numpy as np


def main() -> None:
    from edgewise.engine.loading import load
    from edgewise.native import _core

    settings = json.loads(sys.argv[1])
    model = load(settings["model"], threads=settings["threads"], context=settings["context"])
    session = model.session
    print(json.dumps({"ready": True, "tier": model.tier, "kv": model.kv, "batch": session.batch}), flush=True)
    rng = np.random.default_rng(0)
    before = rng.integers(100, min(model.vocab, 30_000), model.context).astype(np.int32)
    for line in sys.stdin:
        request = json.loads(line)
        depth, count = request.get("depth", 0), request["count"]
        # What lies before the measured tokens is always the same, and is read once.
        session.truncate(0, min(depth, session.length(0)))
        tokens = rng.integers(100, min(model.vocab, 30_000), count).astype(np.int32)
        if session.length(0) < depth:
            session.prefill(0, before[session.length(0):depth])
        if request["what"] == "prefill":
            started = time.perf_counter()
            session.prefill(0, tokens)
            seconds = time.perf_counter() - started
        else:
            session.prefill(0, tokens[:1])
            # The token sampled last is fed when the next is asked for: one beforehand, and `count` passes are timed.
            sampler = _core.Sampler()
            session.generate(0, sampler, 1, [])
            started = time.perf_counter()
            session.generate(0, sampler, count, [])
            seconds = time.perf_counter() - started
        session.truncate(0, depth)
        print(json.dumps({"seconds": seconds, "tokens": count}), flush=True)


if __name__ == "__main__":
    main()
