"""efficap: any timm EfficientNet, joined to any GPT-2 by cross-attention, trained to caption pictures."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from efficap.commands.captioner import Captioner as Captioner

__all__ = ["Captioner"]


def __getattr__(name: str) -> Any:
    if name == "Captioner":  # only when it is asked for: torch and the hub's client take seconds to load
        from efficap.commands.captioner import Captioner

        return Captioner
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
