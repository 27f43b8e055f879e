"""Moving over from another Muon: `optax.contrib.muon` on this engine, and states of others.

`muon` and `scale_by_muon` (`contrib.py`) are drop-in for optax's: only the import changes.
`from_optax` (`optax_state.py`) converts a state of either into a state of `optax_muon.muon`,
`from_torch` (`torch_state.py`) one of `torch.optim.Muon`, of Keller Jordan's Muon or of
Moonlight's toy_train. `optax_muon.compat.keras` (`keras.py`, extra `keras`) is a module of its own:
any optax chain as a Keras optimizer.
"""

from optax_muon.compat.contrib import muon, scale_by_muon
from optax_muon.compat.optax_state import from_optax
from optax_muon.compat.torch_state import MomentumForm, from_torch

__all__ = ["MomentumForm", "from_optax", "from_torch", "muon", "scale_by_muon"]
