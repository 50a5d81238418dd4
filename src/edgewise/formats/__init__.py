"""Bytes to Checkpoint and back: GGUF, safetensors folders, and where models come from. Files are hostile."""

from __future__ import annotations

from importlib import import_module
from typing import Any

_HOME = {
    "cache_root": "cache",
    "file_sha256": "cache",
    "files_key": "cache",
    "write_aside": "cache",
    "is_model_folder": "folder",
    "read_folder": "folder",
    "write_folder": "folder",
    "read_gguf": "gguf",
    "write_gguf": "gguf",
    "open_checkpoint": "sources",
    "resolve": "sources",
}
__all__ = [
    "cache_root", "file_sha256", "files_key", "is_model_folder", "open_checkpoint", "read_folder", "read_gguf",
    "resolve", "write_aside", "write_folder", "write_gguf",
]


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(import_module(f"edgewise.formats.{_HOME[name]}"), name)
    raise AttributeError(f"module 'edgewise.formats' has no attribute {name!r}")
