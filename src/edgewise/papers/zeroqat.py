"""ZeroQAT on small Llamas: what training by forward passes regains, what it costs in memory, and what it needs.

arXiv:2509.00031. The paper trains models of 1 to 13 billion parameters for thousands of steps; here models of some
hundred thousand parameters, trained on the offline text, are rounded hard and trained again. Memory is that of a
process of its own for each way, over what it had before the model. The paper's tables come from a third-party summary;
no number of theirs is compared.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from edgewise.core.checkpoint import Checkpoint, Step
from edgewise.core.errors import EdgewiseError
from edgewise.core.numbers import QuantFormat
from edgewise.core.recipe import Claim, Recipe
from edgewise.core.report import Quantity, Report, Table
from edgewise.core.storage import Dense, Stored
from edgewise.measure.memory import run_child
from edgewise.papers.random_llama import random_llama

__all__ = ["RECIPE", "child", "with_outliers"]

Metrics = dict[str, float | None]
COARSE = QuantFormat.parse("int2/axis/fp32/int")
FINE = QuantFormat.parse("int3/g32/fp16/min")
WAYS = ("forward, light", "light", "forward, full", "full", "back-propagation")


def run(settings: Mapping[str, Any], seed: int, ablate: bool) -> Report:
    """One seed: recovery at 2 bits, fine-tuning of the light variant, smoothing, memory."""
    from edgewise.train.small_llama import SmallLlama, small_llama

    source = small_llama(SmallLlama(**settings["model"], seed=seed))
    metrics, rows = _recovery(source, settings, seed, ablate)
    tuned, tuned_rows = _tuning(source, settings, seed, ablate)
    metrics |= tuned
    metrics |= _smoothing(source, settings, seed, ablate)
    metrics |= _estimator(seed, settings["directions"])
    memory, memory_rows = _memory(settings["memory"], seed)
    metrics |= memory
    tables = (Table("Recovery at 2 bits", ("arm", "held-out loss"), tuple(rows), ("", "nats")),
              Table("Two classes at 3 bits", ("arm", "held-out loss", "right"), tuple(tuned_rows), ("", "nats", "")),
              Table("Memory above what was there before the model", ("way", "peak"), tuple(memory_rows), ("", "B")))
    return Report("zeroqat", tuple(Quantity(name, value) for name, value in metrics.items()), tables,
                  environment={"text": settings["model"]["text"], "held out": settings["held_out"]})


# ---- recovery as a language model ---------------------------------------------------------------------------------

def _recovery(source: Checkpoint, settings: Mapping[str, Any], seed: int,
              ablate: bool) -> tuple[Metrics, list[tuple[Any, ...]]]:
    """Held-out loss of each way to 2 bits, from the same start."""
    from edgewise.train.small_llama import token_ids
    from edgewise.train.zeroqat import ZeroQat
    from edgewise.train.zeroth_order import ZerothOrder

    ids = token_ids(source, settings["model"]["text"])
    parts = _parts(token_ids(source, settings["held_out"]), settings)
    base = ZeroQat(steps=settings["steps"], batch=settings["batch"], length=settings["length"], seed=seed,
                   update=ZerothOrder(settings["epsilon"], settings["rate"]))
    loss = {"float": _held_out(_float(source), parts),
            "rounded": _held_out(_trained(source, ids, replace(base, steps=0)), parts),
            "ZeroQAT": _held_out(_trained(source, ids, base), parts),
            "ZeroQAT, quantisers too": _held_out(_trained(source, ids, replace(base, train_quantisers=True)), parts),
            "zeroth order in float, then rounded": _held_out(_float_then_rounded(source, ids, base), parts),
            "straight-through gradients": _held_out(_straight_through(source, ids, base, settings), parts)}
    if ablate:
        tiny = replace(base.update, epsilon=1e-6, learning_rate=settings["rate"])
        loss["ZeroQAT, epsilon 1e-6"] = _held_out(_trained(source, ids, replace(base, update=tiny)), parts)
        loss["noise after the quantiser"] = _held_out(_trained(source, ids, replace(base, as_if="after")), parts)
    lost = loss["rounded"] - loss["float"]
    found: Metrics = {
        "share of the loss of rounding that ZeroQAT regains": (loss["rounded"] - loss["ZeroQAT"]) / lost,
        "share that straight-through gradients regain": (loss["rounded"] - loss["straight-through gradients"]) / lost,
        "loss of training in float and then rounding less ZeroQAT's":
            loss["zeroth order in float, then rounded"] - loss["ZeroQAT"]}
    if ablate:
        found["share regained with epsilon 1e-6"] = (loss["rounded"] - loss["ZeroQAT, epsilon 1e-6"]) / lost
        found["loss with noise after the quantiser less before it"] = (
            loss["noise after the quantiser"] - loss["ZeroQAT"])
    return found, list(loss.items())


def _parts(ids: Any, settings: Mapping[str, Any]) -> Any:
    count = settings["windows"] * settings["length"]
    return ids[:count].reshape(-1, settings["length"])


def _float(source: Checkpoint) -> Any:
    from edgewise.models.loader import load

    return load(source)


def _held_out(net: Any, parts: Any) -> float:
    import torch

    from edgewise.train.zeroqat import language_loss

    with torch.no_grad():
        return float(np.mean([language_loss(torch.from_numpy(parts[start:start + 16]))(net)
                              for start in range(0, len(parts), 16)]))


def _trained(source: Checkpoint, ids: Any, config: Any) -> Any:
    from edgewise.train.small_llama import batches
    from edgewise.train.zeroqat import language_loss, prepare, train

    made = prepare(source, ids, COARSE, config)
    parts = batches(ids, config.batch, config.length, config.seed)
    return train(made, (language_loss(part) for part in parts)).net


def _float_then_rounded(source: Checkpoint, ids: Any, config: Any) -> Any:
    """The same steps on the float model, rounded afterwards as ZeroQAT's start is."""
    from edgewise.models.loader import checkpoint_of, load
    from edgewise.train.small_llama import batches
    from edgewise.train.zeroqat import language_loss
    from edgewise.train.zeroth_order import Moved, step

    net = load(source).requires_grad_(False)
    groups = [Moved({name: value for name, value in net.named_parameters() if name.endswith("_proj.weight")})]
    parts = batches(ids, config.batch, config.length, config.seed)
    for index in range(config.steps):
        loss = language_loss(next(parts))
        step(groups, lambda loss=loss: loss(net), config.update, config.seed * 1_000_003 + index)
    return _trained(checkpoint_of(net, source, Step("zeroth order")), ids, replace(config, steps=0))


