"""What `views` may be, and that all its forms mean the same; labels; errors."""

import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from optax_muon.matrices.assign import DEFAULT_RULES, Rule, Stacked, assign, label
from optax_muon.matrices.views import Split, View

MIXER = View(0, (1, 2))
Dimensions = optax.contrib.MuonDimensionNumbers


def leaf(*shape, dtype="float32"):
    return jax.ShapeDtypeStruct(shape, dtype)


def params():
    return {
        "embed": {"embedding": leaf(64, 8)},
        "layers": {
            "mixer": {"kernel": leaf(3, 4, 8, 16), "bias": leaf(3, 16)},
            "norm": {"scale": leaf(3, 8)},
            "up_proj": {"kernel": leaf(3, 8, 32)},
        },
        "mixer": {"w": leaf(8, 4, 16)},
    }


SETTLED = {"layers/mixer/kernel": View(1, (2, 3)), "mixer/w": MIXER}


def expected():
    return {
        "embed/embedding": None,
        "layers/mixer/bias": None,
        "layers/mixer/kernel": View(1, (2, 3)),
        "layers/norm/scale": None,
        "layers/up_proj/kernel": View(-2, -1),
        "mixer/w": MIXER,
    }


class Net(eqx.Module):
    a: eqx.nn.Linear
    b: eqx.nn.Linear


def net():
    one, two = jax.random.split(jax.random.key(0))
    return Net(eqx.nn.Linear(8, 4, use_bias=False, key=one), eqx.nn.Linear(4, 4, key=two))


# ---- the forms of views -------------------------------------------------------------------------


@pytest.mark.parametrize(
    "views",
    [
        SETTLED,
        {"layers": {"mixer": {"kernel": View(1, (2, 3))}}, "mixer": {"w": MIXER}},
        {"layers": {"mixer/kernel": View(1, (2, 3))}, "mixer": MIXER},
        {"layers/mixer/kernel": Dimensions(1, (2, 3)), "mixer": Dimensions(0, (1, 2))},
        {"layers/*/bias": None, "layers/mixer/*": View(1, (2, 3)), "layers/mixer/bias": None}
        | {"m*/w": MIXER},
        lambda tree: {**SETTLED, "layers/norm": None},
        lambda tree: [Rule(r"layers/mixer/kernel", View(1, (2, 3)), ""), Rule(r"w", MIXER, "")],
        [Rule(r"layers/mixer/kernel", View(1, (2, 3)), ""), Rule(r"^mixer/w", MIXER, "")],
        [
            Rule(r"mixer/kernel", Dimensions(1, (2, 3)), ""),
            Rule(r"mixer/w", MIXER, ""),
            *DEFAULT_RULES,
        ],
    ],
    ids=[
        "paths", "tree", "mixed", "dimension numbers", "globs", "callable", "callable of rules",
        "rules", "rules and the default table",
    ],
)  # fmt: skip
def test_every_form_of_views_means_the_same(views):
    assert assign(params(), views) == expected()


def test_an_nnx_state_a_plain_dict_of_it_and_paths_mean_the_same():
    class Model(nnx.Module):
        def __init__(self, rngs):
            self.embed = nnx.Embed(16, 8, rngs=rngs)
            self.up = nnx.LinearGeneral(8, (2, 16), rngs=rngs)

    state = nnx.state(Model(nnx.Rngs(0)), nnx.Param)

    def view(path, _):
        return View(0, (1, 2)) if "kernel" in jax.tree_util.keystr(path) else None

    as_state = jax.tree_util.tree_map_with_path(view, state)
    as_dict = jax.tree_util.tree_map_with_path(view, nnx.to_pure_dict(state))
    assert isinstance(as_state, nnx.State) and isinstance(as_dict, dict)
    found = [assign(state, views) for views in (as_state, as_dict, {"up/kernel": View(0, (1, 2))})]
    assert found[0] == found[1] == found[2]
    assert found[0] == {"embed/embedding": None, "up/bias": None, "up/kernel": View(0, (1, 2))}


