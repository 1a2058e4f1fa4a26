"""Weights in Hugging Face's layout: a folder with config.json and safetensors, in and out.

    python -m videomem_jax.models.convert --help

turns a run's checkpoints into such a folder and back, and merges LoRA adapters.
"""

from videomem_jax.models.convert.lora import merge_lora
from videomem_jax.models.convert.read import load_pretrained
from videomem_jax.models.convert.table import Tensors, WeightsError, tensors
from videomem_jax.models.convert.write import save_pretrained

__all__ = [
    "Tensors",
    "WeightsError",
    "load_pretrained",
    "merge_lora",
    "save_pretrained",
    "tensors",
]
