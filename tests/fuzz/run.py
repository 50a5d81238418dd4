"""Mutated files for every reader: python tests/fuzz/run.py --count 100000 --format all --seed 0

Small valid files are damaged by flipped bits, overwritten and spliced bytes, extreme lengths and cuts. An outcome is
fine if and only if it is a result or an EdgewiseError. Anything else is printed, kept under build/fuzz and makes the
exit status 1. The file being read lies there too, so that a crash of native code leaves its cause behind.

`make fuzz` runs this with the native core under AddressSanitizer; tests/fuzz/test_run.py runs a small share without.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import tempfile
import traceback
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

# An editable installation answers before PYTHONPATH does; a core that was asked for by PYTHONPATH goes first.
if any((Path(entry) / "edgewise").is_dir() for entry in os.environ.get("PYTHONPATH", "").split(os.pathsep) if entry):
    sys.meta_path[:] = [finder for finder in sys.meta_path if "ScikitBuild" not in type(finder).__name__]

import numpy as np
from safetensors.numpy import save_file

from edgewise.core.checkpoint import Checkpoint
from edgewise.core.errors import EdgewiseError, collect_notices
from edgewise.core.numbers import QuantFormat, quantize
from edgewise.core.storage import Blocks, Dense, Factored, QuantizedTensor, Sparse, Stored
from edgewise.data.tokenizer import tokenizer_from_json, tokenizer_of
from edgewise.formats.folder import read_folder
from edgewise.formats.folder_writer import write_folder
from edgewise.formats.ggml_blocks import READ, WRITTEN, codec, encode, stored_of
from edgewise.formats.gguf import read_gguf, read_gguf_raw, write_gguf, write_gguf_raw
from edgewise.native import _core

EXTREMES = (0, 1, 7, 31, 32, 127, 255, 256, 65535, 65536, 2**31 - 1, 2**31, 2**32 - 1, 2**32, 2**53, 2**61, 2**62,
            2**63 - 1, 2**63, 2**64 - 32, 2**64 - 1)
WORDS = (b"{", b"}", b"[", b"]", b'"', b",", b":", b"-1", b"1e999", b"NaN", b"null", b"true", b"[[[[[[[[", b'"\\ud800"',
         b"99999999999999999999", b"\xff", b"\x00", b"../")
TEXT = "Hello, wörld 123 <|end|> \U0001f600\n"


def mutate(data: bytes, rng: np.random.Generator) -> bytes:
    """One to four damages, most of them in the first kilobyte, where counts and lengths are."""
    raw = bytearray(data)
    for _ in range(int(rng.integers(1, 5))):
        if not raw:
            break
        at = int(rng.integers(0, len(raw) if rng.random() < 0.3 else min(len(raw), 1024)))
        damage = int(rng.integers(0, 7))
        if damage == 0:
            raw[at] ^= 1 << int(rng.integers(0, 8))
        elif damage == 1:
            raw[at] = int(rng.integers(0, 256))
        elif damage == 2:
            width = int(rng.choice([1, 2, 4, 8]))
            value = EXTREMES[int(rng.integers(0, len(EXTREMES)))] % (1 << (8 * width))
            raw[at:at + width] = value.to_bytes(width, "little")
        elif damage == 3:
            source, length = int(rng.integers(0, len(raw))), int(rng.integers(1, 64))
            raw[at:at + length] = raw[source:source + length]
        elif damage == 4:
            del raw[at:at + int(rng.integers(1, 64))]
        elif damage == 5:
            raw[at:at] = WORDS[int(rng.integers(0, len(WORDS)))]
        elif rng.random() < 0.3:
            del raw[at:]
    return bytes(raw)


def tiny_llama(kind: str = "F32") -> Checkpoint:
    """One layer of 32 values, with a byte-level tokenizer of the 256 bytes."""
    rng = np.random.default_rng(0)
    layer = "model.layers.0"
    names = {"model.embed_tokens": (264, 32), "model.norm": (32,), f"{layer}.input_layernorm": (32,),
             f"{layer}.post_attention_layernorm": (32,),
             **{f"{layer}.self_attn.{p}_proj": (32, 32) for p in "qkvo"},
             **{f"{layer}.mlp.{p}_proj": (32, 32) for p in ("gate", "up", "down")}}
    tensors: dict[str, Stored] = {}
    for name, shape in names.items():
        value = rng.standard_normal(shape).astype(np.float32)
        tensors[f"{name}.weight"] = encode(value, kind) if len(shape) > 1 else Dense(value)
    config = {"model_type": "llama", "num_hidden_layers": 1, "hidden_size": 32, "intermediate_size": 32,
              "num_attention_heads": 2, "num_key_value_heads": 2, "vocab_size": 264,
              "hidden_act": "silu", "rms_norm_eps": 1e-5, "rope_theta": 1e4, "max_position_embeddings": 64,
              "tie_word_embeddings": True}
    return Checkpoint("llama", config, tensors, {"tokenizer": tiny_tokenizer(), "generation": {"eos_token_id": 2}})


def tiny_tokenizer() -> bytes:
    """A byte-level BPE tokenizer.json with two merges and one special token."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate([*alphabet, "he", "hel"])}
    tokenizer = Tokenizer(models.BPE(vocabulary, [("h", "e"), ("he", "l")]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|end|>"])
    return str(tokenizer.to_str()).encode()


@dataclass
class Target:
    """seeds: valid contents. damaged: which file of `place` takes them. read: what is tried; its result is used up."""

    seeds: list[bytes]
    damaged: list[Path]
    read: Callable[[], Any]


def use(checkpoint: Checkpoint) -> None:
    """Touch everything that a checkpoint holds."""
    for name in checkpoint.tensors:
        with np.errstate(all="ignore"):
            checkpoint.tensors[name].dense()
    if "tokenizer" in checkpoint.metadata:
        tokenizer_of(checkpoint).encode(TEXT)


def gguf_target(place: Path) -> Target:
    path = place / "model.gguf"
    seeds = []
    for kind in ("F32", "Q4_1", "Q8_0"):
        write_gguf(tiny_llama(kind), path)
        seeds.append(path.read_bytes())
    tensors = {}
    for name in READ:
        if name not in WRITTEN:
            form = codec(name)
            tensors[name] = (name, stored_of(name, np.ones((2, form.block_nbytes), np.uint8), (2, form.block)))
    keys = {"general.architecture": "x", "a": 1, "b": ["x", "yy"], "c": np.ones(4, np.float32), "d": True, "e": -1.5}
    write_gguf_raw(path, keys, tensors)
    seeds.append(path.read_bytes())

    def read() -> None:
        try:
            use(read_gguf(path))
        finally:
            keys, stored = read_gguf_raw(path)
            for name in keys:
                keys[name]
            for tensor in stored.values():
                assert isinstance(tensor, Blocks | Dense)
                tensor.dense()

    return Target(seeds, [path] * len(seeds), read)


def safetensors_target(place: Path) -> Target:
    folder = place / "folder"
    write_folder(tiny_llama(), folder)
    names = ["model.safetensors", "model.safetensors", "config.json"]
    seeds = [(folder / name).read_bytes() for name in names]
    return Target(seeds, [folder / name for name in names], lambda: use(read_folder(folder)))


def storage_target(place: Path) -> Target:
    """A folder with each of our storage forms; its configuration describes them."""
    folder, rng = place / "folder", np.random.default_rng(0)

    def quantized(text: str, shape: tuple[int, int]) -> QuantizedTensor:
        fmt = QuantFormat.parse(text)
        codes, scales, zero = quantize(rng.standard_normal(shape).astype(np.float32), fmt)
        return QuantizedTensor(codes, scales, fmt, zeros=zero if fmt.zero == "int" else None,
                               minima=zero if fmt.zero == "min" else None)

    tensors: dict[str, Stored] = {
        "min": quantized("int4/g32/fp16/min", (3, 70)), "int": quantized("int3/g10/bf16/int", (3, 20)),
        "mx": quantized("fp4/g32/e8m0", (2, 64)), "blocks": encode(np.ones((2, 32), np.float32), "Q4_1"),
        "factored": Factored(quantized("int8/axis/fp16", (4, 2)), Dense(np.ones((2, 6), np.float32))),
        "n_m": Sparse("n_m", np.array([[0, 2, 1, 3]], np.uint8), Dense(np.ones((1, 4), np.float32)), (1, 8), (2, 4)),
        "csr": Sparse("csr", np.array([1, 0], np.int32), Dense(np.ones((1, 2), np.float32)), (2, 3),
                      row_starts=np.array([0, 1, 2], np.int32))}
    write_folder(Checkpoint("llama", {"model_type": "llama"}, tensors), folder)
    names = ["model.safetensors", "config.json", "config.json"]
    seeds = [(folder / name).read_bytes() for name in names]
    seeds[1:] = [json.dumps(json.loads(seed)).encode() for seed in seeds[1:]]  # shorter, so more of it is damaged
    return Target(seeds, [folder / name for name in names], lambda: use(read_folder(folder)))


def foreign_target(place: Path) -> Target:
    """Folders as GPTQ and AWQ tools write them, and one of compressed-tensors."""
    rng, folders = np.random.default_rng(0), []
    words = {"qweight": (8, 16), "qzeros": (2, 2), "g_idx": (64,)}
    for method in ("gptq", "awq"):
        shapes = words if method == "gptq" else {"qweight": (64, 2), "qzeros": (2, 2)}
        parts = {f"l.{name}": rng.integers(0, 2, shape).astype(np.int32) for name, shape in shapes.items()}
        folders.append(place / method)
        folders[-1].mkdir()
        save_file({**parts, "l.scales": np.ones((2, 16), np.float16)}, folders[-1] / "model.safetensors")
        (folders[-1] / "config.json").write_text(json.dumps({"model_type": "llama", "quantization_config": {
            "quant_method": method, "bits": 4, "group_size": 32}}))
    tensors: dict[str, Stored] = {}
    for text in ("int4/g32/fp16", "int3/g32/bf16/int", "e4m3/axis/fp32", "int8/tensor/fp16"):
        fmt = QuantFormat.parse(text)
        codes, scales, zero = quantize(rng.standard_normal((4, 64)).astype(np.float32), fmt)
        tensors[f"{text[:4]}.weight"] = QuantizedTensor(codes, scales, fmt, zeros=zero if fmt.zero == "int" else None)
    folders.append(place / "compressed")
    write_folder(Checkpoint("llama", {"model_type": "llama"}, tensors), folders[-1], layout="compressed-tensors")
    paths = [folder / name for folder in folders for name in ("model.safetensors", "config.json")]

    def read() -> None:
        failed: BaseException | None = None
        for folder in folders:  # only one of them is damaged
            try:
                use(read_folder(folder))
            except EdgewiseError as error:
                failed = error
        if failed is not None:
            raise failed

    return Target([path.read_bytes() for path in paths], paths, read)


def tokenizer_target(place: Path) -> Target:
    path = place / "tokenizer.json"
    seed = json.dumps(json.loads(tiny_tokenizer()), ensure_ascii=False).encode()
    path.write_bytes(seed)
    return Target([seed], [path], lambda: tokenizer_from_json(path.read_bytes()).encode(TEXT))


TARGETS: dict[str, Callable[[Path], Target]] = {
    "gguf": gguf_target, "safetensors": safetensors_target, "storage": storage_target,
    "foreign": foreign_target,
    "tokenizer": tokenizer_target}


@dataclass
class Outcome:
    """counts: by "read" or the name of an error. failures: number of the case and what it raised."""

    counts: Counter[str] = field(default_factory=Counter)
    failures: list[tuple[int, BaseException]] = field(default_factory=list)


def fuzz(name: str, count: int, seed: int, place: Path, keep: Path | None = None) -> Outcome:
    """Read `count` mutated files of one format. keep: where those that fail are copied to."""
    with collect_notices():
        target = TARGETS[name](place)
    outcome = Outcome()
    for case in range(count):
        rng = np.random.default_rng([seed, case])
        which = case % len(target.seeds)
        damaged = mutate(target.seeds[which], rng)
        target.damaged[which].write_bytes(damaged)
        try:
            with collect_notices():
                target.read()
            outcome.counts["read"] += 1
        except EdgewiseError as error:
            outcome.counts[type(error).__name__] += 1
        except KeyboardInterrupt:
            raise
        except BaseException as error:
            outcome.counts["FAILED"] += 1
            outcome.failures.append((case, error))
            if keep is not None:
                (keep / f"{name}-{seed}-{case}.bin").write_bytes(damaged)
        target.damaged[which].write_bytes(target.seeds[which])
    return outcome


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=100_000, help="mutations per format")
    parser.add_argument("--format", choices=[*TARGETS, "all"], default="all")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    if "libasan" in os.environ.get("LD_PRELOAD", "") and b"__asan_" not in Path(_core.__file__).read_bytes():
        print(f"the native core in use, {_core.__file__}, was built without AddressSanitizer", file=sys.stderr)
        return 2
    keep = Path("build/fuzz")
    keep.mkdir(parents=True, exist_ok=True)
    failed = False
    for name in TARGETS if arguments.format == "all" else [arguments.format]:
        place = Path(tempfile.mkdtemp(prefix=f"{name}-", dir=keep))
        outcome = fuzz(name, arguments.count, arguments.seed, place, keep)
        shutil.rmtree(place)
        print(f"{name}: {arguments.count} mutations, seed {arguments.seed}: "
              + ", ".join(f"{key} {value}" for key, value in outcome.counts.most_common()), flush=True)
        for case, error in outcome.failures[:3]:
            print(f"  case {case}, kept as {keep}/{name}-{arguments.seed}-{case}.bin:")
            print("    " + "    ".join(traceback.format_exception(error)[-4:]))
        failed |= bool(outcome.failures)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
