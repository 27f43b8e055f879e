"""`muon` is the paper's optimizer: its equations, torch's implementation, its Lemma 1."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import reference

from optax_muon.matrices.views import Split, View
from optax_muon.muon import muon, scale_by_muon
from optax_muon.polar import newton_schulz, polar_svd
from optax_muon.transforms.decay import cautious_decay
from optax_muon.transforms.scale import keller_scale, match_rms, scale_by_update_norm

SHAPES = {
    "conv/kernel": (3, 3, 4, 10),
    "embed/embedding": (32, 12),
    "norm/scale": (12,),
    "square/kernel": (12, 12),
    "stacked/kernel": (3, 8, 16),
    "tall/kernel": (24, 8),
    "wide/kernel": (8, 24),
}
MATRICES = {
    "conv/kernel": ((0, 1, 2), (3,)),
    "square/kernel": ((0,), (1,)),
    "stacked/kernel": ((1,), (2,)),
    "tall/kernel": ((0,), (1,)),
    "wide/kernel": ((0,), (1,)),
}
VIEWS = {path: View(*MATRICES[path]) if path in MATRICES else None for path in SHAPES}
FEW = {path: SHAPES[path] for path in ("norm/scale", "tall/kernel", "wide/kernel")}


def matrices_of(shapes):
    return {path: axes for path, axes in MATRICES.items() if path in shapes}


def views_of(shapes):
    return {path: VIEWS[path] for path in shapes}


def gaussian(seed, shapes=SHAPES, scale=1.0):
    rng = np.random.default_rng(seed)
    return {p: (scale * rng.normal(size=s)).astype(np.float32) for p, s in shapes.items()}


def gradients(steps, shapes=SHAPES):
    """Gradients that share a direction, as those of training do, and differ in size and noise."""
    common = gaussian(99, shapes)
    noise = (gaussian(seed, shapes) for seed in range(steps))
    return [{p: (i % 3 + 1) * (common[p] + n[p]) for p in n} for i, n in enumerate(noise)]


@functools.cache
def compiled(tx):
    """One step of training; runs that share an optimizer share its program."""

    @jax.jit
    def step(params, state, gradient):
        updates, state = tx.update(gradient, state, params)
        return optax.apply_updates(params, updates), state

    return step


def trained(tx, params, steps):
    """The parameters after every step."""
    params = jax.tree.map(jnp.asarray, params)
    state = tx.init(params)
    for gradient in steps:
        params, state = compiled(tx)(params, state, gradient)
        yield params


def updated(tx, gradient, params=None):
    """The first updates."""
    params = gradient if params is None else params
    return jax.jit(tx.update)(gradient, tx.init(params), params)[0]


def in_lockstep(tx, params, steps, truth):
    """Hold the parameters to the truth's at every step, where the truth has them."""
    for found, expected in zip(trained(tx, params, steps), truth, strict=True):
        assert_same(found, expected)
    return found


def assert_same(params, truth, tolerance=1e-5):
    """Relative to the norm of each parameter."""
    for path, expected in truth.items():
        error = np.linalg.norm(np.asarray(params[path], np.float64) - expected)
        assert error <= tolerance * np.linalg.norm(expected), path


# Float32 against float64. An entry of the Newton-Schulz output is off by some 1e-6; thirty updates
# of up to 0.02 * 0.2 of the parameters' size bring at most a tenth of that into the parameters.
@pytest.mark.parametrize("nesterov", [True, False])
def test_thirty_steps_are_the_papers_equations(nesterov):
    params, steps = gaussian(0, scale=0.1), gradients(30)
    truth = reference.train(params, steps, MATRICES, lr=0.02, nesterov=nesterov)
    tx = muon(0.02, nesterov=nesterov, views=VIEWS)
    in_lockstep(tx, params, steps, truth)


def test_without_views_roles_decide_as_written_out():
    shapes = {path: shape for path, shape in SHAPES.items() if path != "stacked/kernel"}
    gradient = gaussian(0, shapes)
    # The factor tells rows from columns, the sign is cheap.
    options = {"orthogonalizer": jnp.sign, "scale": keller_scale()}
    by_role = updated(muon(0.02, **options), gradient)
    by_hand = updated(muon(0.02, **options, views=views_of(shapes)), gradient)
    chex.assert_trees_all_equal(by_role, by_hand)


