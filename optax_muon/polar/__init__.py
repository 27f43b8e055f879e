"""Pure mathematics on matrices [..., m, n]: the orthogonal polar factor and its measures.

`newton_schulz` is the iteration of Muon, `gram_newton_schulz` the same polynomial for elongated
matrices, `polar_svd` the exact factor. Tables of coefficients are data with their sources. Nothing
in this room knows of parameters, meshes or optimizers.
"""

from optax_muon.polar.coefficients import (
    COEFFICIENTS,
    CUBIC,
    DEEPSEEK_V4,
    KELLER,
    POLAR_EXPRESS,
    POLAR_EXPRESS_8,
    YOU,
    YOU_6,
    Coefficients,
    Row,
    polar_express,
)
from optax_muon.polar.exact import polar_svd
from optax_muon.polar.gram import SPANS, Gram, default_restarts
from optax_muon.polar.measures import orthogonality_error, stable_rank, svd_entropy, update_rms
from optax_muon.polar.newton_schulz import (
    GramNewtonSchulz,
    NewtonSchulz,
    gram_newton_schulz,
    newton_schulz,
)
from optax_muon.polar.plain import Plain
from optax_muon.polar.selection import Form, choose_form
from optax_muon.polar.symmetric import AsStored, Barrier, Full, Kernel, Panels

__all__ = [
    "COEFFICIENTS",
    "CUBIC",
    "DEEPSEEK_V4",
    "KELLER",
    "POLAR_EXPRESS",
    "POLAR_EXPRESS_8",
    "SPANS",
    "YOU",
    "YOU_6",
    "AsStored",
    "Barrier",
    "Coefficients",
    "Form",
    "Full",
    "Gram",
    "GramNewtonSchulz",
    "Kernel",
    "NewtonSchulz",
    "Panels",
    "Plain",
    "Row",
    "choose_form",
    "default_restarts",
    "gram_newton_schulz",
    "newton_schulz",
    "orthogonality_error",
    "polar_express",
    "polar_svd",
    "stable_rank",
    "svd_entropy",
    "update_rms",
]
