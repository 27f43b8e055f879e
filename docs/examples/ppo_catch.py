"""Reinforcement learning: PPO learns to catch a falling ball, in one compiled program.

A paddle of a board of 8 x 5 catches the ball (1) or misses it (-1); at random the mean is -0.5.
"""

import argparse
from functools import partial

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn

import optax_muon

ROWS, COLS, ENVS, EPOCHS, CLIP, LAMBDA = 8, 5, 64, 4, 0.2, 0.95


class Policy(nn.Module):
    """Logits of the three actions, and the value of the state."""

    @nn.compact
    def __call__(self, board):
        """`[..., rows, cols]` boards to logits `[..., 3]` and values `[...]`."""
        x = nn.tanh(nn.Dense(64, name="hidden")(board.reshape(*board.shape[:-2], -1)))
        x = nn.tanh(nn.Dense(64, name="trunk")(x))
        return nn.Dense(3, name="policy")(x), nn.Dense(1, name="value")(x)[..., 0]


def rollout(policy, params, key):
    """Play one episode in every environment; what is remembered is `[time, env]`."""
    ball_key, paddle_key, action_key = jax.random.split(key, 3)
    env, ball = jnp.arange(ENVS), jax.random.randint(ball_key, (ENVS,), 0, COLS)
    paddle = jax.random.randint(paddle_key, (ENVS,), 0, COLS)

    def play(paddle, now):
        row, key = now
        board = jnp.zeros((ENVS, ROWS, COLS)).at[env, row, ball].set(1.0)
        board = board.at[env, -1, paddle].set(1.0)
        logits, value = policy.apply(params, board)
        action = jax.random.categorical(key, logits)
        paddle = jnp.clip(paddle + action - 1, 0, COLS - 1)
        reward = jnp.where(row == ROWS - 2, jnp.where(ball == paddle, 1.0, -1.0), 0.0)
        return paddle, (board, action, nn.log_softmax(logits)[env, action], value, reward)

    times = (jnp.arange(ROWS - 1), jax.random.split(action_key, ROWS - 1))
    return jax.lax.scan(play, paddle, times)[1]


def advantages(value, reward):
    """Generalized advantage estimation over whole episodes, undiscounted."""
    deltas = reward - value + jnp.concatenate([value[1:], jnp.zeros((1, ENVS))])
    time = jnp.arange(ROWS - 1)
    return jnp.tril(LAMBDA ** (time[:, None] - time)).T @ deltas


def loss_fn(params, policy, played, gain):
    """The clipped surrogate, the error of the values, and a bonus for entropy."""
    board, action, old_log_prob, old_value, _ = played
    logits, value = policy.apply(params, board)
    log_probs = nn.log_softmax(logits)
    log_prob = jnp.take_along_axis(log_probs, action[..., None], -1)[..., 0]
    ratio = jnp.exp(log_prob - old_log_prob)
    standard = (gain - gain.mean()) / (gain.std() + 1e-6)
    surrogate = jnp.minimum(ratio * standard, jnp.clip(ratio, 1 - CLIP, 1 + CLIP) * standard)
    error = jnp.mean((value - (gain + old_value)) ** 2)
    entropy = -jnp.mean(jnp.exp(log_probs) * log_probs)
    return -jnp.mean(surrogate) + 0.5 * error - 0.03 * entropy


def main(steps: int) -> None:
    """Train the policy, and print what Muon was given and how well it plays."""
    policy, tx = Policy(), optax_muon.muon(0.02, weight_decay=0.0)
    params = jax.jit(policy.init)(jax.random.key(0), jnp.zeros((ROWS, COLS)))
    print(optax_muon.label(params))

    def iteration(state, key):
        played = rollout(policy, state[0], key)
        gain = advantages(*played[-2:])

        def epoch(state, _):
            params, opt_state = state
            grads = jax.grad(loss_fn)(params, policy, played, gain)
            updates, opt_state = tx.update(grads, opt_state, params)
            return (optax.apply_updates(params, updates), opt_state), None

        return jax.lax.scan(epoch, state, length=EPOCHS)[0], played[-1].sum(axis=0).mean()

    train = jax.jit(partial(jax.lax.scan, iteration))
    _, returns = train((params, tx.init(params)), jax.random.split(jax.random.key(1), steps))
    for step in range(0, steps, 10):
        print(f"iteration {step}: mean return {returns[step]:.2f}")
    print(f"final mean return {returns[-10:].mean():.3f}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=100)
    main(parser.parse_args().steps)
