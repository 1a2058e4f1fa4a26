"""A folder with a random model, as Hugging Face lays one out."""

import jax
import numpy as np
from flax import nnx

from videomem_jax.models import convert
from videomem_jax.models.qwen3_vl import abstract


def write(folder, config, tokenizer, tags=True):
    """Weights drawn so that activations keep their size; `tags`: whether the tokenizer has them."""
    graph, shapes = nnx.split(abstract(config))
    rng = np.random.default_rng(0)

    def draw(path, leaf):
        if path[-2].key == "scale":
            return np.ones(leaf.shape, np.float32)
        spread = leaf.shape[-2] ** -0.5 if path[-2].key == "kernel" else 0.1
        return spread * rng.standard_normal(leaf.shape, np.float32)

    state = jax.tree_util.tree_map_with_path(draw, shapes)
    convert.save_pretrained(nnx.merge(graph, jax.tree.map(jax.numpy.asarray, state)), folder)
    tokenizer.save(folder, tags=tags)
    return folder
