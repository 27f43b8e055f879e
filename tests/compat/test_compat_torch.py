"""A run of torch's Muon, Keller Jordan's or Moonlight's toy goes on as one of `optax_muon.muon`."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from optax_muon import View, compat, muon
from optax_muon.compat.torch_state import to_in_out
from optax_muon.polar import newton_schulz

torch = pytest.importorskip("torch")

SHAPES = {"embedding": (12, 6), "scale": (6,), "square/kernel": (6, 6), "up/kernel": (6, 10)}
"""Ours, `[in, out]`."""
MATRICES = ["square/kernel", "up/kernel"]
VIEWS = {path: View(0, 1) if path in MATRICES else None for path in SHAPES}
# float32 on both sides; an error of one eps (6e-8) in a small singular value grows by the slope of
# five steps, 3.4445^5 = 485, to 3e-5 of the largest entry, as in test_compat.py.
CLOSE = 3e-5
STEPS, MORE = 6, 3


def random(seed):
    rng = np.random.default_rng(seed)
    return {path: rng.standard_normal(shape).astype(np.float32) for path, shape in SHAPES.items()}


class Toy(torch.optim.Optimizer):
    """The part of Moonlight's toy_train.py that moves matrices, in float32: momentum as a sum."""

    def __init__(self, params, lr, weight_decay, momentum, nesterov):
        super().__init__(params, dict(lr=lr, wd=weight_decay, mu=momentum, nesterov=nesterov))

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for p in group["params"]:
                buffer = self.state[p].setdefault("momentum_buffer", torch.zeros_like(p))
                buffer.mul_(group["mu"]).add_(p.grad)
                g = p.grad.add(buffer, alpha=group["mu"]) if group["nesterov"] else buffer
                u = torch.optim._muon._zeropower_via_newtonschulz(g, (3.4445, -4.775, 2.0315), 5, 0)
                p.mul_(1 - group["lr"] * group["wd"])
                p.add_(u, alpha=-group["lr"] * 0.2 * max(p.shape) ** 0.5)


class ToyAdamW(torch.optim.Optimizer):
    """The part of toy_train.py that moves the others, under its own names."""

    def __init__(self, params, lr, weight_decay, betas, eps):
        super().__init__(params, dict(lr=lr, wd=weight_decay, betas=betas, eps=eps))

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for p in group["params"]:
                state, (beta1, beta2) = self.state[p], group["betas"]
                state["step"] = step = state.get("step", 0) + 1
                buf1 = state.setdefault("moment1", torch.zeros_like(p))
                buf2 = state.setdefault("moment2", torch.zeros_like(p))
                buf1.lerp_(p.grad, 1 - beta1)
                buf2.lerp_(p.grad.square(), 1 - beta2)
                scale = (1 - beta1**step) / (1 - beta2**step) ** 0.5
                p.mul_(1 - group["lr"] * group["wd"])
                p.add_(buf1 / (group["eps"] + buf2.sqrt()), alpha=-group["lr"] / scale)


def moonlight(matrices, others, nesterov):
    yield Toy(matrices, lr=0.02, weight_decay=0.1, momentum=0.9, nesterov=nesterov)
    yield ToyAdamW(others, lr=0.02, weight_decay=0.1, betas=(0.9, 0.95), eps=1e-8)


def torchs_own(matrices, others, nesterov):
    shared = {"lr": 0.02, "weight_decay": 0.1}
    yield torch.optim.Muon(
        matrices, momentum=0.9, nesterov=nesterov, adjust_lr_fn="match_rms_adamw", **shared
    )
    yield torch.optim.AdamW(others, betas=(0.9, 0.95), eps=1e-8, **shared)


FORMS = {torchs_own: compat.MomentumForm.average(0.9), moonlight: compat.MomentumForm.sum()}


class Peer:
    """A torch run, its tensors by our paths."""

    def __init__(self, optimizers, nesterov=True):
        self.weights = {
            path: torch.nn.Parameter(torch.tensor(to_in_out(path, array).copy()))
            for path, array in random(100).items()
        }
        groups = (
            [w for path, w in self.weights.items() if (path in MATRICES) == m] for m in (1, 0)
        )
        self.optimizers = list(optimizers(*groups, nesterov))

    def step(self, seed):
        gradient = random(seed)
        for path, weight in self.weights.items():
            weight.grad = torch.tensor(to_in_out(path, gradient[path]).copy())
        for optimizer in self.optimizers:
            optimizer.step()

    @property
    def params(self):
        """Ours."""
        return {
            path: to_in_out(path, weight.detach().numpy()).copy()
            for path, weight in self.weights.items()
        }

    @property
    def state(self):
        """What a user collects."""
        return {
            path: optimizer.state[weight]
            for path, weight in self.weights.items()
            for optimizer in self.optimizers
            if weight in optimizer.state
        }


def ours(nesterov=True, **options):
    polar = functools.partial(newton_schulz, dtype=jnp.float32)
    views = {"views": VIEWS} | options
    return muon(0.02, beta=0.9, nesterov=nesterov, orthogonalizer=polar, **views)