def _straight_through(source: Checkpoint, ids: Any, config: Any, settings: Mapping[str, Any]) -> Any:
    """The upper arm: back-propagation through the same quantisers."""
    import torch

    from edgewise.train.small_llama import batches
    from edgewise.train.zeroqat import prepare

    made = prepare(source, ids, COARSE, config)
    weights = [linear.weight.requires_grad_() for linears in made.layers for linear in linears.values()]
    optimiser = torch.optim.AdamW(weights, lr=settings["gradient_rate"], weight_decay=0.0)
    parts = batches(ids, config.batch, config.length, config.seed)
    for _ in range(settings["gradient_steps"]):
        part = next(parts)
        logits = made.net(part, use_cache=False).logits
        loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), part[:, 1:].flatten())
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    return made.net


# ---- fine-tuning of the light variant -----------------------------------------------------------------------------

def _tuning(source: Checkpoint, settings: Mapping[str, Any], seed: int,
            ablate: bool) -> tuple[Metrics, list[tuple[Any, ...]]]:
    """Which of two texts an excerpt is from, told by one of two tokens after it."""
    from edgewise.models.loader import checkpoint_of, load
    from edgewise.train.small_llama import token_ids
    from edgewise.train.zeroqat import ZeroQat, prepare, train
    from edgewise.train.zeroth_order import Moved, ZerothOrder, step

    texts = [token_ids(source, name) for name in (settings["held_out"], settings["other"])]
    options = np.array([300, 301])  # two tokens that stand for the classes; the model learns which
    rng = np.random.default_rng(seed)
    held = _examples(texts, options, settings["tuning_windows"], settings["length"], rng, last=True)
    light = ZeroQat(trained="q v", steps=settings["tuning_steps"], seed=seed,
                    update=ZerothOrder(settings["epsilon"], settings["tuning_rate"]))

    def losses() -> Iterator[Any]:
        own = np.random.default_rng(seed + 1)
        while True:
            yield _option_loss(_examples(texts, options, settings["batch"], settings["length"], own))

    arms = {"light": light} | ({"light, q alone": replace(light, trained="q")} if ablate else {})
    rows: dict[str, tuple[float, float]] = {
        "rounded": _told(prepare(source, texts[0], FINE, light).net, held, options)}
    for name, config in arms.items():
        rows[name] = _told(train(prepare(source, texts[0], FINE, config), losses()).net, held, options)
    net = load(source).requires_grad_(False)
    groups = [Moved({name: value for name, value in net.named_parameters()
                     if name.endswith(("q_proj.weight", "v_proj.weight"))})]
    stream = losses()
    for index in range(light.steps):
        loss = next(stream)
        step(groups, lambda loss=loss: loss(net), light.update, seed * 1_000_003 + index)
    tuned = checkpoint_of(net, source, Step("zeroth order"))
    rows["in float, then rounded"] = _told(prepare(tuned, texts[0], FINE, light).net, held, options)
    found: Metrics = {"loss of light training over training in float and then rounding":
                      rows["light"][0] / rows["in float, then rounded"][0],
                      "fall of the light variant's loss": 1 - rows["light"][0] / rows["rounded"][0]}
    if ablate:
        found["loss with q alone less that with q and v"] = rows["light, q alone"][0] - rows["light"][0]
    return found, [(name, *row) for name, row in rows.items()]