def test_rate_momentum_and_decay_follow_schedules():
    lr = optax.linear_schedule(0.0, 0.05, 5)
    beta = optax.linear_schedule(0.8, 0.95, 6)
    decay = optax.linear_schedule(0.5, 0.1, 7)
    params, steps = gaussian(0, FEW, 0.1), gradients(8, FEW)
    truth = reference.train(params, steps, matrices_of(FEW), lr=lr, beta=beta, decay=decay)
    tx = muon(lr, beta=beta, weight_decay=decay, views=views_of(FEW))
    in_lockstep(tx, params, steps, truth)


def test_decay_takes_the_plain_learning_rate_not_the_factor_of_the_shape():
    params = {"kernel": jnp.ones((4, 400))}
    tx = muon(0.1, weight_decay=0.5, views=View(0, 1))
    (found,) = trained(tx, params, [{"kernel": np.zeros((4, 400), np.float32)}])
    np.testing.assert_allclose(found["kernel"], 1 - 0.1 * 0.5, rtol=1e-6)


def no_decay_of_vectors(params):
    return jax.tree.map(lambda p: p.ndim > 1, params)


@pytest.mark.parametrize(
    ("mask", "decayed"),
    [
        ({path: path != "tall/kernel" for path in FEW}, lambda path: path != "tall/kernel"),
        ({"": True, "norm/scale": False}, lambda path: path != "norm/scale"),
        (False, lambda path: False),
        (no_decay_of_vectors, lambda path: path != "norm/scale"),
    ],
    ids=["tree", "all but one", "one for all", "callable"],
)
def test_weight_decay_mask_chooses_what_decays(mask, decayed):
    params, zeros = gaussian(0, FEW), {p: np.zeros(shape, np.float32) for p, shape in FEW.items()}
    options = {"weight_decay": 0.5, "orthogonalizer": jnp.sign, "views": views_of(FEW)}
    truth = reference.train(params, [zeros], matrices_of(FEW), lr=0.1, decay=0.5, decayed=decayed)
    in_lockstep(muon(0.1, weight_decay_mask=mask, **options), params, [zeros], truth)


def test_weight_decay_mask_may_be_a_prefix_of_nested_parameters():
    params = {
        "block": {"kernel": jnp.ones((4, 4)), "bias": jnp.ones(3)},
        "kernel": jnp.ones((4, 4)),
    }
    mask = {"block": False, "kernel": True}
    tx = muon(0.1, weight_decay=0.5, weight_decay_mask=mask, orthogonalizer=jnp.sign)
    (found,) = trained(tx, params, [jax.tree.map(jnp.zeros_like, params)])
    np.testing.assert_array_equal(found["block"]["kernel"], 1.0)
    np.testing.assert_array_equal(found["block"]["bias"], 1.0)
    np.testing.assert_allclose(found["kernel"], 0.95, rtol=1e-6)


def test_weight_decay_may_be_a_link():
    params, steps = gaussian(0, FEW, 0.1), gradients(6, FEW)
    truth = reference.train(params, steps, matrices_of(FEW), lr=0.05, decay=0.5, cautious=True)
    tx = muon(0.05, weight_decay=cautious_decay(0.5), views=views_of(FEW))
    in_lockstep(tx, params, steps, truth)


def test_the_fallback_is_any_optimizer_with_its_own_learning_rate():
    params, steps = gaussian(0, FEW, 0.1), gradients(3, FEW)
    truth = reference.train(params, steps, matrices_of(FEW), lr=0.02)
    tx = muon(0.02, fallback=optax.sgd(0.5), views=views_of(FEW))
    found = in_lockstep(
        tx, params, steps, ({p: step[p] for p in matrices_of(FEW)} for step in truth)
    )
    total = sum(gradient["norm/scale"].astype(np.float64) for gradient in steps)
    np.testing.assert_allclose(
        found["norm/scale"], params["norm/scale"] - 0.5 * total, rtol=1e-5, atol=1e-6
    )


