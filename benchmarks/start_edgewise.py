"""A process that loads a model and gives one token. Started by start.py."""

import json
import sys

from edgewise import load

settings = json.loads(sys.argv[1])
model = load(settings["model"], threads=settings["threads"], context=settings["context"])
generation = model.generate(settings["prompt"], max_tokens=1)
token = next(iter(generation))
print(json.dumps({"token": token.text, "prompt_tokens": generation.prompt_tokens}), flush=True)
