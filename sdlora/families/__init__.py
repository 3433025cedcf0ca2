"""The supported base models. Whatever differs between SD 1.x, SD 2.x and SDXL is answered here and nowhere else."""

from sdlora.families.base import Components, FamilyName, ModelFamily, PromptEmbeds
from sdlora.families.fingerprint import weights_fingerprint
from sdlora.families.load import (
    components_from_pipeline,
    detect_family,
    load_components,
    load_pipeline,
    resolve_base,
)

__all__ = [
    "Components",
    "FamilyName",
    "ModelFamily",
    "PromptEmbeds",
    "components_from_pipeline",
    "detect_family",
    "load_components",
    "load_pipeline",
    "resolve_base",
    "weights_fingerprint",
]