def test_scale_by_muon_is_the_update_without_decay_and_learning_rate():
    params, steps = gaussian(0, FEW), gradients(2, FEW)
    bare = optax.chain(scale_by_muon(views=views_of(FEW)), optax.scale_by_learning_rate(0.02))
    whole = muon(0.02, weight_decay=0.0, views=views_of(FEW))
    in_lockstep(bare, params, steps, only_matrices(trained(whole, params, steps)))


# torch iterates in bfloat16: its update leaves float32's by about 1 % of the norm, a cosine of
# 1 - 0.01^2 / 2 and a length within 2 %.
@pytest.mark.parametrize("nesterov", [True, False])
def test_every_update_points_where_torchs_does(nesterov):
    torch = pytest.importorskip("torch")
    shapes = {"square": (32, 32), "tall": (48, 16), "wide": (16, 48)}
    params, steps = gaussian(0, shapes), gradients(5, shapes)
    weights = {path: torch.nn.Parameter(torch.tensor(p.T)) for path, p in params.items()}
    peer = torch.optim.Muon(
        weights.values(),
        lr=0.05,
        weight_decay=0.1,
        momentum=0.95,
        nesterov=nesterov,
        adjust_lr_fn="match_rms_adamw",
    )
    before = params
    tx = muon(0.05, nesterov=nesterov, views=View(0, 1))
    for gradient, after in zip(steps, trained(tx, params, steps), strict=True):
        for path, weight in weights.items():
            weight.grad = torch.tensor(gradient[path].T.copy())
        old = {path: weight.detach().numpy().T.copy() for path, weight in weights.items()}
        peer.step()
        for path, weight in weights.items():
            ours = np.asarray(after[path]) - before[path]
            theirs = weight.detach().numpy().T - old[path]
            lengths = np.linalg.norm(ours), np.linalg.norm(theirs)
            assert np.vdot(ours, theirs) >= 0.999 * lengths[0] * lengths[1], path
            np.testing.assert_allclose(*lengths, rtol=0.02, err_msg=path)
        before = jax.tree.map(np.asarray, after)


# KELLER ends in a band around 1. Over a spread spectrum that averages to 0.86 or more of the
# nominal RMS; the spectrum of a very flat matrix is a point, which may land anywhere in the band.
@pytest.mark.parametrize(
    ("shape", "low", "high"),
    [
        ((64, 64), 0.17, 0.21),
        ((64, 256), 0.17, 0.21),
        ((256, 64), 0.17, 0.21),
        ((3, 96, 128), 0.17, 0.21),
        ((8, 512), 0.2 * 0.682, 0.2 * 1.134),
        ((512, 16), 0.2 * 0.682, 0.2 * 1.134),
    ],
)
def test_updates_have_the_rms_of_adamw(shape, low, high):
    tx = muon(1.0, weight_decay=0.0, views=View(-2, -1))
    assert low <= reference.rms(updated(tx, gaussian(0, {"kernel": shape}))["kernel"]) <= high


@pytest.mark.parametrize("shape", [(12, 30), (30, 12)])
@pytest.mark.parametrize("rank", [1, 5, 12])
def test_an_update_of_lower_rank_is_smaller_as_lemma_1_says(shape, rank):
    rng = np.random.default_rng(rank)
    low = rng.normal(size=(shape[0], rank)) @ rng.normal(size=(rank, shape[1]))
    gradient = {"kernel": low.astype(np.float32)}
    tx = muon(1.0, weight_decay=0.0, orthogonalizer=polar_svd, views=View(0, 1))
    update = updated(tx, gradient)
    expected = 0.2 * (rank / min(shape)) ** 0.5
    assert reference.rms(update["kernel"]) == pytest.approx(expected, rel=1e-4)


def test_without_the_factor_lemma_1_is_literal():
    rng = np.random.default_rng(0)
    low = rng.normal(size=(12, 5)) @ rng.normal(size=(5, 30))
    tx = scale_by_muon(orthogonalizer=polar_svd, scale=lambda m, n: 1.0, views=View(0, 1))
    update = updated(tx, {"kernel": low.astype(np.float32)})["kernel"]
    assert reference.rms(update) == pytest.approx((5 / (12 * 30)) ** 0.5, rel=1e-4)


