"""A process that loads a model with llama-cpp-python and gives one token. Started by start.py."""

import json
import sys

from llama_cpp import Llama

settings = json.loads(sys.argv[1])
model = Llama(settings["model"], n_threads=settings["threads"], n_threads_batch=settings["threads"],
              n_ctx=settings["context"], n_batch=512, n_ubatch=512, flash_attn=settings["flash_attn"], verbose=False)
answer = model.create_chat_completion([{"role": "user", "content": settings["prompt"]}], max_tokens=1, temperature=0.0)
print(json.dumps({"token": answer["choices"][0]["message"]["content"],
                  "prompt_tokens": answer["usage"]["prompt_tokens"]}), flush=True)
