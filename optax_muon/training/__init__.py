"""Training: one loop, its data, optimizers, checkpoints and run folders (extra `train`)."""

from optax_muon.extras import require_extra

require_extra("train", "optax_muon.training")