def test_a_boxed_tree_is_decided_as_its_plain_one():
    kernel = nn.Partitioned(jnp.zeros((8, 4)), names=("a", "b"))
    assert assign({"up": {"kernel": kernel}}) == assign({"up": {"kernel": jnp.zeros((8, 4))}})
    boxed_view = {"up": {"kernel": kernel.replace(value=View(1, 0))}}
    assert assign({"up": {"kernel": kernel}}, boxed_view) == {"up/kernel": View(1, 0)}


def test_an_equinox_module_of_views_is_a_tree_and_its_missing_fields_are_no_entries():
    module = eqx.filter(net(), eqx.is_inexact_array)
    views = jax.tree.map(lambda x: View(1, 0) if x.ndim == 2 else None, module)
    assert assign(module, views) == {"a/weight": View(1, 0), "b/weight": View(1, 0), "b/bias": None}


def test_a_callable_equinox_module_of_views_is_not_called():
    linear = eqx.nn.Linear(8, 4, use_bias=False, key=jax.random.key(0))
    views = jax.tree.map(lambda _: View(0, 1), linear)
    assert callable(views)
    assert assign(linear, views) == {"weight": View(0, 1)}


@pytest.mark.parametrize("view", [View(1, 0), Dimensions(1, 0)])
def test_a_bare_view_holds_for_every_leaf(view):
    assert set(assign({"a": leaf(8, 4), "lm_head": leaf(4, 8)}, view).values()) == {View(1, 0)}


def test_no_views_no_entries_and_an_empty_list_leave_all_to_the_roles():
    tree = {"up": {"kernel": leaf(8, 4)}, "norm": leaf(8)}
    assert assign(tree) == assign(tree, {}) == assign(tree, [])
    assert assign(tree) == {"norm": None, "up/kernel": View(-2, -1)}


def test_the_longest_entry_decides_and_the_exact_path_before_all():
    tree = {"a": {"b": {"kernel": leaf(8, 4), "w": leaf(8, 4)}, "c": {"kernel": leaf(8, 4)}}}
    views = {"a": None, "a/b": View(0, 1), "*/*/kern*": View(1, 0), "a/b/kernel": None}
    assert assign(tree, views) == {
        "a/b/kernel": None,
        "a/b/w": View(0, 1),
        "a/c/kernel": View(1, 0),
    }


def test_of_several_rules_the_first_decides():
    rules = [Rule(r"up/kernel", None, "frozen"), Rule(r"\w+/kernel", View(1, 0), "turned")]
    tree = {"up": {"kernel": leaf(8, 4)}, "down": {"kernel": leaf(8, 4)}}
    assert assign(tree, rules) == {"up/kernel": None, "down/kernel": View(1, 0)}


def test_a_rule_reads_paths_in_snake_case_without_indices():
    rule = Rule(r"mixer_block/dense/kernel", View(1, 0), "turned", axes=(2,))
    tree = {"MixerBlock_3": {"Dense_1": {"kernel": leaf(8, 4)}}}
    assert assign(tree, rule) == {"MixerBlock_3/Dense_1/kernel": View(1, 0)}


def test_a_view_can_take_what_the_roles_leave_to_adamw():
    tree = {"lm_head": {"kernel": leaf(8, 64)}}
    assert assign(tree) == {"lm_head/kernel": None}
    assert assign(tree, {"lm_head": View(0, 1)}) == {"lm_head/kernel": View(0, 1)}


# ---- leaves -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "make", [jnp.zeros, np.zeros, lambda shape: leaf(*shape)], ids=["jax", "numpy", "shape"]
)
def test_arrays_and_shapes_are_decided_alike(make):
    tree = {"up": {"kernel": make((8, 4)), "bias": make((4,))}}
    assert assign(tree) == {"up/kernel": View(-2, -1), "up/bias": None}


