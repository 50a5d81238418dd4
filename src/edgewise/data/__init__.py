"""Texts, tokenizers and pictures: offline defaults, local files."""
