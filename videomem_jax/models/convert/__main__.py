"""Checkpoints and Hugging Face folders, from the command line.

    python -m videomem_jax.models.convert to-hf runs/demo/checkpoints/prpo OUT
    python -m videomem_jax.models.convert to-orbax DIR runs/new/checkpoints/prpo --config FILE
    python -m videomem_jax.models.convert merge-lora DIR ADAPTER OUT
    python -m videomem_jax.models.convert from-gguf FILE OUT
    python -m videomem_jax.models.convert add-rows DIR OUT

COMMAND --help says what each takes.
"""

# An entry, like train.py, and not imported by the package: it alone knows runs and checkpoints.

from __future__ import annotations

import argparse
import contextlib
import functools
import json
import pathlib
import runpy

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from ml_collections import config_dict

from videomem_jax import command_line, export, run, settings, sharding
from videomem_jax.checkpoint import CheckpointError, Checkpoints, steps_in, trained_parameters
from videomem_jax.models import convert
from videomem_jax.models.config import ConfigError, Qwen3VLConfig
from videomem_jax.models.convert import gguf
from videomem_jax.models.convert.read import open_tensors
from videomem_jax.models.convert.write import copy_companions
from videomem_jax.models.qwen3_vl import abstract, with_rows
from videomem_jax.tokenizer import Tokenizer
from videomem_jax.trainer import Trainer

_PHASES = ("coldstart", "prpo")


def _phase(folder: pathlib.Path) -> tuple[pathlib.Path, str]:
    """Workdir and phase of WORKDIR/checkpoints/PHASE; ConfigError if it is no such folder."""
    folder = folder.absolute()
    if folder.name not in _PHASES or folder.parent.name != "checkpoints":
        raise ConfigError(
            f"{folder} is no folder of checkpoints: give WORKDIR/checkpoints/coldstart or "
            f"WORKDIR/checkpoints/prpo"
        )
    return folder.parent.parent, folder.name


def _config(workdir: pathlib.Path, file: str | None) -> config_dict.ConfigDict:
    """The run's configuration: of `file`, or else the one that the run's folder keeps."""
    try:
        if file:
            return runpy.run_path(file)["get_config"]()
        return config_dict.ConfigDict(json.loads((workdir / "config.json").read_text()))
    except FileNotFoundError as error:
        raise ConfigError(
            f"{error.filename} does not exist: give the run's configuration with --config FILE"
        ) from None
    except (KeyError, ValueError, SyntaxError) as error:
        raise ConfigError(
            f"{file or workdir / 'config.json'} is no configuration ({error})"
        ) from None


def _base(workdir: pathlib.Path, phase: str, weights: str) -> pathlib.Path:
    """The folder whose weights the phase started from, and whose frozen ones it still has."""
    before = workdir / "coldstart_model"
    if phase == "prpo" and (before / "config.json").exists():
        return before
    return pathlib.Path(weights or run.BASE)


def to_hf(args: argparse.Namespace) -> None:
    """Writes a checkpoint's model as a Hugging Face folder."""
    workdir, phase = _phase(args.checkpoints)
    step, trained = trained_parameters(args.checkpoints, args.step)
    base = args.base
    if base is None:
        base = _base(workdir, phase, _config(workdir, None).model.weights)
    tokenizer = Tokenizer.load(base)
    model = convert.load_pretrained(base)
    state = nnx.state(model, nnx.Param)

    def replaced(keys, leaf):
        path = tuple(str(key.key) for key in keys[:-1])
        new = trained.pop(path, None)
        if new is None:
            return leaf
        if new.shape != leaf.shape:
            raise CheckpointError(
                f"{args.checkpoints}: {'.'.join(path)} has shape {list(new.shape)}, but in {base} "
                f"{list(leaf.shape)}: name the folder that the run started from with --base"
            )
        return jnp.asarray(new)

    state = jax.tree_util.tree_map_with_path(replaced, state)
    if trained:
        raise CheckpointError(
            f"{args.checkpoints}: {'.'.join(next(iter(trained)))} is not in the model of {base}: "
            f"name the folder that the run started from with --base"
        )
    nnx.update(model, state)
    export.save(model, tokenizer, args.out, source=base, dtype=args.dtype)
    print(f"{args.out}: the model of {phase}, step {step}")


