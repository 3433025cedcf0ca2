"""The adapter that is trained: which layers it has, how it gets into a base, and how it leaves it."""

from sdlora.lora.attach import LiveAdapter, lora_pairs, trainable_parameters
from sdlora.lora.plan import AdapterPlan, LayerPlan, base_models, plan_adapter, plan_layers
from sdlora.lora.rank_mask import RankMask, active_ranks
from sdlora.lora.targets import PRESETS, target_modules, target_patterns

__all__ = [
    "PRESETS",
    "AdapterPlan",
    "LayerPlan",
    "LiveAdapter",
    "RankMask",
    "active_ranks",
    "base_models",
    "lora_pairs",
    "plan_adapter",
    "plan_layers",
    "target_modules",
    "target_patterns",
    "trainable_parameters",
]
