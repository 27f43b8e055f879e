"""The work of an evaluation on one device, counted before anything is traced."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Work:
    """Work on one matrix [m, n] whose columns lie on some number of devices."""

    flops: int
    """Operations of the products, a multiply-add counted as two."""
    operands: int = 0
    """Numbers that the products read, and results that they write."""
    passes: int = 0
    """Numbers that everything between the products writes."""
    transposed: int = 0
    """Numbers of operands that a product of full matrices a b^H turns first."""
    sums: int = 0
    """Gram matrices [m, m] summed over the devices in float32."""
    gathers: int = 0
    """Matrices [m, m] that the devices compute by rows each, gathered in the compute dtype."""
    form: str = ""
    """Name of the form, as plans print it."""

    def __add__(self, other: "Work") -> "Work":
        """Add the operations and numbers of two parts of an evaluation; messages are not theirs."""
        return Work(
            self.flops + other.flops,
            self.operands + other.operands,
            self.passes + other.passes,
            self.transposed + other.transposed,
        )

    def __mul__(self, times: int) -> "Work":
        """Repeat a part of an evaluation."""
        return Work(
            self.flops * times,
            self.operands * times,
            self.passes * times,
            self.transposed * times,
        )
