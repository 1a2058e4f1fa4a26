"""Where compiled programs are kept, and what is said of compiling."""

import pathlib
import re

import jax
import pytest

from tests.compiling import hasty_jit
from videomem_jax import compiled


@pytest.fixture(autouse=True)
def folder():
    """Leaves JAX's folder as it was."""
    before = jax.config.jax_compilation_cache_dir
    yield
    jax.config.update("jax_compilation_cache_dir", before)


def test_where_programs_are_kept(tmp_path, monkeypatch):
    """JAX's own variable wins; else the user's cache; a folder of one's own; or nowhere."""
    jax.config.update("jax_compilation_cache_dir", str(tmp_path / "set"))
    assert compiled.keep("auto") == tmp_path / "set"
    jax.config.update("jax_compilation_cache_dir", None)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert compiled.keep("auto") == tmp_path / "videomem_jax" / compiled.machine()
    assert jax.config.jax_compilation_cache_dir == str(compiled.keep("auto"))
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", "/home/ann")
    jax.config.update("jax_compilation_cache_dir", None)
    assert compiled.keep("auto").parent == pathlib.Path("/home/ann/.cache/videomem_jax")
    assert compiled.keep(str(tmp_path)) == tmp_path / compiled.machine()
    assert compiled.keep("") is None and jax.config.jax_compilation_cache_dir is None


def test_processors_have_folders_of_their_own(monkeypatch):
    read, here = pathlib.Path.read_text, compiled.machine()
    assert here == compiled.machine() and re.fullmatch(r"\w+-[0-9a-f]{10}", here)

    def other(path, *args):
        text = read(path, *args)
        return re.sub(r"^(flags|Features)(\s*:.*)", r"\1\2 avx9", text, flags=re.M)

    monkeypatch.setattr(pathlib.Path, "read_text", other)
    if "flags" in read(pathlib.Path("/proc/cpuinfo")):
        assert compiled.machine() != here


def test_compiling_is_counted_while_the_clock_runs():
    clock = compiled.Clock()
    hasty_jit(lambda x: x * 3.25 + 1)(2.0)
    said = clock.stop()
    assert clock.programs >= 1 and clock.seconds > 0
    assert said == (
        f"{clock.programs} programs compiled in {clock.seconds:.1f} s, {clock.found} of them "
        f"found on disk"
    )
    before = clock.programs
    hasty_jit(lambda x: x * 3.75 + 1)(2.0)
    assert clock.programs == before