def to_orbax(args: argparse.Namespace) -> None:
    """Writes a Hugging Face folder as the checkpoint from which a run's phase starts.

    It is the whole training state at step 0: the weights, and a fresh optimiser.
    """
    workdir, phase = _phase(args.checkpoints)
    if steps_in(args.checkpoints):
        raise CheckpointError(
            f"{args.checkpoints} already holds checkpoints: choose the folder of a new run"
        )
    config = _config(workdir, args.config)
    s = settings.freeze(config)
    s = settings.for_devices(s, jax.device_count())
    mesh = sharding.make_mesh(s.mesh)
    shards = functools.partial(sharding.parameter_shardings, mesh)
    loaded = run.load(s, args.model, shardings=shards)
    trainer = Trainer(loaded.model, loaded.form, s, mesh, phase)
    _check_frozen(trainer.frozen, args.model, _base(workdir, phase, s.model.weights))
    run.open_workdir(str(workdir), config, fresh=True)
    checkpoints = Checkpoints(args.checkpoints, s.checkpoints.keep)
    checkpoints.save(0, trainer.first, {})
    checkpoints.close()
    print(f"{args.checkpoints}: the model of {args.model} as step 0 of {phase}")


def _check_frozen(frozen, given: pathlib.Path, base: pathlib.Path) -> None:
    """CheckpointError unless what a checkpoint does not hold is the same in both folders."""
    paths = {
        tuple(str(key.key) for key in keys[:-1])
        for keys, _ in jax.tree_util.tree_flatten_with_path(frozen)[0]
    }
    with contextlib.ExitStack() as stack:
        ours, theirs = (open_tensors(folder, stack) for folder in (given, base))
        for entry in convert.tensors(abstract(Qwen3VLConfig.load(given))):
            for name in entry.names if entry.path in paths else ():
                other = theirs.get(name)
                if other is None or not np.array_equal(ours[name].slice[:], other.slice[:]):
                    raise CheckpointError(
                        f"{given}: {name} is not trained in this run, and differs from that of "
                        f"{base}: set model.weights to {given} in the configuration"
                    )


def merge_lora(args: argparse.Namespace) -> None:
    """Writes a model with a LoRA adapter merged into its weights."""
    tokenizer, model = Tokenizer.load(args.model), convert.load_pretrained(args.model)
    model.start_tokens(tokenizer.new_tags)
    changed = convert.merge_lora(model, args.adapter)
    export.save(model, tokenizer, args.out, source=args.model, dtype=args.dtype)
    print(f"{args.out}: {args.model} with {changed} matrices of {args.adapter} merged")


def from_gguf(args: argparse.Namespace) -> None:
    """Writes a GGUF file of a Llama or Qwen3 as a Hugging Face folder."""
    gguf.convert(args.file, args.out, jnp.dtype(args.dtype or "float32"))
    print(f"{args.out}: the model of {args.file}")


def add_rows(args: argparse.Namespace) -> None:
    """Writes a model whose embedding has rows for the tags of the memory format."""
    tokenizer, model = Tokenizer.load(args.model), convert.load_pretrained(args.model)
    rows = gguf.rows_for(len(tokenizer), model.config.text.vocab_size)
    args.out.mkdir(parents=True, exist_ok=True)
    copy_companions(args.model, args.out)
    export.save(with_rows(model, rows), tokenizer, args.out, dtype=args.dtype)
    print(f"{args.out}: the model of {args.model} with {rows} rows")


def parser() -> argparse.ArgumentParser:
    """The command line."""
    whole = command_line.parser_of("videomem_jax.models.convert", __doc__)
    parts = whole.add_subparsers(required=True, metavar="COMMAND")

    def command(name, function, *folders):
        part = parts.add_parser(name, help=function.__doc__.splitlines()[0])
        part.set_defaults(function=function)
        for folder, text in folders:
            part.add_argument(folder, type=pathlib.Path, help=text)
        return part

    place, out = "WORKDIR/checkpoints/PHASE of a run", "folder to write"
    hf = "folder in Hugging Face's layout, with its tokenizer"
    one = command("to-hf", to_hf, ("checkpoints", place), ("out", out))
    one.add_argument("--step", type=int, help="of the checkpoint; by default the newest")
    one.add_argument("--base", type=pathlib.Path, help="the folder that the run started from")
    two = command("to-orbax", to_orbax, ("model", hf), ("checkpoints", place))
    two.add_argument("--config", help="the run's configuration, such as configs/demo.py")
    three = command(
        "merge-lora", merge_lora, ("model", hf), ("adapter", "folder of peft"), ("out", out)
    )
    four = command("from-gguf", from_gguf, ("file", "of llama.cpp's format"), ("out", out))
    five = command("add-rows", add_rows, ("model", hf), ("out", out))
    for part in (one, three, four, five):
        part.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), help="of all")
    return whole


def main(argv: list[str] | None = None) -> None:
    """Runs one command; a user's mistake ends it with one sentence and exit code 2."""
    args = parser().parse_args(argv)
    command_line.entry(lambda: args.function(args))


if __name__ == "__main__":
    main()
