"""Run language models and encoders natively, from a Checkpoint to tokens."""
