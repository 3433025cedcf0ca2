"""sdlora: train style LoRAs for Stable Diffusion, stack them, draw with them, share them."""

__version__ = "0.1.0"
