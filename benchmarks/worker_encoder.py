"""A process that runs an encoder in one runtime: one JSON line in, one JSON line out. Started by encoders.py."""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np

Run = Callable[[Any], Any]
"""ids (batch, tokens) int64 -> last hidden states (batch, tokens, hidden) float32."""
IDLE_S = 0.03  # before a measurement: threads of the runtime before it spin for more work for a while


def edgewise(settings: dict[str, Any]) -> tuple[Run, dict[str, Any]]:
    from edgewise.engine.loading import load

    model = load(settings["model"], format=settings["format"], threads=settings["threads"], context=settings["tokens"],
                 slots=max(settings["batches"]))
    return (lambda ids: np.stack(model.states_of(ids))), {"tier": model.tier}


def torch(settings: dict[str, Any]) -> tuple[Run, dict[str, Any]]:
    import torch
    import transformers

    torch.set_num_threads(settings["threads"])
    model = transformers.BertModel.from_pretrained(settings["model"], add_pooling_layer=False).eval()

    def run(ids: Any) -> Any:
        with torch.inference_mode():
            tokens = torch.from_numpy(ids)
            return model(tokens, attention_mask=torch.ones_like(tokens)).last_hidden_state.numpy()

    return run, {"version": torch.__version__, "transformers": transformers.__version__}


def onnxruntime(settings: dict[str, Any]) -> tuple[Run, dict[str, Any]]:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = settings["threads"]
    session = onnxruntime.InferenceSession(settings["graph"], options, providers=["CPUExecutionProvider"])
    return (lambda ids: session.run(None, {"input_ids": ids, "attention_mask": np.ones_like(ids)})[0],
            {"version": onnxruntime.__version__})


def openvino(settings: dict[str, Any]) -> tuple[Run, dict[str, Any]]:
    """Compiled for each shape, which is faster than one model for all."""
    import openvino

    config = {"INFERENCE_NUM_THREADS": settings["threads"], "PERFORMANCE_HINT": "LATENCY", **settings["config"]}
    core, requests = openvino.Core(), {}
    for batch in settings["batches"]:
        model = core.read_model(settings["graph"])
        model.reshape({port.get_any_name(): [batch, settings["tokens"]] for port in model.inputs})
        compiled = core.compile_model(model, "CPU", config)
        requests[batch] = compiled.create_infer_request()

    def run(ids: Any) -> Any:
        found = requests[len(ids)].infer({"input_ids": ids, "attention_mask": np.ones_like(ids)}, share_inputs=True)
        return found[0]

    return run, {"version": openvino.__version__,
                 "precision": str(compiled.get_property("INFERENCE_PRECISION_HINT").to_string())}


def main() -> None:
    settings = json.loads(sys.argv[1])
    ids = np.load(settings["ids"])
    run, about = {"edgewise": edgewise, "torch": torch, "onnxruntime": onnxruntime, "openvino": openvino}[
        settings["runtime"]](settings)
    print(json.dumps({"ready": True, **about}), flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        part = np.ascontiguousarray(ids[:request["batch"]])
        time.sleep(IDLE_S)
        states = run(part)
        if request["what"] == "embeddings":
            print(json.dumps({"embeddings": np.asarray(states, np.float64).mean(axis=1).tolist()}), flush=True)
            continue
        seconds = []
        for _ in range(request["calls"]):
            started = time.perf_counter()
            run(part)
            seconds.append(time.perf_counter() - started)
        print(json.dumps({"seconds": statistics.median(seconds)}), flush=True)


if __name__ == "__main__":
    main()