def test_tracers_are_decided_as_their_arrays():
    tree = {"up": {"kernel": jnp.zeros((8, 4)), "bias": jnp.zeros(4)}}
    seen = []
    jax.make_jaxpr(lambda tree: seen.append(assign(tree)))(tree)
    assert seen == [assign(tree)]


@pytest.mark.parametrize("tree", [jnp.zeros((8, 4)), [jnp.zeros((8, 4))], (jnp.zeros((8, 4)),)])
def test_an_unnamed_matrix_is_refused_unless_one_word_says_that_all_are_matrices(tree):
    with pytest.raises(ValueError, match=r"of shape \(8, 4\) may be one matrix of 8 x 4"):
        assign(tree)
    assert list(assign(tree, "matrices").values()) == [View(-2, -1)]


def test_keys_counters_and_functions_stay_out_of_muon():
    tree = {"count": leaf(4, 4, dtype="int32"), "key": jax.random.key(0), "activation": jnp.tanh}
    assert set(assign(tree).values()) == {None}
    table = label({**tree, "up_proj": leaf(8, 4)})
    without = [row for row in table.rows if row.reason == "not floating point"]
    assert {row.path for row in without} == set(tree)
    assert {row.optimizer for row in without} == {"none"}
    assert (table.total("muon"), table.total("adamw")) == ((1, 32), (0, 0))
    assert "100.0%" in str(table)


def test_nothing_hangs_on_the_words_of_a_reason():
    tree = {"up": {"kernel": leaf(8, 4)}, "down": {"kernel": leaf(4, 8)}}
    rule = Rule("up/kernel", None, "not floating point")
    assert [row.optimizer for row in label(tree, rule).rows] == ["muon", "adamw"]


@pytest.mark.parametrize("keep", ["muon", "adamw"])
@pytest.mark.parametrize(
    "views", [SETTLED, {"*mixer/kernel": View(1, (2, 3)), "mixer": MIXER}, lambda tree: SETTLED]
)
def test_masking_leaves_does_not_change_the_decision_for_the_others(views, keep):
    whole = assign(params(), views)
    seen = []

    def watch(updates, state, params=None):
        seen.append(assign(updates, views))
        return updates, state

    watcher = optax.GradientTransformation(lambda _: optax.EmptyState(), watch)
    transforms = {"muon": optax.identity(), "adamw": optax.identity(), keep: watcher}
    labels = jax.tree.unflatten(
        jax.tree.structure(params()), ["adamw" if v is None else "muon" for v in whole.values()]
    )
    tree = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), params())
    chain = optax.partition(transforms, labels)
    chain.update(tree, chain.init(tree))
    kept = {path: view for path, view in whole.items() if (view is None) == (keep == "adamw")}
    assert seen == [kept]


@pytest.mark.parametrize("box", [nn.Partitioned, nnx.Param])
def test_masked_boxes_keep_their_paths(box):
    def boxed(value):
        return (
            nn.Partitioned(value, names=("a", "b")) if box is nn.Partitioned else nnx.Param(value)
        )

    tree = {
        "mixer": {"w": boxed(jnp.zeros((8, 4, 16)))},
        "up": {"kernel": boxed(jnp.zeros((8, 4)))},
    }
    views = {"mixer/w": MIXER}
    masked = jax.tree.map(lambda x: optax.MaskedNode() if x.ndim == 3 else x, tree)
    assert assign(tree, views) == {"mixer/w": MIXER, "up/kernel": View(-2, -1)}
    assert assign(masked, views) == {"up/kernel": View(-2, -1)}


def test_a_mask_over_a_whole_module_hides_what_its_entries_are_for():
    tree = {"layers": optax.MaskedNode(), "up": {"kernel": leaf(8, 4)}}
    entries = {"layers/mixer/kernel": View(1, 2), "layers/*/w": None}
    assert assign(tree, entries) == {"up/kernel": View(-2, -1)}
    assert assign(tree, [Rule("mixer/w", None, "")]) == {"up/kernel": View(-2, -1)}
    with pytest.raises(ValueError, match="views\\['layer/mixer'\\] matches no parameter"):
        assign(tree, {"layer/mixer": None})