@pytest.fixture
def run(monkeypatch):
    """A torch run of some steps. Its Newton-Schulz in float32 instead of bfloat16, in a copy."""
    monkeypatch.setattr(torch.Tensor, "bfloat16", lambda x: x.float().clone())

    def run(optimizers, nesterov=True):
        peer = Peer(optimizers, nesterov)
        for seed in range(STEPS):
            peer.step(seed)
        return peer

    return run


@pytest.mark.parametrize("nesterov", [True, False])
@pytest.mark.parametrize("optimizers", FORMS, ids=lambda function: function.__name__)
def test_the_run_goes_on_with_torchs_next_steps(optimizers, nesterov, run):
    peer, tx = run(optimizers, nesterov), ours(nesterov)
    params = jax.tree.map(jnp.asarray, peer.params)
    state = compat.from_torch(peer.state, tx, params, form=FORMS[optimizers], count=STEPS)
    update = jax.jit(tx.update)
    for seed in range(STEPS, STEPS + MORE):
        before = peer.params
        peer.step(seed)
        updates, state = update(random(seed), state, params)
        params = optax.apply_updates(params, updates)
        for path, after in peer.params.items():
            theirs = after - before[path]
            # Weights of order 1 are stored to 6e-8, so their difference is known no better.
            scale = CLOSE * np.abs(theirs).max() + 1.2e-7 * np.abs(after).max()
            np.testing.assert_allclose(updates[path], theirs, rtol=0, atol=scale, err_msg=path)


@pytest.mark.parametrize("optimizers", FORMS, ids=lambda function: function.__name__)
def test_the_wrong_form_is_a_wrong_run(optimizers, run):
    """The two forms weigh the next gradient differently, by a factor of ten here."""
    peer, tx = run(optimizers), ours()
    params = jax.tree.map(jnp.asarray, peer.params)
    found = []
    for form in FORMS.values():
        state = compat.from_torch(peer.state, tx, params, form=form, count=STEPS)
        found.append(jax.jit(tx.update)(random(STEPS), state, params)[0]["up/kernel"])
    cosine = np.vdot(*found) / np.prod([np.linalg.norm(x) for x in found])
    assert cosine < 0.95


def test_the_loaded_state_is_one_of_the_new_optimizer(run):
    peer, tx = run(torchs_own), ours(mu_dtype=jnp.bfloat16)
    params = peer.params
    loaded = compat.from_torch(
        peer.state, tx, params, form=compat.MomentumForm.average(0.9), count=STEPS
    )
    fresh = tx.init(params)
    chex.assert_trees_all_equal_shapes_and_dtypes(loaded, fresh)
    counts = [int(count) for _, count in optax.tree.get_all_with_path(loaded, "count")]
    assert set(counts) == {STEPS}


def refused(message, peer, tx=None, **changes):
    given = {"state": peer.state, "params": peer.params, "count": STEPS} | changes
    with pytest.raises(ValueError, match=message):
        compat.from_torch(
            given.pop("state"),
            tx or ours(),
            given.pop("params"),
            form=compat.MomentumForm.average(0.9),
            **given,
        )


def test_what_does_not_fit_is_refused_by_path(run):
    peer = run(torchs_own)
    refused(
        "up/kernel is in the Adam group and torch's state has momentum_buffer for it, not exp",
        peer,
        ours(views=VIEWS | {"up/kernel": None}),
    )
    refused(
        "embedding is in the Muon group and torch's state has step, exp_avg, exp_avg_sq for",
        peer,
        ours(views=VIEWS | {"embedding": View(0, 1)}),
    )
    without = {path: buffers for path, buffers in peer.state.items() if path != "scale"}
    refused("scale is in the Adam group and torch's state has nothing for", peer, state=without)
    refused(
        r"up/kernel: momentum_buffer is \[10, 6\] after transposing and must be \[6, 10\]; pass",
        peer,
        transpose=lambda path, array: array,
    )
    refused("embedding has done 6 steps in torch and count is 7", peer, count=7)
    refused(
        "momentum_buffer for 'head', and the new optimizer keeps nothing of that path",
        peer,
        state=peer.state | {"head": {"momentum_buffer": np.ones(2)}},
    )


def test_a_function_may_transpose_what_the_default_cannot(run):
    """A convolution: torch has OIHW, flax HWIO."""
    params = {"conv": {"kernel": jnp.ones((3, 2, 4, 8))}}
    buffer = np.random.default_rng(0).standard_normal((8, 4, 3, 2))
    state = compat.from_torch(
        {"conv/kernel": {"momentum_buffer": buffer}},
        muon(0.1, views={"conv/kernel": View((0, 1, 2), 3)}),
        params,
        form=compat.MomentumForm.sum(),
        count=1,
        transpose=lambda path, array: array.transpose(2, 3, 1, 0),
    )
    momentum = optax.tree.get(state, "MomentumState").mu["conv"]["kernel"]
    np.testing.assert_array_equal(momentum, buffer.astype(np.float32).transpose(2, 3, 1, 0))
