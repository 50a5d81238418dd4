"""Our models in torch: a folder or Checkpoint as the class that transformers has for it; small nets for pictures."""

from __future__ import annotations

from typing import Any

from edgewise.core.errors import require
from edgewise.core.front_door import front_door

__all__, _opened = front_door(__name__, {
    "convnets": "ResNet Stack",
    "efficientnet_lite": "EfficientNetLite efficientnet_lite0",
    "image_folder": "read_image_net write_image_net",
    "loader": "checkpoint_of load",
    "short_encoder": "ShortEncoder ThinPair",
    "static": "install layers_of",
    "vision_transformer": "VisionTransformer",
})


def __getattr__(name: str) -> Any:
    if name in __all__:
        needed = ("torch", "transformers") if name in ("checkpoint_of", "load", "install", "layers_of") else ("torch",)
        for module in needed:
            require(module, extra="torch", purpose=f"edgewise.models.{name}")
    return _opened(name)
