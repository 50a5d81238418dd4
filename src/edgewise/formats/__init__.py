"""Bytes to Checkpoint and back: GGUF, safetensors folders, and where models come from. Files are hostile."""

from __future__ import annotations

from edgewise.core.front_door import front_door

__all__, __getattr__ = front_door(__name__, {
    "cache": "cache_root file_sha256 files_key write_aside",
    "folder": "is_model_folder read_folder",
    "folder_writer": "write_folder",
    "gguf": "read_gguf write_gguf",
    "sources": "open_checkpoint resolve",
})
