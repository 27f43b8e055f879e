"""The experiment `optax-muon train`: a Llama on real text under AdamW and Muon (extra `train`)."""