def test_scale_may_be_a_rule_or_a_link():
    gradient = gaussian(0, {"kernel": (8, 32)})
    options = {"weight_decay": 0.0, "orthogonalizer": jnp.sign, "views": View(0, 1)}
    links = [None, match_rms(0.1), keller_scale(), scale_by_update_norm(0.3)]
    for scale, expected in zip(links, [0.2 * 32**0.5, 0.1 * 32**0.5, 2.0, 0.3], strict=True):
        found = updated(muon(1.0, scale=scale, **options), gradient)["kernel"]
        np.testing.assert_allclose(found, -expected * np.sign(gradient["kernel"]), rtol=1e-6)


def test_the_orthogonalizer_is_any_function_of_stacks():
    gradient = gaussian(0, FEW)
    tx = muon(1.0, weight_decay=0.0, orthogonalizer=jnp.sign, views=views_of(FEW))
    expected = -0.2 * 24**0.5 * np.sign(gradient["wide/kernel"])
    np.testing.assert_allclose(updated(tx, gradient)["wide/kernel"], expected, rtol=1e-6)


def test_the_orthogonalizers_options_are_set_by_partial():
    gradient = gaussian(0, FEW)
    ten = functools.partial(newton_schulz, steps=10)
    tx = muon(1.0, weight_decay=0.0, orthogonalizer=ten, views=views_of(FEW))
    settled = reference.newton_schulz(gradient["wide/kernel"].astype(np.float64), steps=10)
    expected = -0.2 * 24**0.5 * settled
    # KELLER does not settle: it goes round its band, and magnifies rounding twofold at every step.
    np.testing.assert_allclose(updated(tx, gradient)["wide/kernel"], expected, atol=1e-3)


def only_matrices(run):
    return ({path: np.asarray(params[path]) for path in matrices_of(params)} for params in run)


WITH_FEW = muon(0.1, views=views_of(FEW))


@pytest.mark.parametrize("factor", [1e-20, 1e-6, 1e20])
def test_the_size_of_the_gradients_does_not_matter_to_matrices(factor):
    params, steps = gaussian(0, FEW), gradients(3, FEW)
    scaled = [{p: (g * np.float32(factor)) for p, g in step.items()} for step in steps]
    in_lockstep(WITH_FEW, params, scaled, only_matrices(trained(WITH_FEW, params, steps)))


def test_clipping_the_gradients_norm_does_not_matter_to_matrices():
    # One norm, so one factor: momentum would weigh steps that are clipped by several differently.
    steps = [gaussian(0, FEW)] * 3
    clipped = optax.chain(optax.clip_by_global_norm(1e-3), WITH_FEW)
    params = gaussian(1, FEW)
    in_lockstep(clipped, params, steps, only_matrices(trained(WITH_FEW, params, steps)))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_a_zero_gradient_moves_nothing(dtype):
    zeros = {path: jnp.zeros(shape, dtype) for path, shape in FEW.items()}
    tx = muon(1.0, weight_decay=0.0, views=views_of(FEW))
    for found in trained(tx, zeros, [zeros, zeros]):
        for path, update in found.items():
            np.testing.assert_array_equal(update.astype("float32"), 0.0, err_msg=path)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_updates_of_narrow_parameters_are_rounded_once(dtype):
    params, gradient = (
        jax.tree.map(lambda x: jnp.asarray(x, dtype), gaussian(s, FEW)) for s in (0, 1)
    )
    found = updated(muon(0.02, views=views_of(FEW)), gradient, params)
    [after] = reference.train(params, [gradient], matrices_of(FEW), lr=0.02)
    for path, expected in after.items():
        update = expected - np.asarray(params[path], np.float64)
        half_a_digit = float(jnp.finfo(dtype).eps) / 2
        np.testing.assert_allclose(
            np.asarray(found[path], np.float64), update, rtol=1.01 * half_a_digit, atol=2e-7
        )


