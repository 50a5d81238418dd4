"""Texts and tokenizers: offline defaults, local files."""
