"""The profile of a step: what is counted as what, and that the parts sum to the time."""

import jax
import jax.numpy as jnp
import pytest

from benchmarks import step_profile
from benchmarks.step_profile import Event


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("ynn_fusion.12", "products"),
        ("dot.3", "products"),
        ("wrapped_reduce-window.1", "reductions"),
        ("bitcast_dynamic-update-slice_fusion.4", "layout"),
        ("subtract_exponential_fusion", "elementwise"),
        ("sort.2", "other"),
    ],
)
def test_kinds(name, kind):
    assert step_profile.kind(name) == kind


def test_a_moment_is_shared_among_what_runs_in_it():
    events = [Event("a", 0, 4e9), Event("b", 2e9, 4e9), Event("b", 3e9, 6e9), Event("c", 8e9, 9e9)]
    found = step_profile.shares(events)
    # From 3 to 4 s "b" runs twice beside "a".
    assert found == pytest.approx(
        {"a": 2 + 1 / 2 + 1 / 3, "b": 1 / 2 + 2 / 3 + 2, "c": 1, "between": 2}
    )
    assert sum(found.values()) == pytest.approx(9)
    assert step_profile.shares([]) == {}


def test_what_ran_is_found(capsys):
    """Of a program with a product in a loop: so many products as the loop has rounds."""
    run = jax.jit(lambda x: jax.lax.fori_loop(0, 5, lambda _, x: jnp.tanh(x @ x), x))
    x = jnp.ones((256, 256))
    compiled = run.lower(x).compile().as_text()
    jax.block_until_ready(run(x))
    events = step_profile.profile(lambda: run(x), compiled)
    kinds = [step_profile.kind(event.name) for event in events]
    assert kinds.count("products") == 5
    assert not any(event.name.startswith("while") for event in events)
    step_profile.table("some", 1.0, 0.5, events, top=3)
    told = capsys.readouterr().out
    assert "some: 1.00 s (floor 0.50)" in told and "products" in told
