"""Other trainers' recipes in our words: kohya's TOML, OneTrainer's JSON, the header of a LoRA file."""

from sdlora.recipes.read import read_recipe_file
from sdlora.recipes.translate import Foreign, Translated, translate

__all__ = ["Foreign", "Translated", "read_recipe_file", "translate"]
