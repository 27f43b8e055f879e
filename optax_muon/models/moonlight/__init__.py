"""Moonlight, the 3B/16B mixture-of-experts decoder (arXiv 2502.16982)."""

from optax_muon.models.moonlight.attention import HIGH_LOGIT
from optax_muon.models.moonlight.config import CONFIGS, MoonlightConfig
from optax_muon.models.moonlight.decoder import MoonlightDecoder
from optax_muon.models.moonlight.model import SPEC, Counts, Moonlight, count
from optax_muon.models.moonlight.muon import attentions, per_head_views

__all__ = [
    "CONFIGS",
    "HIGH_LOGIT",
    "SPEC",
    "Counts",
    "Moonlight",
    "MoonlightConfig",
    "MoonlightDecoder",
    "attentions",
    "count",
    "per_head_views",
]
