"""A process that times llama-cpp-python on request: one JSON line in, one JSON line out. Started by llm.py.

Runs in an environment of its own that has llama-cpp-python built from its source package.
"""

from __future__ import annotations

import json
import random
import sys
import time


def main() -> None:
    import llama_cpp

    settings = json.loads(sys.argv[1])
    model = llama_cpp.Llama(
        settings["model"], n_threads=settings["threads"], n_threads_batch=settings["threads"],
        n_ctx=settings["context"], n_batch=512, n_ubatch=512, flash_attn=settings["flash_attn"], verbose=False)
    version = llama_cpp.__version__
    print(json.dumps({"ready": True, "version": version}), flush=True)
    rng = random.Random(0)
    for line in sys.stdin:
        request = json.loads(line)
        depth, count = request.get("depth", 0), request["count"]
        model.reset()
        model._ctx.kv_cache_clear()
        tokens = [rng.randrange(100, 30_000) for _ in range(depth + count)]
        if depth:
            model.eval(tokens[:depth])
        if request["what"] == "prefill":
            started = time.perf_counter()
            model.eval(tokens[depth:])
            seconds = time.perf_counter() - started
        else:
            if not depth:
                model.eval(tokens[:1])
            # Greedy choice by the library's own sampler chain, as edgewise's C++ loop does it.
            started = time.perf_counter()
            for _ in range(count):
                token = model.sample(temp=0.0)
                model.eval([token])
            seconds = time.perf_counter() - started
        print(json.dumps({"seconds": seconds, "tokens": count}), flush=True)


if __name__ == "__main__":
    main()
