"""Position ids of prompts with grids in them; tests/models/test_parity.py has them all."""

import numpy as np
import pytest

from videomem_jax.models.positions import position_ids


def test_by_hand():
    vision = np.array([0, 0, 1, 1, 1, 1, 1, 1, 0, 1, 0], bool)
    positions, after = position_ids(vision, [(4, 6), (2, 2)])
    np.testing.assert_array_equal(
        positions,
        [
            [0, 1, 2, 2, 2, 2, 2, 2, 5, 6, 7],
            [0, 1, 2, 2, 2, 3, 3, 3, 5, 6, 7],
            [0, 1, 2, 3, 4, 2, 3, 4, 5, 6, 7],
        ],
    )
    assert after == 8


def test_text_alone():
    positions, after = position_ids(np.zeros(3, bool), [])
    np.testing.assert_array_equal(positions, [[0, 1, 2]] * 3)
    assert after == 3


@pytest.mark.parametrize("grids", [[], [(2, 4)], [(2, 2), (2, 2)], [(4, 4)]])
def test_grids_that_do_not_fit(grids):
    with pytest.raises(ValueError, match="blocks"):
        position_ids(np.array([0, 1, 0], bool), grids)
