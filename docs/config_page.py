"""Writes docs/config.md, the reference of all keys, from the source that defines them.

python docs/config_page.py
"""

import pathlib
import runpy
import sys

ROOT = pathlib.Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from videomem_jax import keys, settings  # noqa: E402
from videomem_jax.benchmark import config as benchmark  # noqa: E402

PAGE = ROOT / "docs" / "config.md"
CONFIGS = ("demo", "prpo_tpu", "prpo_colab", "prpo_gpu")
_HEAD = """\
<!-- Written by docs/config_page.py: change the comments in settings.py instead. -->
# Configuration

Every number that a run depends on is a key. A file of `configs/` gives them values; on the command
line `--config.KEY=VALUE` overrides one. A key that there is not, or a value that cannot be, ends
the command with one sentence before anything expensive. In a terminal,
`python -m videomem_jax.keys` prints what is below.
"""
_CHANGES = """
## What the configurations change

Beside the defaults. `coldstart_tpu.py` is `prpo_tpu.py` with `prpo.steps` 0; `prpo_gpu.py:lora` has
the adapters, batches and learning rates of `prpo_colab.py`.
"""
_BENCHMARK = """
## Benchmarks

The keys of `configs/eval.py`: see [Benchmarks](benchmarks.md). Its `mesh`, `judge` and `runtime`
have the keys of the parts above.
"""


def page() -> str:
    """The whole page."""
    lines = [_HEAD]
    for part in keys.parts(settings.Settings):
        lines.append(f"## `config{'.' * bool(part.name)}{part.name}`\n\n{part.about}\n")
        lines.append(_table(part.keys))
    return "\n".join([*lines, _CHANGES, _changes(), _BENCHMARK, _benchmark()])


def _table(rows: tuple[keys.Key, ...]) -> str:
    lines = ["| key | default | |", "|---|---|---|"]
    lines += [f"| `{k.name}` | {_value(k.default)} | {_text(k.meaning)} |" for k in rows]
    return "\n".join(lines) + "\n"


def _benchmark() -> str:
    return _table(keys.parts(benchmark.Config)[0].keys)


def _changes() -> str:
    """A row for each key that some configuration gives another value than its default."""
    found = {
        name: runpy.run_path(str(ROOT / "configs" / f"{name}.py"))["get_config"]()
        for name in CONFIGS
    }
    lines = [f"| key | default | {' | '.join(found)} |", "|---" * (len(found) + 2) + "|"]
    for part in keys.parts(settings.Settings):
        for key in part.keys:
            values = [_at(config, key.name) for config in found.values()]
            if any(value != key.default for value in values):
                cells = [_value(v) if v != key.default else "" for v in values]
                lines.append(f"| `{key.name}` | {_value(key.default)} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _at(config, name: str):
    for part in name.split("."):
        config = config[part]
    return config


def _value(value) -> str:
    return f"`{value!r}`" if value != "" else '`""`'


def _text(text: str) -> str:
    return text.replace("|", "\\|").replace("<", "&lt;")


if __name__ == "__main__":
    PAGE.write_text(page())
    print(PAGE)
