"""The work of an evaluation on one device, counted before anything is traced."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Work:
    """Work on one matrix [m, n] whose columns lie on some number of devices."""

    flops: int
    """Operations of the products, a multiply-add counted as two."""
    sums: int = 0
    """Gram matrices [m, m] summed over the devices in float32."""
    gathers: int = 0
    """Matrices [m, m] that the devices compute by rows each, gathered in the compute dtype."""
    form: str = ""
    """Name of the form, as plans print it."""
