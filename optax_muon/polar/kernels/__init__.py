"""Kernels for products known to be symmetric: half the tiles are computed, and written twice.

`tpu.py` and `gpu.py` hold one function each, `symmetric_product`, and `tiles.py` says how they cut
a product and what that costs. The two import Pallas, which takes a tenth of a second to a whole
one, so whoever picks a kernel imports them then.
"""
