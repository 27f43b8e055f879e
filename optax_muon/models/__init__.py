"""The models (extra `train`): Llama and Moonlight, their training, the commands of `optax-muon`."""
