"""A training step of PRPO as the field writes it, with transformers on torch.

It is TRL's GRPOTrainer at its best. In the rollout a prompt is run once, its cache is repeated over
the group, and a loop draws tokens without what `generate` does between steps. In the update each of
the G sequences is run with its prompt, logits for its completion only. The tower is frozen, and
what it saw is kept for the update; prompts of a group are equally long, so that there is no padding
and no mask, and attention takes the causal kernel. `torch_prpo` holds ours against it.
"""

import time
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import torch
import transformers
from einops import rearrange, repeat
from jaxtyping import Float, Int

from benchmarks.side_by_side import in_torch
from videomem_jax import grammar as fmt
from videomem_jax import memory as mem
from videomem_jax import settings as cfg
from videomem_jax.batch import Batch
from videomem_jax.models.qwen3_vl import Qwen3VL
from videomem_jax.trainer import Rows


class Step(NamedTuple):
    """One step: its seconds, and by what it is known to be the same as another.

    old, advantages: of each token and completion, when sampled.
    """

    rollout: float
    update: float
    loss: float
    norm: float
    old: Float[np.ndarray, "t b g c"]
    advantages: Float[np.ndarray, "t b g"]


class Seen(NamedTuple):
    """A segment's prompts, and what the tower saw: [b, s], [3, b, s], [b, v, d], [D, b, v, d]."""

    tokens: torch.Tensor
    positions: torch.Tensor
    embeds: torch.Tensor
    deepstack: torch.Tensor

    def repeated(self, example: int, count: int) -> "Seen":
        """One example's prompt so many times."""
        tokens, positions, embeds, deepstack = self
        at = slice(example, example + 1)
        return Seen(
            tokens[at].repeat(count, 1),
            positions[:, at].repeat(1, count, 1),
            embeds[at].repeat(count, 1, 1),
            deepstack[:, at].repeat(1, count, 1, 1),
        )