def _examples(texts: Any, options: Any, count: int, length: int, rng: Any, last: bool = False) -> Any:
    """(count, length + 1) ids, half of each class; the last of a row is its class. last: of the texts' last tenth."""
    rows = []
    for index in range(count):
        ids = texts[index % 2]
        cut = int(0.9 * len(ids))
        start = int(rng.integers(cut, len(ids) - length) if last else rng.integers(0, cut - length))
        rows.append(np.append(ids[start:start + length], options[index % 2]))
    return np.stack(rows)


def _option_loss(rows: Any) -> Any:
    import torch

    part = torch.from_numpy(rows)

    def loss(net: Any) -> float:
        logits = net(part[:, :-1], use_cache=False).logits[:, -1]
        return float(torch.nn.functional.cross_entropy(logits, part[:, -1]))

    return loss


def _told(net: Any, rows: Any, options: Any) -> tuple[float, float]:
    import torch

    with torch.no_grad():
        logits = net(torch.from_numpy(rows[:, :-1]), use_cache=False).logits[:, -1]
        wanted = torch.from_numpy(rows[:, -1])
        right = (logits[:, options].argmax(dim=-1) == (wanted == int(options[1])).long()).float().mean()
        return float(torch.nn.functional.cross_entropy(logits, wanted)), float(right)


# ---- smoothing, the estimator, memory -----------------------------------------------------------------------------

