"""Muon for JAX: one optax chain, from a laptop to a pod."""

__version__ = "0.1.0"
