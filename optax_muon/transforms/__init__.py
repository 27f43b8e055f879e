"""The links of the chain, each an optax transformation that can be used alone."""
