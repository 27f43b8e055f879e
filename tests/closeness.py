"""Trees of arrays that agree up to the rounding of sums."""

import chex
import jax
import numpy as np


def assert_trees_close_to_largest(found, expected, part, *, rtol=0.0):
    """Hold every leaf to its truth, up to a part of that leaf's largest entry.

    The error of a sum is relative to its terms, not to what remains of them: an entry that cancels
    to nearly zero is as far off as the largest one.
    """
    chex.assert_trees_all_equal_structs(found, expected)
    truths = jax.tree_util.tree_leaves_with_path(expected)
    for leaf, (path, truth) in zip(jax.tree.leaves(found), truths, strict=True):
        leaf, truth = (np.asarray(x, np.promote_types(x.dtype, np.float32)) for x in (leaf, truth))
        atol = part * np.abs(truth).max(initial=0)
        name = jax.tree_util.keystr(path)
        np.testing.assert_allclose(leaf, truth, rtol=rtol, atol=atol, err_msg=name)
