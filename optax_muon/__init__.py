"""Muon for JAX: one optax chain, from a laptop to a pod.

`muon` is the optimizer of "Muon is Scalable for LLM Training" (Moonshot AI, arXiv 2502.16982), with
AdamW for the parameters that are not matrices:

>>> import jax.numpy as jnp, optax, optax_muon
>>> params = {"embed": jnp.ones((16, 4)), "dense": {"kernel": jnp.ones((4, 8))}}
>>> tx = optax_muon.muon(3e-4)                     # the learning rate that you would give AdamW
>>> state = tx.init(params)
>>> updates, state = tx.update(params, state, params)
>>> params = optax.apply_updates(params, updates)

`print(label(params))` shows which parameters it treats as matrices, and `print(plan(params))` on
which devices each one is processed. The links of its chain (`orthogonalize`, `scale_by_shape`,
`cautious_decay`, `normuon` ...) and the functions on matrices (`newton_schulz` ...) can be used
alone. `checkpoint` saves states and refuses to restore what does not fit. `compat.muon` is
`optax.contrib.muon`, drop-in. `compiler_options` are those under which communication overlaps with
matmuls, and `hlo` counts collectives, bytes and operations of a compiled program.
"""

from optax_muon import checkpoint, compat, hlo
from optax_muon.checkpoint import state_shardings, zero1_shardings
from optax_muon.compilers import compiler_options
from optax_muon.matrices.assign import MATRICES, Rule, Stacked, label
from optax_muon.matrices.paths import named_leaves
from optax_muon.matrices.views import Split, View, Views
from optax_muon.muon import muon, scale_by_muon
from optax_muon.planning import plan
from optax_muon.polar import (
    COEFFICIENTS,
    CUBIC,
    DEEPSEEK_V4,
    KELLER,
    POLAR_EXPRESS,
    POLAR_EXPRESS_8,
    YOU,
    Coefficients,
    Gram,
    GramNewtonSchulz,
    NewtonSchulz,
    Plain,
    gram_newton_schulz,
    measures,
    newton_schulz,
    polar_express,
    polar_svd,
)
from optax_muon.sharding.assignment import Assignment
from optax_muon.sharding.bucket_plan import BucketPlan
from optax_muon.sharding.cost import CostModel
from optax_muon.sharding.mesh import Shardings
from optax_muon.sharding.plan import Plan
from optax_muon.sharding.planner import LAYOUTS
from optax_muon.transforms.decay import Mask, cautious_decay, decoupled_decay
from optax_muon.transforms.momentum import scale_by_momentum
from optax_muon.transforms.normuon import normuon
from optax_muon.transforms.orthogonalize import orthogonalize
from optax_muon.transforms.qk_clip import MHA, MLA, Heads, qk_clip
from optax_muon.transforms.scale import (
    ScaleRule,
    keller_scale,
    match_rms,
    scale_by_shape,
    scale_by_update_norm,
    spectral_scale,
)

__version__ = "0.2.0"

__all__ = [
    "COEFFICIENTS",
    "CUBIC",
    "DEEPSEEK_V4",
    "KELLER",
    "LAYOUTS",
    "MATRICES",
    "MHA",
    "MLA",
    "POLAR_EXPRESS",
    "POLAR_EXPRESS_8",
    "YOU",
    "Assignment",
    "BucketPlan",
    "Coefficients",
    "CostModel",
    "Gram",
    "GramNewtonSchulz",
    "Heads",
    "Mask",
    "NewtonSchulz",
    "Plain",
    "Plan",
    "Rule",
    "ScaleRule",
    "Shardings",
    "Split",
    "Stacked",
    "View",
    "Views",
    "__version__",
    "cautious_decay",
    "checkpoint",
    "compat",
    "compiler_options",
    "decoupled_decay",
    "gram_newton_schulz",
    "hlo",
    "keller_scale",
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
    "spectral_scale",
    "state_shardings",
    "zero1_shardings",
]
