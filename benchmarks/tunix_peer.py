"""Tunix's side of `benchmarks.tunix_grpo`, run by a Python that has Tunix: see there.

    PYTHON benchmarks/tunix_peer.py FOLDER

Reads sizes, weights and a rollout of ours in FOLDER, then does a step of GRPO for each line on its
standard input. Its answers are lines of JSON on its standard output: first what it found of our
rollout, then each step's seconds. It imports nothing of this project.
"""

import json
import os
import pathlib
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from tunix.models.qwen3 import model as qwen3
from tunix.rl import rl_cluster
from tunix.rl.grpo import grpo_learner
from tunix.rl.rollout import base_rollout

# No token: nothing that is sampled is the end, or padding, so that completions are of full length.
NONE = -1


class Numbers:
    """A tokenizer whose text is the ids themselves: no time goes into text."""

    def encode(self, text: str, **_) -> list[int]:
        """Ids of "1 2 3"."""
        return [int(word) for word in text.split()]

    def decode(self, ids: list[int], **_) -> str:
        """The reverse."""
        return " ".join(map(str, ids))

    def bos_id(self) -> int:
        """0: the sampler puts nothing before a prompt."""
        return 0

    def eos_id(self) -> int:
        """Not a token."""
        return NONE

    def pad_id(self) -> int:
        """Not a token."""
        return NONE


def even(prompts, completions: list[str], **_) -> list[float]:
    """The reward: the share of even ids among each completion's."""
    del prompts
    tokens = (np.array(text.split(), int) for text in completions)
    return [float((ids % 2 == 0).mean()) for ids in tokens]


def load(sizes: dict, weights) -> qwen3.Qwen3:
    """The model with our weights, named as Tunix names them."""
    model = qwen3.Qwen3(qwen3.ModelConfig(**sizes["model"]), rngs=nnx.Rngs(0))

    def ours(path, leaf):
        keys = [str(k.key) for k in path if isinstance(k, jax.tree_util.DictKey)]
        return jnp.asarray(weights["/".join(keys)]).reshape(leaf.shape)

    nnx.update(model, jax.tree_util.tree_map_with_path(ours, nnx.state(model)))
    return model


def learner_of(sizes: dict, model: qwen3.Qwen3) -> grpo_learner.GRPOLearner:
    """Tunix's learner with its own sampler, on one device."""
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:1]).reshape(1, 1), ("fsdp", "tp"))
    roles = (rl_cluster.Role.ACTOR, rl_cluster.Role.ROLLOUT, rl_cluster.Role.REFERENCE)
    training = rl_cluster.RLTrainingConfig(
        actor_optimizer=optax.chain(
            optax.clip_by_global_norm(1.0),
            optax.adamw(sizes["rate"], b1=0.9, b2=0.95, weight_decay=0.0),
        ),
        eval_every_n_steps=10**9,
        max_steps=10**9,
    )
    rollout = base_rollout.RolloutConfig(
        max_tokens_to_generate=sizes["completion"],
        max_prompt_length=sizes["prompt"],
        kv_cache_size=sizes["prompt"] + sizes["completion"],
        temperature=1.0,
        eos_tokens=[NONE],
    )
    cluster = rl_cluster.RLCluster(
        actor=model,
        tokenizer=Numbers(),
        cluster_config=rl_cluster.ClusterConfig(
            role_to_mesh=dict.fromkeys(roles, mesh),
            rollout_engine="vanilla",
            training_config=training,
            rollout_config=rollout,
        ),
    )
    # Without a penalty there is no reference, whose pass would be a part of the step.
    config = grpo_learner.GRPOConfig(num_generations=sizes["group"], beta=0.0)
    return grpo_learner.GRPOLearner(cluster, config, reward_fns=even)


def check(learner: grpo_learner.GRPOLearner, prompts, given) -> dict[str, float]:
    """How our rollout looks here: our log-probabilities against theirs, and their gradient."""
    cluster = learner.rl_cluster
    group = learner.algo_config.num_generations
    prompts, tokens = jnp.repeat(prompts, group, axis=0), jnp.asarray(given["tokens"])
    found = cluster.rollout.get_per_token_logps(prompts, tokens)
    example = grpo_learner.TrainExample(
        prompt_ids=prompts,
        prompt_mask=jnp.ones_like(prompts, bool),
        completion_ids=tokens,
        completion_mask=jnp.ones_like(tokens, bool),
        ref_per_token_logps=None,
        advantages=jnp.asarray(given["advantages"]),
        old_per_token_logps=None,
    )

    @nnx.jit
    def norm(model, example):
        loss = lambda model: cluster.actor_trainer.loss_fn(model, example, learner.algo_config)  # noqa: E731
        grads, _ = nnx.grad(loss, has_aux=True)(model)
        return optax.global_norm(grads)

    return {
        "gap": float(jnp.abs(found - given["logprobs"]).max()),
        "gradient": float(norm(cluster.actor_trainer.model, example)),
    }


class Clock:
    """Seconds in the learner's calls since the last `read`."""

    def __init__(self, cluster: rl_cluster.RLCluster):
        self._seconds, self._tokens = {}, 0
        cluster.generate = self._timed("sampling", cluster.generate)
        cluster.update_actor = self._timed("update", cluster.update_actor)

    def _timed(self, name: str, call):
        def run(*args, **kwargs):
            began = time.perf_counter()
            found = call(*args, **kwargs)
            self._seconds[name] = time.perf_counter() - began
            if name == "sampling":
                self._tokens = sum(map(len, found.tokens))
            return found

        return run

    def read(self) -> dict[str, float]:
        """The seconds by name, and the number of tokens that were sampled."""
        found, self._seconds = self._seconds | {"tokens": self._tokens}, {}
        return found


def main():
    """Answers until its input ends."""
    # What a library prints must not come between the answers.
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    folder = pathlib.Path(sys.argv[1])
    sizes = json.loads((folder / "sizes.json").read_text())
    given = np.load(folder / "rollout.npz")
    prompts = given["prompts"]
    learner = learner_of(sizes, load(sizes, np.load(folder / "weights.npz")))
    found = check(learner, jnp.asarray(prompts), given)
    clock = Clock(learner.rl_cluster)

    def say(what) -> None:
        answers.write(json.dumps(what) + "\n")

    def steps():
        """Prompts for a step when one is asked for: the learner asks for them one at a time."""
        texts = [" ".join(map(str, row)) for row in prompts]
        say(found | {"jax": jax.__version__})
        for _ in sys.stdin:
            began = time.perf_counter()
            yield {"prompts": np.array(texts, object)}
            say(clock.read() | {"step": time.perf_counter() - began})

    learner.train(steps())


if __name__ == "__main__":
    main()
