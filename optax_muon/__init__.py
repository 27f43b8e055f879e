"""Muon for JAX: one optax chain, from a laptop to a pod.

`muon` is the optimizer of "Muon is Scalable for LLM Training" (Moonshot AI, arXiv 2502.16982), with
AdamW for the parameters that are not matrices:

>>> import jax.numpy as jnp, optax, optax_muon
>>> params = {"embed": jnp.ones((16, 4)), "dense": {"kernel": jnp.ones((4, 8))}}
>>> tx = optax_muon.muon(3e-4)                     # the learning rate that you would give AdamW
>>> state = tx.init(params)
>>> updates, state = tx.update(params, state, params)
>>> params = optax.apply_updates(params, updates)

`print(label(params))` shows which parameters it takes for matrices, and `print(plan(params))` where
it works on them. The links of its chain (`orthogonalize`, `scale_by_shape`, `cautious_decay`,
`normuon` ...) and the functions on matrices (`newton_schulz` ...) can be used alone. `checkpoint`
saves states and refuses to restore what does not fit; `compat.muon` is `optax.contrib.muon` on this
engine.
"""

from optax_muon import checkpoint, compat
from optax_muon.checkpoint import state_shardings, zero1_shardings
from optax_muon.matrices.assign import Rule, assign, label
from optax_muon.matrices.paths import named_leaves
from optax_muon.matrices.views import Split, View
from optax_muon.muon import muon, scale_by_muon
from optax_muon.planning import plan
from optax_muon.polar import (
    CUBIC,
    DEEPSEEK_V4,
    KELLER,
    POLAR_EXPRESS,
    POLAR_EXPRESS_8,
    YOU,
    Coefficients,
    gram_newton_schulz,
    measures,
    newton_schulz,
    polar_express,
    polar_svd,
)
from optax_muon.transforms.decay import cautious_decay, decoupled_decay
from optax_muon.transforms.momentum import scale_by_momentum
from optax_muon.transforms.normuon import normuon
from optax_muon.transforms.orthogonalize import orthogonalize
from optax_muon.transforms.qk_clip import MHA, MLA, Heads, qk_clip
from optax_muon.transforms.scale import (
    baseline,
    keller,
    match_rms,
    scale_by_shape,
    scale_by_update_norm,
    spectral,
)

__version__ = "0.1.0"

__all__ = [
    "CUBIC",
    "DEEPSEEK_V4",
    "KELLER",
    "MHA",
    "MLA",
    "POLAR_EXPRESS",
    "POLAR_EXPRESS_8",
    "YOU",
    "Coefficients",
    "Heads",
    "Rule",
    "Split",
    "View",
    "__version__",
    "assign",
    "baseline",
    "cautious_decay",
    "checkpoint",
    "compat",
    "decoupled_decay",
    "gram_newton_schulz",
    "keller",
    "label",
    "match_rms",
    "measures",
    "muon",
    "named_leaves",
    "newton_schulz",
    "normuon",
    "orthogonalize",
    "plan",
    "polar_express",
    "polar_svd",
    "qk_clip",
    "scale_by_momentum",
    "scale_by_muon",
    "scale_by_shape",
    "scale_by_update_norm",
    "spectral",
    "state_shardings",
    "zero1_shardings",
]
