"""Training: text, loop, run, folder, checkpoints, sweeps, and what a model then writes."""
