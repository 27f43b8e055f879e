"""The console script `optax-muon`, and what its commands print, draw and write."""
