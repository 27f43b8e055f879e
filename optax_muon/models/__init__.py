"""The models and the experiments with them (extra `train`): Llama, Moonlight, `optax-muon train`."""
