"""Training data: token files and prompt-completion pairs."""
