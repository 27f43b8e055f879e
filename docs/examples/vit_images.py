"""A vision transformer in Flax nnx on images of CIFAR's form: 32 x 32 x 3, ten classes.

The images are made here: gratings in ten directions, in random colours and phases, with noise.
Guessing has a loss of log(10) = 2.30.
"""

import argparse

import jax
import numpy as np
import optax
from flax import nnx

import optax_muon

SIZE, PATCH, WIDTH, LAYERS, CLASSES, BATCH = 32, 8, 48, 2, 10, 64


class Layer(nnx.Module):
    """Attention and a two-layer perceptron, both residual."""

    def __init__(self, *, rngs: nnx.Rngs):
        self.attention_norm = nnx.LayerNorm(WIDTH, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(4, WIDTH, decode=False, rngs=rngs)
        self.mlp_norm = nnx.LayerNorm(WIDTH, rngs=rngs)
        self.up = nnx.Linear(WIDTH, 4 * WIDTH, rngs=rngs)
        self.down = nnx.Linear(4 * WIDTH, WIDTH, rngs=rngs)

    def __call__(self, x):
        """`[batch, patch, width]` in, the same out."""
        x = x + self.attention(self.attention_norm(x))
        return x + self.down(nnx.gelu(self.up(self.mlp_norm(x))))


class ViT(nnx.Module):
    """Patches, places, layers, the mean over patches, logits."""

    def __init__(self, *, rngs: nnx.Rngs):
        window = (PATCH, PATCH)
        self.patch_embedding = nnx.Conv(3, WIDTH, window, strides=window, rngs=rngs)
        places = 0.02 * np.random.default_rng(0).normal(size=(1, (SIZE // PATCH) ** 2, WIDTH))
        self.pos_embedding = nnx.Param(np.float32(places))
        create = nnx.split_rngs(splits=LAYERS)(nnx.vmap(lambda rngs: Layer(rngs=rngs)))
        self.layers = create(rngs)
        self.final_norm = nnx.LayerNorm(WIDTH, rngs=rngs)
        self.head = nnx.Linear(WIDTH, CLASSES, rngs=rngs)

    def __call__(self, images):
        """`[batch, height, width, 3]` images to `[batch, classes]` logits."""
        x = self.patch_embedding(images)
        x = x.reshape(x.shape[0], -1, WIDTH) + self.pos_embedding[...]
        x = nnx.scan(lambda x, layer: layer(x), out_axes=nnx.Carry)(x, self.layers)
        return self.head(self.final_norm(x.mean(axis=1)))


def batches(steps):
    """Images `[batch, height, width, 3]` and labels `[batch]`."""
    rng = np.random.default_rng(0)
    row, col = np.mgrid[:SIZE, :SIZE] / SIZE
    for _ in range(steps):
        labels = rng.integers(CLASSES, size=BATCH)
        angle = (np.pi / CLASSES * labels)[:, None, None]
        phase = rng.uniform(0, 2 * np.pi, (BATCH, 1, 1))
        waves = np.sin(30 * (row * np.sin(angle) + col * np.cos(angle)) + phase)
        images = waves[..., None] * rng.uniform(0.5, 1.0, (BATCH, 1, 1, 3))
        yield np.float32(images + 0.3 * rng.normal(size=images.shape)), labels


@nnx.jit
def train_step(model, optimizer, images, labels):
    """One step; returns the loss and the share of images that the model named."""

    def loss_fn(model):
        logits = model(images)
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
        return losses.mean(), (logits.argmax(axis=-1) == labels).mean()

    (loss, accuracy), grads = nnx.value_and_grad(loss_fn, has_aux=True)(model)
    optimizer.update(model, grads)
    return loss, accuracy


def main(steps: int) -> None:
    """Train the model, and print what Muon was given and what was learned."""
    model = nnx.jit(lambda key: ViT(rngs=nnx.Rngs(key)))(jax.random.key(0))
    print(optax_muon.label(nnx.state(model, nnx.Param)))
    rate = optax.warmup_cosine_decay_schedule(0.0, 0.01, steps // 10, steps)
    optimizer = nnx.Optimizer(model, optax_muon.muon(rate), wrt=nnx.Param)
    for step, batch in enumerate(batches(steps)):
        loss, accuracy = train_step(model, optimizer, *batch)
        if step % 20 == 0 or step == steps - 1:
            print(f"step {step}: loss {loss:.3f}, accuracy {accuracy:.3f}")
    print(f"final loss {loss:.3f}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=200)
    main(parser.parse_args().steps)