def test_a_zero_matrix_in_a_stack_does_not_disturb_the_others():
    gradient = gaussian(0, {"kernel": (3, 8, 16)})["kernel"]
    gradient[1] = 0.0
    tx = muon(1.0, weight_decay=0.0, views=View(1, 2))
    update = updated(tx, gradient)
    expected = reference.each_matrix(gradient, (1,), (2,), reference.newton_schulz)
    np.testing.assert_allclose(update, -0.2 * 4.0 * expected, atol=1e-5)


def test_fused_projections_train_as_if_they_were_apart():
    shapes = {"q": (8, 12), "k": (8, 6), "v": (8, 6), "gate": (8, 12), "up": (8, 12)}
    params, steps = gaussian(0, shapes, 0.1), gradients(4, shapes)

    def fuse(tree):
        qkv = jnp.concatenate([tree["q"], tree["k"], tree["v"]], 1)
        return {"qkv": qkv, "gate_up": jnp.concatenate([tree["gate"], tree["up"]], 1)}

    views = {
        "qkv": View(0, 1, Split(1, (12, 6, 6))),
        "gate_up": View(0, 1, Split.equal(1, 24, parts=2)),
    }
    apart = trained(muon(0.05, views=View(0, 1)), params, steps)
    fused = trained(muon(0.05, views=views), fuse(params), map(fuse, steps))
    for expected, found in zip(apart, fused, strict=True):
        assert_same(found, jax.tree.map(np.asarray, fuse(expected)), 1e-6)


def test_heads_train_as_if_they_were_apart():
    shapes = {f"head{i}": (8, 4) for i in range(5)}
    params, steps = gaussian(0, shapes, 0.1), gradients(4, shapes)

    def fuse(tree):
        return {"qkv": jnp.concatenate([tree[path] for path in shapes], 1)}

    split = Split.qkv(1, heads=3, kv_heads=1, head_dim=4, per_head=True)
    apart = trained(muon(0.05, views=View(0, 1)), params, steps)
    fused = trained(muon(0.05, views=View(0, 1, split)), fuse(params), map(fuse, steps))
    for expected, found in zip(apart, fused, strict=True):
        assert_same(found, jax.tree.map(np.asarray, fuse(expected)), 1e-6)


def test_layers_stacked_along_a_middle_axis_train_as_if_they_were_apart():
    shapes = {f"layer{i}": (8, 12) for i in range(3)}
    params, steps = gaussian(0, shapes, 0.1), gradients(4, shapes)

    def stack(tree):
        return {"kernel": jnp.stack([tree[path] for path in shapes], 1)}

    apart = trained(muon(0.05, views=View(0, 1)), params, steps)
    stacked = trained(muon(0.05, views=View(0, 2)), stack(params), map(stack, steps))
    for expected, found in zip(apart, stacked, strict=True):
        assert_same(found, jax.tree.map(np.asarray, stack(expected)), 1e-6)


def test_muon_solves_an_ill_conditioned_matrix_problem():
    """`min ||A W - B||` with singular values of A from 1 to 0.01: condition 10^4 in W."""
    rng = np.random.default_rng(0)
    left, _ = np.linalg.qr(rng.normal(size=(24, 24)))
    right, _ = np.linalg.qr(rng.normal(size=(24, 24)))
    a = jnp.asarray(left * np.geomspace(1.0, 0.01, 24) @ right, jnp.float32)
    target = jnp.asarray(rng.normal(size=(24, 16)), jnp.float32)
    b = a @ target

    def loss(params):
        return jnp.sum(jnp.square(a @ params["kernel"] - b))

    tx = muon(optax.linear_schedule(0.1, 0.0, 500), weight_decay=0.0, views=View(0, 1))
    params = {"kernel": jnp.zeros((24, 16))}

    def step(carry, _):
        params, state = carry
        updates, state = tx.update(jax.grad(loss)(params), state, params)
        return (optax.apply_updates(params, updates), state), None

    (params, _), _ = jax.jit(lambda c: jax.lax.scan(step, c, None, 500))((params, tx.init(params)))
    assert loss(params) < 1e-5 * loss({"kernel": jnp.zeros((24, 16))})
    assert reference.rms(params["kernel"] - target) < 0.05
