"""Arguments with an entry for every parameter: trees, prefixes, dicts, functions; what is wrong."""

import functools

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
import pytest

from optax_muon.matrices.entries import broadcast

PARAMS = {"up": {"kernel": jnp.ones(2), "bias": jnp.ones(2)}, "norm": {"scale": jnp.ones(2)}}
EXPECTED = {"norm/scale": False, "up/bias": False, "up/kernel": True}


def mask(argument, tree=PARAMS):
    return broadcast(
        "mask", argument, tree, is_entry=lambda x: isinstance(x, bool), expected="True or False"
    )


@pytest.mark.parametrize(
    "argument",
    [
        {"up": {"kernel": True, "bias": False}, "norm": {"scale": False}},
        {"up": {"kernel": True, "bias": False}, "norm": False},
        {"up/kernel": True, "up/bias": False, "norm": False},
        {"*": False, "up/kernel": True},
        {"up": True, "*/bias": False, "*/scale": False},
        lambda tree: jax.tree.map_with_path(lambda path, _: path[-1].key == "kernel", tree),
        jax.tree_util.Partial(lambda tree: {"*": False, "up/kernel": True}),
        functools.partial(lambda tree, rest: {"*": rest, "up/kernel": True}, rest=False),
    ],
    ids=["tree", "prefix", "paths", "globs", "modules", "function", "Partial", "partial"],
)
def test_every_form_of_an_argument_means_the_same(argument):
    assert mask(argument) == EXPECTED


@pytest.mark.parametrize("tree", [PARAMS, [jnp.ones(2)], jnp.ones(2), {}])
def test_one_entry_holds_for_every_parameter(tree):
    found = mask(True, tree)
    assert len(found) == len(jax.tree.leaves(tree)) and set(found.values()) <= {True}


@pytest.mark.parametrize(
    ("argument", "error", "message"),
    [
        (
            {"up": {"kernl": True}, "norm": True},
            ValueError,
            r"mask\['up/kernl'\] matches no p.*'up/k",
        ),
        (
            {"params": {"up": True, "norm": True}},
            ValueError,
            r"mask\['params/norm'\] matches no para",
        ),
        ([True, False], ValueError, r"mask\['0'\] matches no parameter; there are 'norm"),
        ({"up": True}, ValueError, r"mask has no entry for 'norm/scale'; expected True or False"),
        ({"up": {"bias": True}, "norm": True}, ValueError, "mask has no entry for 'up/kernel';"),
        ({}, ValueError, "mask has no entry for 'norm/scale', 'up/bias', 'up/kernel'"),
        ({"up": None, "norm": True}, TypeError, r"mask\['up'\] is None; expected True or False"),
        ({"up": "all", "norm": True}, TypeError, r"mask\['up'\] is 'all'; expected True or False"),
        ("all", TypeError, "mask is 'all'; expected True or False"),
        (None, TypeError, "mask is None; expected True or False"),
        ({"u?/*": True, "up/*": False, "norm": True}, ValueError, "which disagree; name it in ful"),
        (lambda tree: {"nowhere": True}, ValueError, r"mask\['nowhere'\] matches no parameter"),
    ],
)
def test_what_an_argument_gets_wrong_is_named(argument, error, message):
    with pytest.raises(error, match=message):
        mask(argument)


def test_masked_leaves_get_no_entry_and_hide_their_own():
    tree = {"up": {"kernel": jnp.ones(2), "bias": optax.MaskedNode()}, "norm": optax.MaskedNode()}
    full = {"up": {"kernel": True, "bias": False}, "norm": {"scale": False}}
    assert mask(full, tree) == {"up/kernel": True}
    with pytest.raises(ValueError, match=r"mask\['upp'\] matches no parameter"):
        mask({"upp": True, "up": True}, tree)


def test_an_equinox_module_that_can_be_called_is_a_tree_of_entries():
    linear = eqx.nn.Linear(2, 3, use_bias=False, key=jax.random.key(0))
    params = eqx.filter(linear, eqx.is_array)
    entries = jax.tree.map(lambda _: True, params)
    assert callable(entries)
    assert mask(entries, params) == {"weight": True}
    with pytest.raises(ValueError, match=r"mask\['bias'\] matches no parameter; there are"):
        mask({"weight": True, "bias": True}, params)


def test_what_is_no_array_needs_no_entry():
    mlp = eqx.nn.MLP(2, 2, 2, 1, key=jax.random.key(0))
    entries = jax.tree.map(lambda _: True, eqx.filter(mlp, eqx.is_array))
    assert set(mask(entries, mlp)) == {
        f"layers/{i}/{name}" for i in (0, 1) for name in ("weight", "bias")
    }
