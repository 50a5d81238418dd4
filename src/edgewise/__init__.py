"""edgewise makes a model fit a device, adapts it there, runs it there, and proves it.

    from edgewise import load

    model = load("smollm2")
    for piece in model.stream("What is a leaf?"):
        print(piece, end="")

Importing this package imports no room: each public name is loaded when it is first used.
"""

from __future__ import annotations

from edgewise.core.front_door import front_door

__version__ = "0.1.0"
_names, __getattr__ = front_door(__name__, {"engine": "load"})
__all__ = ["__version__", *_names]
