"""Host memory while a model is loaded: what the process holds beyond the parameters themselves.

    python -m benchmarks.load_memory --folder /tmp/weights        # made there if absent, then kept

The folder gets random bfloat16 weights in several files, of Qwen3-VL-2B's widths and vocabulary but
fewer layers (about 1.5 GB). On a CPU the parameters lie in host memory too, so the bar is put on
the peak, over the time of loading, of the process's own memory less the bytes of all arrays that
JAX holds at that moment. (Own memory is RssAnon: pages of the mapped files, which the system drops
when it needs room, are not counted.) Linux only.
"""

import argparse
import dataclasses
import json
import pathlib
import threading
import time

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from flax import nnx
from safetensors.numpy import save_file

from videomem_jax.models import convert
from videomem_jax.models.config import Qwen3VLConfig
from videomem_jax.models.presets import preset
from videomem_jax.models.qwen3_vl import abstract

BAR = 1.5


def make(folder: pathlib.Path, layers: int, depth: int, file_bytes: int) -> None:
    """Writes random weights, a file at a time."""
    whole = preset("2b")
    text = dataclasses.replace(whole.text, num_hidden_layers=layers)
    vision = dataclasses.replace(whole.vision, depth=depth, deepstack_visual_indexes=(0, 1, 2))
    config = dataclasses.replace(whole, text=text, vision=vision)
    folder.mkdir(parents=True, exist_ok=True)
    rng, names, content, size = np.random.default_rng(0), {}, {}, 0
    noise = rng.standard_normal(2**20, np.float32).astype(ml_dtypes.bfloat16)

    def flush():
        file = f"model-{len(set(names.values())) + 1:05d}.safetensors"
        save_file(content, folder / file, metadata={"format": "pt"})
        names.update(dict.fromkeys(content, file))
        content.clear()

    for entry in convert.tensors(abstract(config)):
        for name in entry.names:
            content[name] = np.resize(noise, entry.shape)
            size += content[name].nbytes
            if size > file_bytes:
                flush()
                size = 0
    flush()
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))
    (folder / "config.json").write_text(json.dumps(config.to_hf()))


def own_memory() -> int:
    """Bytes of this process that are not pages of files."""
    for line in pathlib.Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    raise SystemExit("error: this system does not say what memory a process holds (RssAnon)")


class Peak(threading.Thread):
    """Watches the process every few milliseconds.

    Attributes:
      most: largest `own_memory` seen.
      beyond: largest excess of it over the arrays that JAX holds.
    """

    def __init__(self):
        super().__init__(daemon=True)
        self.most, self.beyond, self._done = 0, 0, threading.Event()

    def run(self):
        while not self._done.is_set():
            own, held = own_memory(), sum(array.nbytes for array in jax.live_arrays())
            self.most, self.beyond = max(self.most, own), max(self.beyond, own - held)
            time.sleep(0.003)

    def stop(self) -> None:
        """Ends the watch."""
        self._done.set()
        self.join()


def measure(folder: pathlib.Path, dtype) -> bool:
    """Loads the folder and prints what it took; whether the bar is kept."""
    table = convert.tensors(abstract(Qwen3VLConfig.load(folder)))
    largest = max(table, key=lambda e: int(np.prod(e.shape)))
    layer = int(np.prod(largest.shape)) * jnp.dtype(dtype).itemsize
    jax.jit(lambda: jnp.zeros(8))().block_until_ready()
    before, peak, began = own_memory(), Peak(), time.perf_counter()
    peak.start()
    model = convert.load_pretrained(folder, param_dtype=dtype)
    seconds = time.perf_counter() - began
    peak.stop()
    held = sum(leaf.nbytes for leaf in jax.tree.leaves(nnx.state(model, nnx.Param)))
    beyond = (peak.beyond - before) / layer
    print(
        f"{jnp.dtype(dtype).name}: {held / 1e9:.2f} GB of parameters in {seconds:.1f} s; largest "
        f"layer {'.'.join(largest.path)}, {layer / 1e9:.3f} GB; own memory {before / 1e9:.2f} GB "
        f"before, {peak.most / 1e9:.2f} GB at most; beyond the arrays {beyond:.2f} x the largest "
        f"layer (bar {BAR})"
    )
    return beyond < BAR


def main():
    """Makes the folder where it is absent, and measures the dtypes asked for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=pathlib.Path, required=True)
    parser.add_argument("--layers", type=int, default=6, help="of the decoder")
    parser.add_argument("--depth", type=int, default=4, help="of the vision tower, at least 3")
    parser.add_argument("--file_bytes", type=int, default=200_000_000, help="a file, about")
    parser.add_argument("--dtype", default="float32", help="of the parameters in memory")
    args = parser.parse_args()
    if not (args.folder / "config.json").exists():
        make(args.folder, args.layers, args.depth, args.file_bytes)
    raise SystemExit(0 if measure(args.folder, jnp.dtype(args.dtype)) else 1)


if __name__ == "__main__":
    main()
