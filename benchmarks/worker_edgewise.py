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
    print(json.dumps({"ready": True, "tier": model.tier, "kv": model.kv}), flush=True)
    rng = np.random.default_rng(0)
    for line in sys.stdin:
        request = json.loads(line)
        depth, count = request.get("depth", 0), request["count"]
        session.truncate(0, 0)
        tokens = rng.integers(100, min(model.vocab, 30_000), depth + count).astype(np.int32)
        if depth:
            session.prefill(0, tokens[:depth])
        if request["what"] == "prefill":
            started = time.perf_counter()
            session.prefill(0, tokens[depth:])
            seconds = time.perf_counter() - started
        else:
            if not depth:
                session.prefill(0, tokens[:1])
            # The token sampled last is fed when the next is asked for: one beforehand, and `count` passes are timed.
            sampler = _core.Sampler()
            session.generate(0, sampler, 1, [])
            started = time.perf_counter()
            session.generate(0, sampler, count, [])
            seconds = time.perf_counter() - started
        print(json.dumps({"seconds": seconds, "tokens": count}), flush=True)


if __name__ == "__main__":
    main()
