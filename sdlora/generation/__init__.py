"""Pictures from prompts: noise per picture, schedulers by their usual names, the recipe of every picture."""

from sdlora.generation.drawing import StepDrawn, initial_noise
from sdlora.generation.generator import GeneratedPicture, Generator
from sdlora.generation.memory import Thrift
from sdlora.generation.start_image import pixel_hash

__all__ = ["GeneratedPicture", "Generator", "StepDrawn", "Thrift", "initial_noise", "pixel_hash"]
