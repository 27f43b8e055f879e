"""Laws of views: matrices out and back, against NumPy slices written out by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from optax_muon.matrices.views import Block, Split, View

# name: (shape, view, expected blocks)
CASES = {
    "kernel": ((6, 4), View(0, 1), [(1, 6, 4)]),
    "kernel stored (out, in)": ((6, 4), View(1, 0), [(1, 4, 6)]),
    "scanned kernel": ((3, 6, 4), View(1, 2), [(3, 6, 4)]),
    "scanned along the second axis": ((6, 3, 4), View(0, 2), [(3, 6, 4)]),
    "experts of scanned layers": ((3, 5, 6, 4), View(-2, -1), [(15, 6, 4)]),
    "convolution HWIO": ((3, 2, 4, 5), View((0, 1, 2), 3), [(1, 24, 5)]),
    "convolution OIHW": ((5, 4, 3, 2), View((1, 2, 3), 0), [(1, 24, 5)]),
    "into heads": ((6, 2, 4), View(0, (1, 2)), [(1, 6, 8)]),
    "out of heads": ((2, 4, 6), View((0, 1), 2), [(1, 8, 6)]),
    "every head on its own": ((6, 2, 4), View(0, 2), [(2, 6, 4)]),
    "axes in another order": ((2, 3, 4, 5), View((2, 0), (3, 1)), [(1, 8, 15)]),
    "grouped queries": (
        (6, 12),
        View(0, 1, Split(1, (8, 2, 2))),
        [(1, 6, 8), (1, 6, 2), (1, 6, 2)],
    ),
    "grouped queries per head": (
        (6, 12),
        View(0, 1, Split(1, (8, 2, 2), heads=(4, 1, 1))),
        [(4, 6, 2), (1, 6, 2), (1, 6, 2)],
    ),
    "scanned, split, per head": (
        (3, 6, 12),
        View(1, 2, Split(-1, (8, 2, 2), heads=(4, 1, 1))),
        [(12, 6, 2), (3, 6, 2), (3, 6, 2)],
    ),
    "interleaved groups": (
        (6, 24),
        View(0, 1, Split(1, (8, 2, 2), groups=2)),
        [(1, 6, 16), (1, 6, 4), (1, 6, 4)],
    ),
    "interleaved groups per head": (
        (6, 24),
        View(0, 1, Split(1, (8, 2, 2), heads=(8, 2, 2), groups=2)),
        [(8, 6, 2), (2, 6, 2), (2, 6, 2)],
    ),
    "gate and up": ((6, 8), View(0, 1, Split.equal(1, 8, parts=2)), [(2, 6, 4)]),
    "split of rows": ((12, 6), View(0, 1, Split(0, (8, 4), heads=(2, 1))), [(2, 4, 6), (1, 4, 6)]),
    "split of one of several columns": (
        (6, 12, 3),
        View(0, (1, 2), Split(1, (8, 4))),
        [(1, 6, 24), (1, 6, 12)],
    ),
}


@pytest.fixture(params=CASES.values(), ids=CASES.keys())
def case(request):
    return request.param


def _entries(shape):
    return np.arange(np.prod(shape), dtype=np.float32).reshape(shape)


def _there(bound, x):
    return jax.jit(bound.to_matrices)(x)


def _back(bound, matrices):
    return jax.jit(bound.from_matrices)(matrices)


def test_blocks_are_the_expected_stacks(case):
    shape, view, blocks = case
    assert [block.shape for block in view.bind(shape).blocks] == blocks


def test_from_matrices_undoes_to_matrices(case):
    shape, view, blocks = case
    bound, x = view.bind(shape), _entries(shape)
    matrices = _there(bound, x)
    assert [matrix.shape for matrix in matrices] == blocks
    np.testing.assert_array_equal(_back(bound, matrices), x)


def test_to_matrices_undoes_from_matrices(case):
    shape, view, blocks = case
    bound = view.bind(shape)
    matrices = [_entries(block) + 1000 * i for i, block in enumerate(blocks)]
    there = _there(bound, _back(bound, matrices))
    for found, matrix in zip(there, matrices, strict=True):
        np.testing.assert_array_equal(found, matrix)


def test_matrices_keep_the_dtype(case):
    shape, view, _ = case
    bound = view.bind(shape)
    x = jax.ShapeDtypeStruct(shape, jnp.bfloat16)
    matrices = jax.eval_shape(bound.to_matrices, x)
    assert {matrix.dtype for matrix in matrices} == {jnp.dtype(jnp.bfloat16)}
    assert jax.eval_shape(bound.from_matrices, matrices) == x


def test_a_factor_per_block_spreads_over_the_entries_of_that_block(case):
    shape, view, blocks = case
    bound = view.bind(shape)
    factors = [float(i + 2) for i in range(len(blocks))]
    scaled = np.ones(shape, np.float32) * bound.spread(factors)
    for factor, matrix in zip(factors, _there(bound, scaled), strict=True):
        np.testing.assert_array_equal(matrix, np.full(matrix.shape, factor))


def test_equal_factors_stay_one_number():
    bound = View(0, 1, Split(1, (8, 2, 2))).bind((6, 12))
    assert bound.spread([0.5, 0.5, 0.5]) == 0.5


@pytest.mark.parametrize("seed", range(16))
def test_any_view_of_any_shape_comes_back(seed):
    rng = np.random.default_rng(seed)
    rank = int(rng.integers(2, 6))
    axes = rng.permutation(rank)
    n_rows = int(rng.integers(1, rank))
    n_cols = int(rng.integers(1, rank - n_rows + 1))
    sizes, groups = rng.integers(1, 4, size=3), int(rng.integers(1, 3))
    heads = [int(rng.choice([h for h in (1, 2, 3) if size * groups % h == 0])) for size in sizes]
    fused = int(axes[rng.integers(n_rows + n_cols)])
    shape = [int(size) for size in rng.integers(1, 4, size=rank)]
    shape[fused] = int(sizes.sum()) * groups
    split = Split(fused, tuple(int(size) for size in sizes), tuple(heads), groups)
    view = View(axes[:n_rows], axes[n_rows : n_rows + n_cols], split)
    bound, x = view.bind(shape), _entries(shape)
    matrices = _there(bound, x)
    assert sum(matrix.size for matrix in matrices) == x.size
    np.testing.assert_array_equal(_back(bound, matrices), x)


def test_a_convolution_is_read_as_its_rows_written_out():
    x = _entries((3, 2, 4, 5))
    (matrix,) = _there(View((0, 1, 2), 3).bind(x.shape), x)
    written_out = [x[h, w, i] for h in range(3) for w in range(2) for i in range(4)]
    np.testing.assert_array_equal(matrix[0], np.stack(written_out))


def test_parts_of_a_fused_axis_are_its_slices_and_heads_are_batch():
    x = _entries((6, 12))
    split = Split.qkv(1, heads=4, kv_heads=1, head_dim=2, per_head=True)
    q, k, v = _there(View(0, 1, split).bind(x.shape), x)
    np.testing.assert_array_equal(q, np.stack([x[:, 2 * h : 2 * h + 2] for h in range(4)]))
    np.testing.assert_array_equal(k[0], x[:, 8:10])
    np.testing.assert_array_equal(v[0], x[:, 10:12])


def test_a_part_of_interleaved_groups_gathers_the_groups():
    x = _entries((6, 24))
    q, k, v = _there(View(0, 1, Split(1, (8, 2, 2), groups=2)).bind(x.shape), x)
    np.testing.assert_array_equal(q[0], np.concatenate([x[:, 0:8], x[:, 12:20]], axis=1))
    np.testing.assert_array_equal(k[0], np.concatenate([x[:, 8:10], x[:, 20:22]], axis=1))
    np.testing.assert_array_equal(v[0], np.concatenate([x[:, 10:12], x[:, 22:24]], axis=1))


def test_negative_axes_count_from_the_end():
    assert View(-2, -1).bind((3, 6, 4)).blocks == (Block(3, 6, 4),)
    assert View(-2, -1).bind((3, 6, 4)).batch_axes == (0,)


def test_views_are_equal_by_value_and_hashable():
    assert View([0], (1,)) == View(0, np.int64(1))
    assert len({View(0, 1), View((0,), (1,)), View(1, 0)}) == 2


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: View((), 1), "at least one axis for rows and one for columns"),
        (lambda: View(0, 2).bind((3, 4)), r"names axis 2, which the shape \(3, 4\) does not have"),
        (lambda: View(0, -2).bind((3, 4)), r"uses an axis of the shape \(3, 4\) twice"),
        (lambda: View(1, 2, Split(0, (3,))).bind((3, 4, 5)), "splits axis 0, which is none of its"),
        (lambda: View(0, 1, Split(1, (3, 4))).bind((2, 8)), "axis 1 of the shape .* has 8"),
        (lambda: Split(1, (4, 4), heads=(1,)), "2 sizes .* 1 head counts"),
        (lambda: Split(1, (4, 0)), "must be positive"),
        (lambda: Split(1, ()), "must be positive"),
        (lambda: Split(1, (4,), groups=0), "must be positive"),
        (lambda: Split(1, (4, 5), heads=(2, 2)), "part of 5 entries does not divide into 2 heads"),
    ],
)
def test_what_does_not_fit_is_refused_with_its_numbers(make, message):
    with pytest.raises(ValueError, match=message):
        make()
