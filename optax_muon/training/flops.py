"""The floating-point operations of a step: the model's and the optimizer's.

A multiply-add counts as two. The model takes 6 per token and parameter that the token is multiplied
by (2 forward, 4 backward; Kaplan et al., arXiv 2001.08361, section 2.1); of the experts only those
that it goes to. Attention scores are another `6 t` per token and feature of all heads' queries and
values (Chowdhery et al., PaLM, arXiv 2204.02311, appendix B: `12 t width` per layer where both have
`width` features). Embedding look-ups and AdamW's dozen operations per parameter are left out: with
the 2048 tokens of a `small` step, about a thousandth. Work that the backward pass repeats to save
memory is not counted.

The operations of an update come from the optimizer's row (`OptimizerSpec.step_flops`).
`utilization` divides by the peak of the devices (`optax_muon.platforms`).
"""

from __future__ import annotations

import functools

import jax
import optax

from optax_muon.models import spec
from optax_muon.platforms import peak_flops
from optax_muon.training.config import TrainConfig
from optax_muon.training.devices import Devices
from optax_muon.training.optimizers import Trial, views


def run_flops(config: TrainConfig, trial: Trial, params: optax.Params, steps: float = 1.0) -> float:
    """Operations of the first steps of a run, model and optimizer; the last may be a part of one.

    Args:
        config: What all trials share.
        trial: The optimizer.
        params: Arrays or `ShapeDtypeStruct`s.
        steps: Number of steps.
    """
    optimizer = trial.spec.step_flops(params, views(config))
    return config.sequences(steps) * sequence_flops(config) + steps * optimizer


@functools.cache  # it counts parameters, 0.13 s for 16B, and progress asks for it at every step
def sequence_flops(config: TrainConfig) -> int:
    """Operations of one sequence's forward and backward pass."""
    model, context = spec.model(config.model), config.model.context
    return context * 6 * (model.active + context * model.attended)


def utilization(config: TrainConfig, speed: float, devices: Devices) -> float | None:
    """Model FLOP utilization, MFU (arXiv 2204.02311, appendix B): the share of the devices' peak.

    It counts the model's operations alone, not the optimizer's, nor what is computed again to save
    memory. The peak is that of products in bfloat16, whatever the dtype of these.

    Args:
        config: What all trials share.
        speed: Tokens per second.
        devices: Where they are trained.

    Returns:
        The share; None where the peak is not known, as on CPUs.
    """
    peak = peak_flops(jax.devices()[0].device_kind)
    if peak is None:
        return None
    return speed * sequence_flops(config) / config.model.context / (peak * devices.count)
