"""Compiled programs: kept on disk from run to run, and the time that compiling takes."""

from __future__ import annotations

import hashlib
import os
import pathlib
import platform

import jax

_COMPILED = "/jax/core/compile/backend_compile_duration"
_FOUND = "/jax/compilation_cache/cache_hits"


def keep(folder: str) -> pathlib.Path | None:
    """Keeps compiled programs on disk, where the next run finds them.

    To be called before the first program is compiled.

    Args:
      folder: where; "auto" is JAX_COMPILATION_CACHE_DIR if that is set, else a folder of the user's
        cache; "" keeps none.

    Returns:
      The folder in use, or None.
    """
    if folder == "auto":
        chosen = jax.config.jax_compilation_cache_dir
        home = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
        path = chosen or pathlib.Path(home).expanduser() / "videomem_jax" / machine()
    else:
        path = pathlib.Path(folder).expanduser() / machine() if folder else None
    jax.config.update("jax_compilation_cache_dir", str(path) if path else None)
    return pathlib.Path(path) if path else None


def machine() -> str:
    """A name for this machine's processor.

    Programs for a CPU hold instructions of the very processor that they were compiled on: in a home
    that several machines share, each kind has a folder of its own.
    """
    about = [platform.machine()]
    try:
        lines = pathlib.Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:  # not Linux
        lines = [platform.processor()]
    for name in ("model name", "flags", "Features"):
        about += [line for line in lines if line.startswith(name)][:1]
    return f"{about[0]}-{hashlib.sha256(repr(about).encode()).hexdigest()[:10]}"


class Clock:
    """Counts compiling in this process, from its making to `stop`.

    Attributes:
      seconds: spent in compiling, or in reading what was compiled before.
      programs: compiled or read.
      found: those that were read.
    """

    def __init__(self):
        self.seconds, self.programs, self.found = 0.0, 0, 0
        jax.monitoring.register_event_duration_secs_listener(self._took)
        jax.monitoring.register_event_listener(self._saw)

    def _took(self, event: str, seconds: float, **_) -> None:
        if event == _COMPILED:
            self.seconds += seconds
            self.programs += 1

    def _saw(self, event: str, **_) -> None:
        self.found += event == _FOUND

    def stop(self) -> str:
        """Ends counting; what was counted, in words."""
        jax.monitoring.unregister_event_duration_listener(self._took)
        jax.monitoring.unregister_event_listener(self._saw)
        return (
            f"{self.programs} programs compiled in {self.seconds:.1f} s, {self.found} of them "
            f"found on disk"
        )
