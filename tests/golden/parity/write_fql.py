"""Write fql.npz from the authors' code (README.md): python write_fql.py CHECKOUT_OF_THEIR_REPOSITORY."""

import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

jax.config.update("jax_enable_x64", True)
sys.path.insert(0, sys.argv[1])
from agents.fql import FQLAgent, get_config  # noqa: E402  # of the checkout

STATE_DIM, ACTION_DIM, BATCH, UPDATES = 5, 3, 8, 10
CASES = {
    "mean": {"q_agg": "mean", "normalize_q_loss": False, "alpha": 10.0, "discount": 0.99, "tau": 0.005},
    "min": {"q_agg": "min", "normalize_q_loss": True, "alpha": 0.3, "discount": 0.9, "tau": 0.1},
}


def flat(tree, prefix):
    leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
    names = ["/".join(key.key for key in path).replace("modules_", "") for path, _ in leaves]
    return {f"{prefix}/{name}": np.asarray(leaf) for name, (_, leaf) in zip(names, leaves, strict=True)}


def make(settings):
    config = get_config()
    config.update(settings, actor_hidden_dims=(16, 16), value_hidden_dims=(16, 16))
    agent = FQLAgent.create(0, jnp.zeros((1, STATE_DIM)), jnp.zeros((1, ACTION_DIM)), config)
    params = jax.tree_util.tree_map(lambda leaf: leaf.astype(jnp.float64), agent.network.params)
    network = agent.network.replace(params=params, opt_state=agent.network.tx.init(params))
    return agent.replace(network=network)


def draws(rng):
    """Return what `total_loss` draws from a key, by its splits."""
    _, actor_rng, critic_rng = jax.random.split(rng, 3)
    next_rng = jax.random.split(jax.random.split(critic_rng)[1])[0]
    rest_rng, x_rng, t_rng = jax.random.split(actor_rng, 3)
    noise_rng = jax.random.split(rest_rng)[1]
    shape = BATCH, ACTION_DIM
    return {
        "next_normal": jax.random.normal(next_rng, shape),
        "start": jax.random.normal(x_rng, shape),
        "t": jax.random.uniform(t_rng, (BATCH, 1))[:, 0],
        "normal": jax.random.normal(noise_rng, shape),
    }


def gradient_of(agent, batch, rng):
    return jax.grad(lambda params: agent.total_loss(batch, params, rng)[0])(agent.network.params)


numbers = np.random.default_rng(0)
batches = [
    {
        "observations": numbers.normal(size=(BATCH, STATE_DIM)),
        "actions": numbers.uniform(-1, 1, size=(BATCH, ACTION_DIM)),
        "rewards": numbers.normal(size=BATCH),
        "masks": (numbers.random(BATCH) > 0.25).astype(float),
        "next_observations": numbers.normal(size=(BATCH, STATE_DIM)),
    }
    for _ in range(UPDATES)
]
found = {f"batch/{name}": np.stack([batch[name] for batch in batches]) for name in batches[0]}
for case, settings in CASES.items():
    agent = make(settings)
    params, losses, drawn = agent.network.params, [], []
    found |= {key: leaf for key, leaf in flat(params, "start").items() if "target" not in key}
    for number, batch in enumerate(batches):
        rng = jax.random.split(agent.rng)[1]
        drawn.append(draws(rng))
        if number == 0:
            gradients = gradient_of(agent, batch, rng)
            found |= {key: leaf for key, leaf in flat(gradients, f"{case}/gradient").items() if "target" not in key}
            next_rng = jax.random.split(jax.random.split(rng, 3)[2])[1]
            next_actions = agent.sample_actions(batch["next_observations"], seed=next_rng)
            next_qs = agent.network.select("target_critic")(batch["next_observations"], actions=next_actions)
            next_q = next_qs.min(axis=0) if settings["q_agg"] == "min" else next_qs.mean(axis=0)
            found[f"{case}/target"] = batch["rewards"] + settings["discount"] * batch["masks"] * next_q
            found[f"{case}/flow_actions"] = agent.compute_flow_actions(batch["observations"], drawn[0]["normal"])
        agent, info = agent.update(batch)
        names = "critic/critic_loss", "actor/bc_flow_loss", "actor/distill_loss", "actor/q_loss"
        losses.append([info[name] for name in names])
        if number == 0:
            found |= flat(agent.network.params, f"{case}/one")
    found |= flat(agent.network.params, f"{case}/ten")
    found[f"{case}/losses"] = np.array(losses)
    key = jax.random.PRNGKey(7)
    found["act/normal"] = jax.random.normal(jax.random.split(key)[0], (BATCH, ACTION_DIM))
    found[f"{case}/act"] = agent.sample_actions(batches[0]["observations"], seed=key)
    found |= {f"draws/{name}": np.stack([each[name] for each in drawn]) for name in drawn[0]}
np.savez_compressed(Path(__file__).with_name("fql.npz"), **{key: np.asarray(value) for key, value in found.items()})
for key, value in found.items():
    print(key, np.shape(value), np.asarray(value).dtype)
for case in CASES:
    print(found[f"{case}/losses"], found[f"{case}/act"])
