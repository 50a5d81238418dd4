"""Bytes to Checkpoint and back: GGUF, safetensors folders, and where models come from. Files are hostile."""
