"""One file per model family: a Checkpoint becomes a Plan."""
