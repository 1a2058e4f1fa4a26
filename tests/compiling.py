"""How tests compile: hastily, since most of what they compile runs once."""

import contextlib
import functools

import jax


@functools.cache
def hasty_options() -> dict:
    """Compiler options that spare most of the time of compiling, as far as this XLA knows them."""
    options = {}
    for name, value in (
        ("xla_backend_optimization_level", 0),
        ("xla_cpu_use_fusion_emitters", False),
    ):
        with contextlib.suppress(jax.errors.JaxRuntimeError):
            jax.jit(lambda: 0, compiler_options={name: value}).lower().compile()
            options[name] = value
    return options


def hasty_jit(function):
    """`jax.jit` for what runs once: five times as quick to compile, slower to run."""
    return jax.jit(function, compiler_options=hasty_options())
