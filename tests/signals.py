"""For tests that interrupt a program."""

from __future__ import annotations

import signal

__all__ = ["hear_interrupts"]


def hear_interrupts() -> None:
    """preexec_fn: a program started in the background by a shell inherits that interrupts are ignored; undo that."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