def with_outliers(source: Checkpoint, factor: float = 30.0) -> Checkpoint:
    """The same function, with four channels of every norm that stand out and readers that take it back."""
    tensors: dict[str, Stored] = dict(source.tensors.items())
    for name in source.tensors:
        readers = {"input_layernorm": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
                   "post_attention_layernorm": ("mlp.gate_proj", "mlp.up_proj")}
        layer, _, norm = name.removesuffix(".weight").rpartition(".")
        if norm in readers:
            scale = np.ones(tensors[name].shape[0], np.float32)
            scale[[len(scale) * place // 16 for place in (1, 5, 10, 13)]] = factor
            tensors[name] = Dense(tensors[name].dense() * scale)
            for reader in readers[norm]:
                weight = f"{layer}.{reader}.weight"
                tensors[weight] = Dense(tensors[weight].dense() / scale)
    return replace(source, tensors=tensors)


def _smoothing(source: Checkpoint, settings: Mapping[str, Any], seed: int, ablate: bool) -> Metrics:
    """Loss of 4-bit weights and activations on a model with outliers, over the float loss."""
    from edgewise.train.small_llama import token_ids
    from edgewise.train.zeroqat import ZeroQat, prepare

    ids = token_ids(source, settings["model"]["text"])
    parts = _parts(token_ids(source, settings["held_out"]), settings)
    exact, fmt = _held_out(_float(source), parts), QuantFormat.parse("int4/axis/fp32/int")
    made = with_outliers(source)
    found: Metrics = {}
    for smooth in (True, False) if ablate else (True,):
        config = ZeroQat(activation_bits=4, smooth=smooth, seed=seed)
        loss = _held_out(prepare(made, ids, fmt, config).net, parts)
        found["loss at W4A4 with outliers less float's" + ("" if smooth else ", without smoothing")] = loss - exact
    if ablate:
        with_, without = list(found.values())
        found["loss without smoothing less that with it"] = without - with_
    return found


def _estimator(seed: int, directions: int) -> Metrics:
    """The mean of many estimates beside the gradient, on a float layer of some 500 parameters."""
    import torch

    torch.manual_seed(seed)
    net = torch.nn.Sequential(torch.nn.Linear(16, 24), torch.nn.Tanh(), torch.nn.Linear(24, 4)).double()
    x, y = torch.randn(64, 16).double(), torch.randint(0, 4, (64,))
    point = torch.nn.utils.parameters_to_vector(net.parameters()).detach()
    gradient = torch.cat([g.flatten() for g in torch.autograd.grad(
        torch.nn.functional.cross_entropy(net(x), y), list(net.parameters()))])
    total, generator = torch.zeros_like(point), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for _ in range(directions):
            u = torch.randn(len(point), generator=generator).double()
            sides = []
            for sign in (1, -1):
                torch.nn.utils.vector_to_parameters(point + sign * 1e-4 * u, net.parameters())
                sides.append(float(torch.nn.functional.cross_entropy(net(x), y)))
            total += (sides[0] - sides[1]) / 2e-4 * u
    return {"cosine of the mean estimate to the gradient":
            float(torch.nn.functional.cosine_similarity(total, gradient, dim=0))}


def _memory(settings: Mapping[str, Any], seed: int) -> tuple[Metrics, list[tuple[Any, ...]]]:
    """Each way in a process of its own."""
    peaks = {}
    for way in WAYS:
        words = f"from edgewise.papers.zeroqat import child; child({way!r}, {dict(settings)!r}, {seed})"
        done = run_child([sys.executable, "-c", words], timeout_s=300)
        if done.returncode:
            raise EdgewiseError(f"the process that measures {way!r} ended with {done.returncode}: {done.stderr[-300:]}")
        peaks[way] = float(json.loads(done.stdout.splitlines()[-1])["peak_bytes"])
    return {"memory of light training over its forward pass": peaks["light"] / peaks["forward, light"],
            "memory of full training over the light forward pass": peaks["full"] / peaks["forward, light"],
            "memory of back-propagation over the full forward pass":
                peaks["back-propagation"] / peaks["forward, full"]}, list(peaks.items())


def child(way: str, settings: Mapping[str, Any], seed: int) -> None:
    """Print how many bytes one way takes above what the process had before the model."""
    import ctypes
    import gc

    import torch

    from edgewise.measure.memory import memory_use
    from edgewise.train.zeroqat import ZeroQat, language_loss, prepare
    from edgewise.train.zeroth_order import ZerothOrder, step

    torch.set_num_threads(1)
    part = torch.from_numpy(np.random.default_rng(seed).integers(0, 256, (settings["batch"], settings["length"])))
    before = memory_use().resident_bytes
    config = ZeroQat(trained="q v" if "light" in way else "all", start="as defined", seed=seed,
                     update=ZerothOrder(learning_rate=1e-7))
    made = prepare(random_llama(seed, hidden=settings["hidden"], layers=settings["layers"]),
                   np.arange(64), QuantFormat.parse("int4/g32/fp16/min"), config)
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")  # the peak starts anew
    if way == "back-propagation":
        weights = [linear.weight.requires_grad_() for linears in made.layers for linear in linears.values()
                   if linear.weight is not None]
        optimiser = torch.optim.AdamW(weights, lr=1e-6)
        logits = made.net(part, use_cache=False).logits
        torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), part[:, 1:].flatten()).backward()
        optimiser.step()
    else:
        loss = language_loss(part)
        with torch.no_grad():
            if way.startswith("forward"):
                loss(made.net)
            else:
                step(made.moved(), lambda: loss(made.net), config.update, seed)
    print(json.dumps({"peak_bytes": memory_use().peak_bytes - before}))