class Theirs:
    """The step with transformers, given the tokens that ours sampled."""

    def __init__(
        self,
        model: Qwen3VL,
        form: mem.Format,
        settings: cfg.Settings,
        batch: Batch,
        attention: str,
        micro: int,
    ):
        """`micro`: sequences of a group that are run together in the update."""
        self.model = in_torch(model, attention)
        self.model.model.visual.requires_grad_(False)
        self.form, self.batch, self.settings, self.micro = form, batch, settings, micro
        self.trained = [p for p in self.model.parameters() if p.requires_grad]
        o = settings.prpo.optimizer
        self.optimizer = torch.optim.AdamW(
            self.trained, o.learning_rate, (o.b1, o.b2), weight_decay=o.weight_decay
        )
        # All samples are equally long, and so in the same state of the format at each token.
        inside = [fmt.State.MEMORY] * settings.memory.slots
        after = [fmt.State.FULL, fmt.State.REMEMBERED, fmt.State.ANSWER, fmt.State.FULL_ANSWER]
        states = jnp.array([[fmt.State.START, *inside, *after, fmt.State.CLOSED]])
        allowed = fmt.permitted(form.grammar, states, jnp.asarray(batch.choices[:1]))
        self.allowed = torch.tensor(np.asarray(allowed[0]))

    def step(self, rows: Rows, number: int) -> Step:
        """The next step, on the completions that ours sampled."""
        began = time.perf_counter()
        segments = [self.roll(rows, segment, number) for segment in range(len(rows.tokens))]
        rolled = time.perf_counter()
        loss, norm = self.update(*zip(*segments, strict=True))
        ended = time.perf_counter()
        old, advantages = (np.stack([segment[i].numpy() for segment in segments]) for i in (2, 3))
        return Step(rolled - began, ended - rolled, loss, norm, old, advantages)

    # --- the model ---

    def see(self, rows: Rows, segment: int) -> Seen:
        """A segment's prompts but for their last token, which opens the samples."""
        ids, prefix = self.form.ids, jax.tree.map(lambda a: a[:, segment], self.batch.prefix)
        tail = [
            [ids.memory_open, *memory[:length], ids.memory_close, *self.form.turn_end[:-1]]
            for memory, length in zip(*(a[segment] for a in rows.before), strict=True)
        ]
        real = prefix.mask[0]  # segments differ in length, but not the examples of one
        tokens = np.concatenate([prefix.tokens[:, real], tail], 1)
        place = prefix.next_position[:, None] + np.arange(len(tail[0]))
        positions = np.concatenate([prefix.positions[..., real], repeat(place, "b s -> b 3 s")], 2)
        clip = self.batch.clip.patches[:, segment].astype(np.float32) / 127.5 - 1
        grid = [[clip.shape[1], *shape] for shape in self.batch.clip.grid[:, segment]]
        seen = self.model.model.get_video_features(
            torch.tensor(rearrange(clip, "b f q e -> (b f q) e")), torch.tensor(grid)
        )
        return Seen(
            torch.tensor(tokens).long(),
            torch.tensor(rearrange(positions, "b three s -> three b s")).long(),
            torch.stack(seen.pooler_output),
            torch.stack([torch.stack(each) for each in seen.deepstack_features]),
        )

    def hidden(self, tokens, positions, seen: Seen | None = None, cache=None) -> torch.Tensor:
        """Hidden states [b, s, d] of tokens [b, s]; in the prompts' places stands what was seen."""
        x = self.model.get_input_embeddings()(tokens)
        vision = {}
        if seen is not None:
            there = tokens == self.form.ids.video_pad
            x = x.masked_scatter(there[..., None], seen.embeds)
            vision["visual_pos_masks"] = there
            vision["deepstack_visual_embeds"] = [each.flatten(0, 1) for each in seen.deepstack]
        return self.model.model.language_model(
            inputs_embeds=x,
            position_ids=positions,
            cache=cache,
            use_cache=cache is not None,
            **vision,
        ).last_hidden_state

    def logprobs(self, hidden, allowed) -> torch.Tensor:
        """The distribution that is sampled from, [..., vocab]."""
        logits = self.model.lm_head(hidden) / self.settings.prpo.temperature
        return torch.log_softmax(logits.masked_fill(~allowed, -1e30), -1)

    # --- rollout ---

    @torch.no_grad()
    def roll(self, rows: Rows, segment: int, number: int):
        """Reads a clip: prompts, completions [b, g, c], their log-probabilities, advantages."""
        seen, group = self.see(rows, segment), self.settings.prpo.group_size
        cache = transformers.DynamicCache(config=self.model.config.text_config)
        self.hidden(seen.tokens, seen.positions, seen, cache)
        cache.batch_repeat_interleave(group)
        known = torch.tensor(rows.tokens[segment]).long()
        place = seen.positions[:, :, -1:].repeat_interleave(group, 1)
        old = self.sample(known.flatten(0, 1), place, cache).view(known.shape)
        judged = [self.judge(*each, number) for each in zip(known, self.batch.gold, strict=True)]
        return seen, known, old, torch.stack(judged)

    def sample(self, known, place, cache) -> torch.Tensor:
        """Log-probabilities of `known` [n, c], which are read as if they had been drawn."""
        token, found = torch.full((len(known), 1), self.form.turn_end[-1]), []
        for index in range(known.shape[1]):
            hidden = self.hidden(token, place + 1 + index, cache=cache)[:, 0]
            logp = self.logprobs(hidden, self.allowed[index])
            torch.multinomial(logp.exp(), 1)
            token = known[:, index : index + 1]
            found.append(logp.gather(1, token))
        return torch.cat(found, 1)

    def judge(self, completions, gold: int, number: int) -> torch.Tensor:
        """Advantages of a group [g, c]; draws the memory that would be handed on."""
        p, ids, letters = self.settings.prpo, self.form.ids, self.batch.choices[0, :, 0].tolist()
        rewards, good = [], []
        for tokens in completions.tolist():
            close = tokens.index(ids.memory_close) if ids.memory_close in tokens else -1
            end = [ids.answer_open, tokens[close + 2], ids.answer_close, ids.im_end]
            right_form = tokens[0] == ids.memory_open and tokens[close + 1 :] == end
            good.append(right_form and end[1] in letters)
            over = max(0, close - 1 - self.settings.memory.budget)
            right = good[-1] and letters.index(end[1]) == gold
            rewards.append(p.alpha * right + good[-1] - p.beta * over)
        rewards, good = torch.tensor(rewards), torch.tensor(good)
        advantages = (rewards - rewards.mean()) / (rewards.std(correction=0) + 1e-6)
        tau = max(p.tau_0 * p.gamma**number, p.tau_min)
        torch.multinomial(torch.softmax((advantages / tau).masked_fill(~good, -1e30), -1), 1)
        return advantages

    # --- update ---

    def update(self, seen, known, old, advantages) -> tuple[float, float]:
        """One optimizer step on all segments; loss and norm of the gradient."""
        self.optimizer.zero_grad()
        loss, (b, g, _), parts = 0.0, known[0].shape, range(0, known[0].shape[1], self.micro)
        for prompts, tokens, before, worth in zip(seen, known, old, advantages, strict=True):
            for example in range(b):
                for begin in parts:
                    at = example, slice(begin, begin + self.micro)
                    prompt = prompts.repeated(example, len(tokens[at]))
                    part = self.loss(prompt, tokens[at], before[at], worth[at])
                    part = part / (len(known) * b * g)
                    part.backward()
                    loss += float(part.detach())
        norm = torch.nn.utils.clip_grad_norm_(self.trained, self.settings.prpo.optimizer.clip_norm)
        self.optimizer.step()
        return loss, float(norm)

    def loss(self, prompt: Seen, tokens: Int[torch.Tensor, "r c"], old, advantages) -> torch.Tensor:
        """Sum over completions of the mean over tokens of objective and bonus."""
        p, (r, c) = self.settings.prpo, tokens.shape
        opening = torch.full((r, 1), self.form.turn_end[-1])
        place = prompt.positions[:, :, -1:] + 1 + torch.arange(c)
        hidden = self.hidden(
            torch.cat([prompt.tokens, opening, tokens[:, :-1]], 1),
            torch.cat([prompt.positions, place], 2),
            prompt,
        )
        logp = self.logprobs(hidden[:, -c:], self.allowed)
        chosen = logp.gather(2, tokens[..., None])[..., 0]
        entropy = -(logp.exp() * logp.clamp(min=-1e4)).sum(-1)
        ratio, worth = (chosen - old).exp(), advantages[:, None]
        clipped = ratio.clamp(1 - p.clip_low, 1 + p.clip_high)
        each = -torch.minimum(ratio * worth, clipped * worth) - p.entropy_coef * entropy
        return each.mean(-1).sum()
