"""Did the style arrive? Distances between sets of pictures that need no downloaded network."""

from .classifier import StyleClassifier, nearest_style
from .distance import measure_distances, style_distance
from .features import MEASURES, StyleFeatures, pool_features, style_features
from .gap import squared_measures, squared_style_distance, style_gap_closed
from .pictures import rgb_to_lab
from .subjects import subject_ranks, subject_topk

__all__ = [
    "MEASURES",
    "StyleClassifier",
    "StyleFeatures",
    "measure_distances",
    "nearest_style",
    "pool_features",
    "rgb_to_lab",
    "squared_measures",
    "squared_style_distance",
    "style_distance",
    "style_features",
    "style_gap_closed",
    "subject_ranks",
    "subject_topk",
]
