"""What all commands share: their flags, and that a user's mistake is one sentence."""

from __future__ import annotations

import argparse
import difflib
import errno
import logging
import os
import pathlib
import re
import runpy
import sys
from collections.abc import Callable

from absl import flags
from ml_collections import config_dict

from videomem_jax import hosts, llm
from videomem_jax.checkpoint import CheckpointError
from videomem_jax.data import facts, needle, records
from videomem_jax.data.video import VideoError
from videomem_jax.models import convert
from videomem_jax.models.config import ConfigError
from videomem_jax.prompt import PromptError
from videomem_jax.report_run import ReportError

CONFIG_HELP = (
    "File of the configuration, such as configs/demo.py. --config.KEY=VALUE changes a key; "
    "python -m videomem_jax.keys lists them all."
)

# Errors whose message is a sentence for the user; anything else is a bug and keeps its trace.
SAID = (
    ConfigError,
    records.RecordError,
    VideoError,
    PromptError,
    CheckpointError,
    facts.FactsError,
    needle.NeedleError,
    ReportError,
    convert.WeightsError,
    llm.LLMError,
    hosts.HostsError,
)


def entry(main: Callable[[], None]) -> None:
    """Runs an entry's work; a user's mistake ends it with one sentence and exit code 2.

    Being told to stop, and having saved everything, ends it with exit code 143.
    """
    # Read when the first device is asked for. On a CPU products are left to YNNPACK, one by one; as
    # parts of larger fusions, or its sums, they are slower, and XLA's own products slower still.
    flag = "--xla_cpu_experimental_ynn_fusion_type=individual_dot"
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {flag}".strip()
    sys.unraisablehook = _without_closed_loops
    for name in ("absl", "jax"):  # what is no warning is not for this command's reader
        logging.getLogger(name).setLevel(logging.WARNING)
    try:
        main()
    except hosts.Stopped as stop:
        print(stop)
        sys.exit(hosts.EXIT_STOPPED)
    except SAID as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        what = error.strerror or str(error)
        if error.errno == errno.ENOSPC:
            what = "the disk is full; free some space and start the same command again, it goes on"
        print(f"error: {where}{what}", file=sys.stderr)
        sys.exit(2)


def _without_closed_loops(unraisable) -> None:
    """Keeps from the reader what orbax's event loops say when a failed save ends the process."""
    if str(unraisable.exc_value) != "Event loop is closed":
        sys.__unraisablehook__(unraisable)


def parse_flags(argv: list[str]) -> list[str]:
    """absl's parser of the command line, with a sentence for a key that the config has not."""
    try:
        _file_config(argv)
    except ConfigError as error:  # the file itself has something to say of its argument
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    try:
        return flags.FLAGS(argv)
    except flags.Error as error:
        print(f"error: {_wrong_value(argv, str(error))}", file=sys.stderr)
        sys.exit(2)
    except (AttributeError, KeyError):  # what ml_collections raises for such a key
        names = [arg.lstrip("-").split("=")[0] for arg in argv]
        for name in names:
            inside = _file_config(argv) if name.startswith("config.") else None
            for part in name.split(".")[1:]:
                if not isinstance(inside, config_dict.ConfigDict):
                    break
                if part not in inside:
                    close = difflib.get_close_matches(part, inside, 1)
                    keys = f"there are {', '.join(inside)}"
                    hint = f"did you mean {close[0]}?" if close else keys
                    print(f"error: {name} is not a key: {hint}", file=sys.stderr)
                    sys.exit(2)
                inside = inside[part]
        raise


def _wrong_value(argv: list[str], said: str) -> str:
    """What absl says of a flag; of a key's value, what it must be."""
    match = re.match(r"flag --(config\.([\w.]+))=(.*?): ", said, re.DOTALL)
    inside = _file_config(argv) if match else None
    for part in match[2].split(".") if match else ():
        inside = inside[part] if isinstance(inside, config_dict.ConfigDict) else None
    if inside is None:
        return " ".join(said.split())
    if isinstance(inside, config_dict.ConfigDict):
        return f"{match[1]} is a part of the keys: give one of them, {', '.join(inside)}"
    kind = type(inside).__name__
    return f"{match[1]}={match[3]} must be of type {kind}, such as {inside!r}"


def _file_config(argv: list[str]) -> config_dict.ConfigDict | None:
    """The config of the command line's file, before any override."""
    for arg in argv:
        name, _, value = arg.lstrip("-").partition("=")
        path, *argument = value.split(":", 1)
        if name == "config" and pathlib.Path(path).is_file():
            return runpy.run_path(path)["get_config"](*argument)
    return None


def given_config(config: config_dict.ConfigDict | None) -> config_dict.ConfigDict:
    """The config of the command line; ConfigError if there is none."""
    if config is None:
        raise ConfigError("--config is missing: give a file, such as --config=configs/demo.py")
    if not isinstance(config, config_dict.ConfigDict):  # what is left where no file was found
        name = flags.FLAGS["config"].config_filename
        raise ConfigError(f"--config={name}: there is no such file, or it has no configuration")
    return config


def given_workdir(workdir: str | None) -> str:
    """The folder of the command line; ConfigError if there is none."""
    if not workdir:
        raise ConfigError(
            "--workdir is missing: give the run's folder, such as --workdir=runs/demo"
        )
    return workdir


def parser_of(module: str, doc: str | None) -> argparse.ArgumentParser:
    """A parser of `python -m MODULE`, whose help is the module's docstring."""
    first, _, rest = (doc or "").partition("\n")
    return argparse.ArgumentParser(
        prog=f"python -m {module}",
        description=first,
        epilog=rest,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