# ---- errors -------------------------------------------------------------------------------------


def block_of(error):
    """The block of views that an error offers, as data; lines that are commented out included."""
    text = str(error).partition("views=")[2]
    return eval(text), eval(text.replace("    # '", "    '", 1).replace("    '", "    # '", 1))


def test_the_error_lists_every_ambiguous_parameter_and_a_block_that_settles_them():
    with pytest.raises(ValueError, match="'mixer/w'") as error:
        assign(params())
    assert "'layers/mixer/kernel' (3, 4, 8, 16)" in str(error.value)
    views = block_of(error.value)[0]
    assert set(views) == {"layers/mixer/kernel", "mixer/w"}
    assert set(assign(params(), views)) == set(expected())


def test_a_group_of_parameters_is_settled_by_one_glob():
    tree = {f"mixer_{i:02}": {"w": leaf(4, 8, 16)} for i in range(12)}
    with pytest.raises(ValueError, match="12 ambiguous parameters") as error:
        assign(tree)
    assert all(f"'{name}/w'" in str(error.value) for name in tree)
    views = block_of(error.value)[0]
    assert list(views) == ["mixer_*/w"]
    assert None not in assign(tree, views).values()


def test_a_table_with_open_rows_can_be_printed():
    table = label(params(), strict=False)
    assert [row.path for row in table.rows if row.optimizer == "open"] == list(SETTLED)
    assert "open       2" in str(table)
    assert set(table.views) == set(expected()) - set(SETTLED)


def test_the_views_of_a_table_give_the_same_table():
    table = label(params(), SETTLED)
    assert assign(params(), table.views) == table.views == expected()


@pytest.mark.parametrize(
    ("views", "error", "message"),
    [
        (
            {"layers/up_proj/kernl": None},
            ValueError,
            r"views\['layers/up_proj/kernl'\] matches no parameter; there are "
            "'layers/up_proj/kernel'",
        ),
        ({"*/mlp/*": None}, ValueError, r"views\['\*/mlp/\*'\] matches no parameter"),
        ({"layers": {"mixr": None}}, ValueError, r"views\['layers/mixr'\] matches no"),
        (lambda tree: {"nowhere": None}, ValueError, r"views\['nowhere'\] matches no parameter"),
        (
            [Rule(r"mixr/w", MIXER, "mixer"), *DEFAULT_RULES],
            ValueError,
            r"The rule 'mixr/w' \(mixer\) matches no parameter of 'embed/embedding', ",
        ),
        (
            [Rule(r"mixer/w", MIXER, "mixer", axes=(2,))],
            ValueError,
            r"The rule 'mixer/w' \(mixer\) matches no parameter",
        ),
        (
            {**SETTLED, "mixer/w": View(0, 3)},
            ValueError,
            r"mixer/w: View\(.*\) names axis 3, which the shape \(8, 4, 16\) does not have",
        ),
        (
            {**SETTLED, "mixer/w": View(0, 1, Split(1, (3, 2)))},
            ValueError,
            r"mixer/w: .* splits an axis of 5 entries; axis 1 of the shape \(8, 4, 16\) has 4",
        ),
        (View(1, 2), ValueError, r"^embed/embedding: .* names axis 2, which the shape \(64, 8\) "),
        ({"layers/*": None, "*/kernel": MIXER}, ValueError, "which disagree; name it in full"),
        ({"mixer": "muon"}, TypeError, r"views\['mixer'\]: Expected a View, .*, got 'muon'"),
        ({"mixer": [Rule("w", MIXER, "")]}, TypeError, r"views\['mixer/0'\]: Expected a View"),
    ],
)
def test_what_views_gets_wrong_is_named(views, error, message):
    with pytest.raises(error, match=message):
        assign(params(), views)


