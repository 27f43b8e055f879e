"""The models and what one does with them (extra `train`): Llama, Moonlight, `optax-muon train`."""
