"""A model on a benchmark.

    python eval.py --config=configs/eval.py:videomme \
        --config.data_dir=Video-MME --config.weights=runs/prpo/model

Benchmarks: videomme, longvideobench, mlvu, lvbench, longtimescope, and records (any JSONL file of
the project's records). --workdir, by default runs/BENCHMARK/MODEL, gets results.json,
samples.jsonl and report.html; the same command goes on where it was stopped.
"""

from videomem_jax.benchmark import config


def get_config(benchmark=None):
    """All keys with their meaning are in videomem_jax/benchmark/config.py."""
    return config.default(benchmark)