@pytest.mark.parametrize(
    ("views", "message"),
    [
        ({"b/bias": View(0, 1)}, r"views\['b/bias'\] matches no parameter"),
        (
            {"a": {"weight": View(1, 0), "bias": View(1, 0)}},
            r"views\['a/bias'\] matches no parameter",
        ),
        ([View(1, 0)], r"views\['0'\] matches no parameter; there are 'a/weight'"),
        ({"params": {"a": None}}, r"views\['params/a'\] matches no parameter"),
    ],
)
def test_a_view_where_there_is_no_parameter_is_named(views, message):
    module = eqx.filter(eqx.tree_at(lambda n: n.b.bias, net(), None), eqx.is_array)
    assert assign(module, {"b/bias": None, "a": {"bias": None}}) == assign(module)
    with pytest.raises(ValueError, match=message):
        assign(module, views)


def test_views_of_a_tree_hint_nothing_of_its_integers():
    tree = {"layers": {"w": leaf(4, 3, 8), "count": leaf(4, dtype="int32"), "ln": leaf(4, 8)}}
    assert assign(tree, {"layers": Stacked(0)})["layers/count"] is None


def test_a_view_for_an_integer_is_refused():
    with pytest.raises(ValueError, match="steps is int32, which has no gradient"):
        assign({"steps": leaf(4, 4, dtype="int32")}, {"steps": View(0, 1)})


def test_a_rule_refuses_what_is_no_view():
    with pytest.raises(TypeError, match="Expected a View"):
        Rule("w", "muon", "")


# ---- labels -------------------------------------------------------------------------------------


def test_the_report_shows_every_leaf_its_matrices_its_optimizer_and_why():
    tree = {"embed": leaf(64, 8), "layers": {"norm": leaf(12, 8), "qkv": leaf(12, 8, 16)}}
    split = View(1, 2, Split(2, (12, 4), heads=(3, 1)))
    assert str(label(tree, {"layers/qkv": split})) == "\n".join(
        [
            "path         shape        matrices                     optimizer  reason",
            "embed        [64, 8]      -                            adamw      embedding",
            "layers/norm  [12, 8]      -                            adamw      norm",
            "layers/qkv   [12, 8, 16]  36 x (8 x 4) + 12 x (8 x 4)  muon       views['layers/qkv']",
            "",
            "optimizer  leaves  parameters  share",
            "muon       1       1,536       71.6%",
            "adamw      2       608         28.4%",
        ]
    )


def test_the_report_says_where_a_split_may_be_wanted():
    tree = {"attn": {"qkv": {"kernel": leaf(8, 24)}, "out_proj": {"kernel": leaf(8, 8)}}}
    assert [row.reason for row in label(tree).rows] == ["matrix", "fused matrices, taken whole"]


def test_rows_carry_the_same_decision_as_assign():
    views, table = assign(params(), SETTLED), label(params(), SETTLED)
    assert [row.path for row in table.rows] == list(views)
    for row, view in zip(table.rows, views.values(), strict=True):
        assert row.optimizer == ("adamw" if view is None else "muon")
        assert row.blocks == (() if view is None else view.bind(row.shape).blocks)
        assert sum(b.batch * b.rows * b.cols for b in row.blocks) in (0, row.size)


def test_totals_add_up_to_the_tree():
    table = label(params(), SETTLED)
    muon, adamw = table.total("muon"), table.total("adamw")
    assert muon == (3, 3 * 4 * 8 * 16 + 3 * 8 * 32 + 8 * 4 * 16)
    assert adamw == (3, 64 * 8 + 3 * 16 + 3 * 8)


def test_nothing_is_cut_from_a_report_of_three_hundred_leaves():
    tree = {f"layers_{i}": {f"{n}_proj": {"kernel": leaf(8, 4)} for n in "qkvo"} for i in range(75)}
    lines = str(label(tree)).splitlines()
    assert len(lines) == 1 + 300 + 1 + 3
    assert all(any(line.startswith(f"{path} ") for line in lines) for path in assign(tree))


def test_an_empty_tree_has_an_empty_report():
    assert label({}).rows == ()
    assert "muon       0       0           0.0%" in str(label({}))
