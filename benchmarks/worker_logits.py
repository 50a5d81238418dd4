"""A process that reads token ids with another engine and writes the logits to a file. Started by interchange.py."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from typing import Any

import numpy as np

Forward = Callable[[list[int]], Any]


def llama_cpp(settings: dict[str, Any]) -> tuple[str, Forward]:
    import llama_cpp

    model = llama_cpp.Llama(settings["model"], n_ctx=settings["context"], n_threads=2, n_threads_batch=2,
                            logits_all=True, verbose=False)

    def forward(ids: list[int]) -> Any:
        model.reset()
        model._ctx.kv_cache_clear()
        model.eval(ids)
        return np.array(model.scores[:len(ids)], np.float32)

    return f"llama-cpp-python {llama_cpp.__version__}", forward


def transformers(settings: dict[str, Any]) -> tuple[str, Forward]:
    import compressed_tensors
    import torch
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(settings["model"], dtype=torch.float32).eval()

    def forward(ids: list[int]) -> Any:
        with torch.no_grad():
            return model(torch.tensor([ids])).logits[0].numpy()

    return f"transformers {transformers.__version__}, compressed-tensors {compressed_tensors.__version__}", forward


def main() -> None:
    settings = json.loads(sys.argv[1])
    about, forward = (llama_cpp if settings["engine"] == "llama.cpp" else transformers)(settings)
    print(json.dumps({"about": about}), flush=True)
    for line in sys.stdin:
        np.save(settings["out"], forward(json.loads(line)["ids"]))
        print(json.dumps({"done": True}), flush=True)


if __name__ == "__main__":
    main()
