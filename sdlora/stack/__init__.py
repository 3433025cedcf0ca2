"""Several LoRA files on one pipeline, each with a weight, and the base untouched."""

from sdlora.stack.stack import AdapterStack, Mode

__all__ = ["AdapterStack", "Mode"]
