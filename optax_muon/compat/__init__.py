"""Coming from `optax.contrib.muon`: the same optimizer on this engine, and a way to the paper's.

`muon` and `scale_by_muon` (`contrib.py`) are drop-in: only the import changes. `from_optax`
(`loading.py`) turns a state of either into a state of `optax_muon.muon`.
"""

from optax_muon.compat.contrib import muon, scale_by_muon
from optax_muon.compat.loading import from_optax

__all__ = ["from_optax", "muon", "scale_by_muon"]
