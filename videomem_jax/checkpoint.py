"""Checkpoints of all that a phase needs to go on exactly: state, data position. All orbax is here.

A checkpoint is written to one side and renamed when whole, so a kill at any moment leaves the last
one usable; one that is damaged all the same is passed over for the one before it. With several
processes all of them save and restore, each its own shards, into one folder that all can see.
"""

from __future__ import annotations

import errno
import logging
import pathlib
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from videomem_jax import hosts

_log = logging.getLogger(__name__)


class CheckpointError(RuntimeError):
    """A checkpoint that cannot be written or read; the message is one sentence."""


class _Manager(ocp.CheckpointManager):
    """Orbax's, but that it does not ask for notices to stop.

    It would ask with the step of a phase, and JAX wants one count for the whole run: that is
    `hosts.Notice`.
    """

    def reached_preemption(self, step: int) -> bool:
        return False


class Checkpoints:
    """The checkpoints of one phase of a run, in `folder`."""

    def __init__(self, folder: pathlib.Path, keep: int):
        self._folder = folder.absolute()
        options = ocp.CheckpointManagerOptions(max_to_keep=keep, create=True)
        self._manager = _Manager(self._folder, options=options)

    def save(self, step: int, state: Any, data: dict) -> None:
        """Saves in the background, if there is no checkpoint of this step yet.

        Args:
          step: of the phase.
          state: what the steps change.
          data: where this process's data iterator stands; each process gives its own.

        Raises:
          CheckpointError: if an earlier save failed, for instance on a full disk.
        """
        data = {"processes": hosts.gather(data)}
        args = ocp.args.Composite(state=ocp.args.StandardSave(state), data=ocp.args.JsonSave(data))
        with self._said():
            self._manager.save(step, args=args)

    def wait(self) -> None:
        """Returns when what was saved is on disk; CheckpointError if it could not be."""
        with self._said():
            self._manager.wait_until_finished()

    def close(self) -> None:
        """Waits, and frees the background threads."""
        self.wait()
        self._manager.close()

    def restore(self, like: Any) -> tuple[int, Any, list[dict]] | None:
        """The newest usable checkpoint: step, state, data positions; None if there is none.

        The positions are one of each process that saved it, in their order.

        Args:
          like: a state whose shapes, dtypes and shardings the result takes.
        """
        shapes = jax.tree.map(ocp.utils.to_shape_dtype_struct, like)
        steps = sorted(self._manager.all_steps(), reverse=True)
        for at, step in enumerate(steps):
            args = ocp.args.Composite(
                state=ocp.args.StandardRestore(shapes), data=ocp.args.JsonRestore()
            )
            found = None
            try:
                found = self._manager.restore(step, args=args)
            except Exception as error:  # whatever orbax meets in a damaged file
                cause = str(error).splitlines()[0][:200] if str(error) else type(error).__name__
                _log.warning("checkpoint %s cannot be read (%s)", self._folder / str(step), cause)
            if not all(hosts.gather(found is not None)):  # all processes go on from the same one
                continue
            # Only now: their steps are to be saved again. Where none is usable, all are kept.
            for damaged in steps[:at]:
                self._manager.delete(damaged)
            return step, found["state"], found["data"]["processes"]
        if steps:
            raise CheckpointError(
                f"none of the checkpoints in {self._folder} can be read: if that run is lost, "
                f"delete the folder and start again"
            )
        return None

    def _said(self):
        return _Said(self._folder)


def steps_in(folder: pathlib.Path) -> list[int]:
    """The steps of the checkpoints in a phase's folder, in order; empty if it is not there."""
    names = [path.name for path in folder.iterdir()] if folder.is_dir() else []
    return sorted(int(name) for name in names if name.isdigit())


def trained_parameters(
    folder: pathlib.Path, step: int | None = None
) -> tuple[int, dict[tuple[str, ...], np.ndarray]]:
    """The trained parameters of a checkpoint, on the host; its optimiser's state is not read.

    Args:
      folder: of one phase of a run.
      step: of the checkpoint; by default the newest.

    Returns:
      The step, and the parameters by their path in the model.

    Raises:
      CheckpointError: there is no such checkpoint, or it cannot be read.
    """
    steps = steps_in(folder)
    if not steps or (step is not None and step not in steps):
        there = f"there are steps {', '.join(map(str, steps))}" if steps else "there are none"
        wanted = "" if step is None else f" of step {step}"
        raise CheckpointError(f"{folder} holds no checkpoint{wanted}: {there}")
    step = steps[-1] if step is None else step
    path = folder.absolute() / str(step) / "state"
    try:
        reader = ocp.PyTreeCheckpointer()
        tree = {"trained": reader.metadata(path).item_metadata.tree["trained"]}
        kinds = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), tree)
        args = ocp.args.PyTreeRestore(item=tree, restore_args=kinds, partial_restore=True)
        found = reader.restore(path, args=args)["trained"]
    except Exception as error:  # whatever orbax meets in a damaged file
        cause = str(error).splitlines()[0][:200] if str(error) else type(error).__name__
        raise CheckpointError(f"{path} cannot be read ({cause})") from None
    flat = jax.tree_util.tree_flatten_with_path(found)[0]
    return step, {tuple(str(key.key) for key in keys[:-1]): leaf for keys, leaf in flat}


class _Said:
    """Turns an error of the disk into one sentence."""

    def __init__(self, folder: pathlib.Path):
        self._folder = folder

    def __enter__(self):
        return self

    def __exit__(self, kind, error, trace):
        if isinstance(error, OSError) or "No space left" in str(error) or "ENOSPC" in str(error):
            full = getattr(error, "errno", None) == errno.ENOSPC or "No space left" in str(error)
            what = "the disk is full" if full else str(error)
            raise CheckpointError(
                f"no checkpoint could be written to {self._folder}: {what}; free some space and "
                f"start the same command again, it goes on from the last checkpoint"
            ) from error
        return False
