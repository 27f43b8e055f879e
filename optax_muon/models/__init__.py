"""Llama and Moonlight in Flax, and their Hugging Face checkpoints (extra `models`)."""

from optax_muon.extras import require_extra

require_extra("models", "optax_muon.models")
