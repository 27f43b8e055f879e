"""Flax linen with `nn.scan` and logical axis names: one stack of parameters for all layers.

A decoder learns sequences whose second half repeats the first. It can do that only by attention
over the distance of half a sequence; without it the loss there stays at log(16) = 2.77.
"""

import argparse

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn
from flax.training.train_state import TrainState

import optax_muon

VOCAB, WIDTH, HEADS, LAYERS, HALF, BATCH = 16, 64, 4, 2, 8, 64


class Layer(nn.Module):
    """Attention and a two-layer perceptron, both residual."""

    @nn.compact
    def __call__(self, x, mask):
        """`[batch, length, width]` in, the same out, in the form that `nn.scan` takes."""

        def dense(name, features, *names, axis=-1):
            init = nn.with_logical_partitioning(nn.initializers.lecun_normal(), names)
            return nn.DenseGeneral(features, axis, use_bias=False, kernel_init=init, name=name)

        def norm(name):
            init = nn.with_logical_partitioning(nn.initializers.ones, ("embed",))
            return nn.RMSNorm(scale_init=init, name=name)

        y, heads = norm("attention_norm")(x), (HEADS, WIDTH // HEADS)
        qkv = [dense(n, heads, "embed", "heads", "kv")(y) for n in ("query", "key", "value")]
        y = nn.dot_product_attention(*qkv, mask=mask)
        x = x + dense("out", WIDTH, "heads", "kv", "embed", axis=(-2, -1))(y)
        y = nn.gelu(dense("up", 4 * WIDTH, "embed", "mlp")(norm("mlp_norm")(x)))
        return x + dense("down", WIDTH, "mlp", "embed")(y), None


class Decoder(nn.Module):
    """Embeddings of tokens and places, the scanned layers, logits from the tokens' embeddings."""

    @nn.compact
    def __call__(self, tokens):
        """`[batch, length]` tokens to `[batch, length, vocab]` logits."""
        init = nn.initializers.normal(1.0)
        table = nn.with_logical_partitioning(init, ("vocab", "embed"))
        places = nn.with_logical_partitioning(init, ("length", "embed"))
        embed = nn.Embed(VOCAB, WIDTH, embedding_init=table, name="embed")
        x = embed(tokens) + self.param("pos_embedding", places, (2 * HALF, WIDTH))[None]
        layers = nn.scan(
            Layer,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            in_axes=nn.broadcast,
            length=LAYERS,
            metadata_params={nn.PARTITION_NAME: "layers"},
        )
        x, _ = layers(name="layers")(x, nn.make_causal_mask(tokens))
        return embed.attend(nn.RMSNorm(name="final_norm")(x)) / WIDTH**0.5


@jax.jit
def train_step(state, half):
    """One step on fresh sequences; returns the loss on their second half."""
    tokens = jnp.concatenate([half, half], axis=1)

    def loss_fn(params):
        logits = state.apply_fn({"params": params}, tokens)[:, HALF - 1 : -1]
        return optax.softmax_cross_entropy_with_integer_labels(logits, half).mean()

    loss, grads = jax.value_and_grad(loss_fn)(state.params)
    return state.apply_gradients(grads=grads), loss


def main(steps: int) -> None:
    """Train the decoder, and print what Muon was given and what was learned."""
    model = Decoder()
    tokens = jnp.zeros((1, 2 * HALF), jnp.int32)
    params = jax.jit(model.init)(jax.random.key(0), tokens)["params"]
    print(optax_muon.label(params))  # they stay in their boxes, which carry the names of the axes
    tx = optax_muon.muon(optax.warmup_cosine_decay_schedule(0.0, 0.02, steps // 10, steps))
    state = TrainState.create(apply_fn=model.apply, params=params, tx=tx)
    halves = np.random.default_rng(0).integers(VOCAB, size=(steps, BATCH, HALF))
    for step, half in enumerate(halves):
        state, loss = train_step(state, half)
        if step % 20 == 0:
            print(f"step {step}: loss {loss:.3f}")
    print(f"final loss {loss:.3f}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=200)
    main(parser.parse_args().steps)
