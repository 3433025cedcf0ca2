"""The supported base models. Whatever differs between SD 1.x, SD 2.x and SDXL is answered here and nowhere else."""

from sdlora.families.base import Components, FamilyName, ModelFamily, PromptEmbeds, embed_texts
from sdlora.families.fingerprint import weights_fingerprint
from sdlora.families.load import (
    components_from_pipeline,
    detect_family,
    load_components,
    load_pipeline,
    local_base,
    pipeline_of,
    resolve_base,
)
from sdlora.families.shapes import BaseShapes, base_shapes

__all__ = [
    "BaseShapes",
    "Components",
    "FamilyName",
    "ModelFamily",
    "PromptEmbeds",
    "base_shapes",
    "components_from_pipeline",
    "detect_family",
    "embed_texts",
    "load_components",
    "load_pipeline",
    "local_base",
    "pipeline_of",
    "resolve_base",
    "weights_fingerprint",
]