def _claims() -> tuple[Claim, ...]:
    card = "card: small-scale check"
    return (
        Claim("Forward passes alone regain half of what rounding to 2 bits loses", card,
              "share of the loss of rounding that ZeroQAT regains", 0.5, "at-least",
              why_not="Rounding loses 0.04 nats of 5.05 here, of which straight-through gradients regain 62 % and "
                      "forward passes 35 %; a step of theirs moves along one direction of all weights. We take it for "
                      "too few steps (minutes, where the paper has hours) and did not try more."),
        Claim("Straight-through gradients are the upper arm", card, "share that straight-through gradients regain", 0.5,
              "at-least"),
        Claim("Training that sees the quantiser beats training in float and rounding", card,
              "loss of training in float and then rounding less ZeroQAT's", 0.0, "order"),
        Claim("The light variant ends 10 % below training in float and rounding", card,
              "loss of light training over training in float and then rounding", 0.9, "at-most",
              why_not="Both regain 1.5 nats of what rounding to 3 bits lost, light training 0.07 more: most of the "
                      "gain is fitting the new task, which training in float does as well, and little is the grid's."),
        Claim("The light variant's loss falls", card, "fall of the light variant's loss", 0.05, "at-least"),
        Claim("Smoothing holds 4-bit weights and activations together", "ablation table",
              "loss at W4A4 with outliers less float's", 1.0, "at-most"),
        Claim("The estimate points along the gradient", card, "cosine of the mean estimate to the gradient", 0.3,
              "at-least"),
        Claim("A light step takes at most 1.2 times the memory of its forward pass", card,
              "memory of light training over its forward pass", 1.2, "at-most"),
        Claim("Back-propagation takes at least 3 times", card, "memory of back-propagation over the full forward pass",
              3.0, "at-least"),
        Claim("Noise too small for the grid teaches nothing", "ablation", "share regained with epsilon 1e-6", 0.05,
              "at-most", ablation=True),
        Claim("Noise after the quantiser teaches less", "ablation",
              "loss with noise after the quantiser less before it", 0.0, "order", ablation=True,
              why_not="Both arms differ by a tenth of what rounding loses, and seeds differ by as much."),
        Claim("Without smoothing the loss explodes", "ablation table",
              "loss without smoothing less that with it", 0.5, "at-least", ablation=True),
        Claim("Queries alone are not enough", "table of trained parts", "loss with q alone less that with q and v", 0.0,
              "order", ablation=True),
    )


RECIPE = Recipe(
    title="ZeroQAT",
    paper="arXiv:2509.00031",
    claims=_claims(),
    scales={
        "smoke": {"model": {"hidden": 32, "layers": 1, "width": 64, "vocab": 320, "context": 32, "steps": 60,
                            "batch": 8, "learning_rate": 1e-2, "text": "pydoc"},
                  "held_out": "pydoc", "other": "pydoc", "windows": 32, "length": 16, "steps": 30, "batch": 4,
                  "epsilon": 1e-2, "rate": 2e-4, "gradient_steps": 20, "gradient_rate": 1e-3, "tuning_steps": 20,
                  "tuning_rate": 1e-3, "tuning_windows": 32, "directions": 300,
                  "memory": {"hidden": 256, "layers": 4, "batch": 2, "length": 16}},
        "small": {"model": {"hidden": 64, "layers": 2, "width": 128, "vocab": 1024, "context": 64, "steps": 600,
                            "batch": 16, "learning_rate": 5e-3, "text": "wikipedia_pages/training"},
                  "held_out": "lee_background", "other": "wikipedia_pages/calibration", "windows": 128, "length": 32,
                  "steps": 1500, "batch": 16, "epsilon": 1e-2, "rate": 1e-4, "gradient_steps": 300,
                  "gradient_rate": 1e-3, "tuning_steps": 500, "tuning_rate": 1e-3, "tuning_windows": 256,
                  "directions": 2000, "memory": {"hidden": 512, "layers": 12, "batch": 4, "length": 32}, "seeds": 3},
        "paper": {"model": {"hidden": 512, "layers": 16, "heads": 8, "kv_heads": 8, "width": 1024, "vocab": 16_000,
                            "context": 128, "steps": 20_000, "batch": 32, "learning_rate": 1e-3,
                            "text": "wikipedia_pages/training"},
                  "held_out": "lee_background", "other": "wikipedia_pages/calibration", "windows": 512, "length": 128,
                  "steps": 10_000, "batch": 4, "epsilon": 1e-3, "rate": 5e-7, "gradient_steps": 10_000,
                  "gradient_rate": 1e-4, "tuning_steps": 8000, "tuning_rate": 1e-6, "tuning_windows": 1000,
                  "directions": 2000, "memory": {"hidden": 1024, "layers": 24, "batch": 16, "length": 128},
                  "seeds": 3},
    },
    sources={"model": "inferred", "held_out": "inferred", "other": "inferred", "windows": "inferred",
             "length": "inferred", "steps": "paper", "batch": "paper", "epsilon": "paper", "rate": "paper",
             "gradient_steps": "inferred", "gradient_rate": "inferred", "tuning_steps": "paper", "tuning_rate": "paper",
             "tuning_windows": "code", "directions": "inferred", "memory": "inferred"},
    run=run,
)
