"""A process that times llama-cpp-python on request: one JSON line in, one JSON line out. Started by llm.py.

Runs in an environment of its own that has llama-cpp-python built from its source package.
"""

from __future__ import annotations

import ctypes
import json
import random
import sys
import time
from pathlib import Path
from typing import Any


def about(llama_cpp: Any) -> dict[str, str]:
    """Version of the package, commit of the library inside, and the processor features it was built for."""
    library = Path(llama_cpp.__file__).parent / "lib" / "libggml-base.so"
    ggml = []
    for name in ("ggml_version", "ggml_commit"):
        try:
            function = getattr(ctypes.CDLL(str(library)), name)
        except (OSError, AttributeError):
            continue  # an older library does not tell
        function.restype = ctypes.c_char_p
        ggml.append(function().decode())
    return {"version": llama_cpp.__version__, "ggml": " ".join(ggml) or "unknown",
            "features": llama_cpp.llama_print_system_info().decode().strip(" |")}


def main() -> None:
    import llama_cpp

    settings = json.loads(sys.argv[1])
    model = llama_cpp.Llama(
        settings["model"], n_threads=settings["threads"], n_threads_batch=settings["threads"],
        n_ctx=settings["context"], n_batch=512, n_ubatch=512, flash_attn=settings["flash_attn"], verbose=False)
    print(json.dumps({"ready": True, **about(llama_cpp)}), flush=True)
    rng = random.Random(0)
    before = [rng.randrange(100, 30_000) for _ in range(settings["context"])]
    for line in sys.stdin:
        request = json.loads(line)
        depth, count = request.get("depth", 0), request["count"]
        # What lies before the measured tokens is always the same, and is read once: eval() drops what is behind
        # n_tokens from the cache.
        model.n_tokens = min(depth, model.n_tokens)
        if not depth:
            model.reset()
            model._ctx.kv_cache_clear()
        tokens = [rng.randrange(100, 30_000) for _ in range(count)]
        if model.n_tokens < depth:
            model.eval(before[model.n_tokens:depth])
        if request["what"] == "prefill":
            started = time.perf_counter()
            model.eval(tokens)
            seconds = time.perf_counter() - started
        else:
            model.eval(tokens[:1])
            # Greedy choice by the library's own sampler chain, as edgewise's C++ loop does it.
            started = time.perf_counter()
            for _ in range(count):
                token = model.sample(temp=0.0)
                model.eval([token])
            seconds = time.perf_counter() - started
        model.n_tokens = depth
        print(json.dumps({"seconds": seconds, "tokens": count}), flush=True)


if __name__ == "__main__":
    main()
