"""How near two arrays must be."""

import numpy as np


def assert_near(a, b, bar=1e-5):
    """The largest difference is at most `bar` of the largest value."""
    a, b = np.asarray(a), np.asarray(b)
    assert a.shape == b.shape
    assert np.abs(a - b).max() <= bar * max(np.abs(b).max(), 1e-12)
