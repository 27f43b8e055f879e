"""The registry: what is planned is what is trained, and a model from outside needs one row."""

import dataclasses
from typing import ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AbstractMesh, AxisType

import optax_muon
from optax_muon.cli.plan import CONFIGS, tree
from optax_muon.models import abstract, spec
from optax_muon.training import state as train_state
from optax_muon.training.step import step as train_step

MESHES = [{"fsdp": 2, "tensor": 2}, {"data": 2, "expert": 2, "fsdp": 2}]


@pytest.mark.parametrize("sizes", MESHES, ids=str)
@pytest.mark.parametrize("name", CONFIGS)
@jax.numpy_dtype_promotion("standard")  # jax.nn.dot_product_attention promotes bfloat16 itself
def test_what_is_planned_is_what_is_trained(name, sizes):
    axes = (AxisType.Explicit,) * len(sizes)
    mesh = AbstractMesh(tuple(sizes.values()), tuple(sizes), axis_types=axes)
    planned = optax_muon.named_leaves(abstract.on_mesh(tree(name), mesh))
    with jax.sharding.use_abstract_mesh(mesh):
        state = train_state.abstract(spec.model(CONFIGS[name]), optax.identity(), mesh)
    trained = optax_muon.named_leaves(state.params)
    assert {path: (p.shape, p.sharding.spec) for path, p in planned.items()} == {
        path: (p.shape, p.sharding.spec) for path, p in trained.items()
    }


@pytest.mark.parametrize("name", CONFIGS)
@jax.numpy_dtype_promotion("standard")
def test_a_models_attributes_say_what_its_passes_return(name):
    model = spec.model(CONFIGS[name])
    bias = jax.eval_shape(model.zero_bias)
    assert model.has_router == (bias is not None and bias.size > 0)
    tokens = jax.ShapeDtypeStruct((1, 4), jnp.int32)
    params = jax.eval_shape(model.init, jax.random.key(0))
    logits, stats = jax.eval_shape(model.forward, params, tokens, bias)
    assert logits.shape == (1, 4, model.config.vocab_size)
    assert model.reports_logits == (stats is not None)
    assert ("imbalance" in jax.eval_shape(model.metrics, stats)) == model.has_router


# ---- a model that the package has never heard of -------------------------------------------------


@dataclasses.dataclass(frozen=True)
class BigramConfig:
    hidden_size: int
    context: int = 8
    vocab_size: int = 16
    num_hidden_layers: int = 1
    num_attention_heads: int = 1
    dtype: str = "float32"


class Bigrams(nn.Module):
    config: BigramConfig

    @nn.compact
    def __call__(self, tokens):
        embed = nn.Embed(self.config.vocab_size, self.config.hidden_size, name="embed")
        hidden = nn.Dense(self.config.hidden_size, use_bias=False, name="up_proj")(embed(tokens))
        return nn.Dense(self.config.vocab_size, use_bias=False, name="lm_head")(hidden)


@dataclasses.dataclass(frozen=True)
class Bigram:
    config: BigramConfig

    SPECS: ClassVar[abstract.Specs] = {"": ("fsdp", None)}
    kind = "Bigram"
    has_router = False
    reports_logits = False
    huggingface_type = None
    per_head_views: ClassVar[dict[str, optax_muon.View]] = {}
    attentions = ()
    active = 0
    attended = 0

    def init(self, key):
        return abstract.initialize(self._initial, self.SPECS, key)

    def zero_bias(self):
        return None

    def forward(self, params, tokens, bias=None):
        return Bigrams(self.config).apply({"params": params}, tokens), None

    def losses(self, params, tokens, targets, bias=None):
        logits, stats = self.forward(params, tokens)
        return optax.softmax_cross_entropy_with_integer_labels(logits, targets), stats

    def metrics(self, stats):
        return {}

    @property
    def abstract_params(self):
        return abstract.derive(self._initial, self.SPECS)

    def shardings(self, mesh):
        return abstract.shardings(self.abstract_params, mesh)

    def _initial(self, key):
        return Bigrams(self.config).init(key, jnp.zeros([1, 1], jnp.int32))["params"]


@pytest.fixture
def registered(monkeypatch):
    monkeypatch.setattr(spec, "REGISTRY", dict(spec.REGISTRY))
    row = spec.ModelSpec("bigram", BigramConfig, Bigram, {"bigram-tiny": BigramConfig(4)})
    spec.register(row)
    return row


def test_a_model_from_outside_is_planned(registered):
    model = spec.model(spec.named_configs()["bigram-tiny"])
    params = abstract.on_mesh(model.abstract_params, AbstractMesh((2,), ("fsdp",)))
    plan = optax_muon.plan(params)
    assert [leaf.path for leaf in plan.leaves] == ["up_proj/kernel"]


def test_a_model_from_outside_is_trained(registered):
    model = spec.model_of({"model": {**dataclasses.asdict(BigramConfig(4))}})
    assert isinstance(model, Bigram)
    tx = optax_muon.muon(1e-2)
    params = model.init(jax.random.key(0))
    state = train_state.State(params, tx.init(params), model.zero_bias())
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, 16, [1, 4, 9]), jnp.int32)
    step, losses = jax.jit(train_step, static_argnums=(0, 1)), []
    for _ in range(5):
        state, measured = step(model, tx, state, tokens)
        losses.append(float(measured.loss))
    assert losses[-1] < losses[0]


def test_a_name_is_given_once(registered):
    with pytest.raises(ValueError, match="bigram is registered already"):
        spec.register(registered)


def test_a_config_of_no_model_is_refused():
    with pytest.raises(TypeError, match="BigramConfig is not the config of a model; accepted are"):
        spec.model(BigramConfig(4))
