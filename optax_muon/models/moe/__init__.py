"""The mixture of experts: router, experts, load balance."""

from optax_muon.models.moe.balance import gate_scaling, imbalance, update_bias
from optax_muon.models.moe.experts import Experts
from optax_muon.models.moe.grouped_matmul import grouped_dot
from optax_muon.models.moe.router import Router, Routing

__all__ = [
    "Experts",
    "Router",
    "Routing",
    "gate_scaling",
    "grouped_dot",
    "imbalance",
    "update_bias",
]
