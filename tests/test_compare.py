"""Numbers of a benchmark, and two runs of one paired, against values worked out by hand."""

import math

import numpy as np
import pytest

from videomem_jax import compare
from videomem_jax.benchmark import scores
from videomem_jax.metrics import interval
from videomem_jax.models.config import ConfigError

# --- numbers ---


def marks(values, videos=None, **groups):
    return [
        scores.Mark(str(i), str(videos[i] if videos else i), (bool(v),), groups)
        for i, v in enumerate(values)
    ]


def test_an_interval_of_independent_questions_is_wilsons():
    for right, n in ((0, 5), (3, 10), (10, 10), (55, 100)):
        found = scores.share(marks([i < right for i in range(n)]))
        assert found == pytest.approx(interval(right, n))


def test_questions_about_one_video_are_worth_less():
    """Three questions that always fall together are worth one."""
    alone = scores.share(marks([i < 30 for i in range(50)]))
    together = scores.share(marks([i // 3 < 30 for i in range(150)], [i // 3 for i in range(150)]))
    assert together["n"] == 150
    for key in ("mean", "low", "high"):
        assert together[key] == pytest.approx(alone[key])


def test_mean_of_groups():
    shares = {"a": scores.share(marks([1, 1])), "b": scores.share(marks([0, 0, 0, 1]))}
    found = scores.averaged(shares)
    assert found["mean"] == 0.625 and found["n"] == 6
    assert 0 < found["low"] < 0.625 < found["high"] < 1
    one = scores.averaged({"a": shares["b"]})
    assert one == pytest.approx(shares["b"])


def test_nothing_has_no_share():
    nothing = {"mean": None, "low": None, "high": None, "n": 0}
    assert scores.share([]) == scores.averaged({}) == scores.headline([], "task") == nothing


def test_a_question_of_several_kinds_counts_in_each():
    found = scores.by_group(
        [
            scores.Mark("1", "v", (True,), {"kind": ("x", "y"), "length": ("600",)}),
            scores.Mark("2", "w", (False,), {"kind": ("y",), "length": ("60",)}),
        ]
    )
    assert {k: (v["mean"], v["n"]) for k, v in found["kind"].items()} == {
        "x": (1.0, 1),
        "y": (0.5, 2),
    }
    assert list(found["length"]) == ["60", "600"]


@pytest.mark.parametrize(
    ("said", "answer", "right"),
    [
        ("A cat.", "the cat", True),
        ("cat", "Cat!", True),
        ("cats", "cat", False),
        ("", "cat", False),
        ("the", "a", False),
    ],
)
def test_exact_match(said, answer, right):
    assert scores.exact_match([scores.Case("What?", answer, said)]) == [right]


# --- two runs ---


def evaluation_of(name, values, videos=None, average="", benchmark="videomme", **on):
    groups = [{"task": ("ab"[i % 2],)} for i in range(len(values))]
    found = {
        str(i): scores.Mark(str(i), str(videos[i] if videos else i), (bool(v),), groups[i])
        for i, v in enumerate(values)
    }
    results = {"benchmark": benchmark, "average": average, "depends_on": on}
    return compare.Evaluation(name, results, 4, found)


def test_mcnemar():
    """Against values worked out by hand: 2 * (1 + 5) / 2**5, and all of a coin's cases."""
    assert compare.mcnemar(4, 1) == compare.mcnemar(1, 4) == 2 * 6 / 32
    assert compare.mcnemar(0, 0) == 1 and compare.mcnemar(3, 3) == 1
    assert compare.mcnemar(10, 0) == 2 / 1024
    assert 0 < compare.mcnemar(900, 700) < 1e-6


def test_comparison():
    first, second = [1, 1, 0, 0, 0, 1, 0, 0], [1, 0, 1, 1, 1, 1, 1, 0]
    found = compare.compare(evaluation_of("a", first), evaluation_of("b", second))
    assert (found.n, found.gained, found.missed, found.unpaired) == (8, 4, 1, 0)
    assert (found.first, found.second, found.difference) == (3 / 8, 6 / 8, 3 / 8)
    change = np.array(second) - np.array(first)
    half = 1.959964 * math.sqrt(change.var() / 8)
    assert found.low == pytest.approx(3 / 8 - half, abs=1e-6)
    assert found.high == pytest.approx(3 / 8 + half, abs=1e-6)
    text = compare.described(
        evaluation_of("a", first, frames=16), evaluation_of("b", second, frames=32), found
    )
    assert "difference  +37.5   points" in text and "p = 0.375" in text
    assert "not only the weights differ: frames: 16 / 32" in text
    # Of the benchmark whose number is a mean of groups, the difference is that of these means.
    averaged = [evaluation_of(n, v[:7], average="task") for n, v in (("a", first), ("b", second))]
    found = compare.compare(*averaged)
    assert found.first == pytest.approx((1 / 4 + 2 / 3) / 2)


def test_a_difference_of_questions_about_one_video():
    """Questions that move together widen the interval."""
    first, second = [0] * 40, [1] * 10 + [0] * 30
    alone = compare.compare(evaluation_of("a", first), evaluation_of("b", second))
    videos = [i // 10 for i in range(40)]
    found = compare.compare(evaluation_of("a", first, videos), evaluation_of("b", second, videos))
    assert found.difference == alone.difference and found.high > alone.high + 0.1


def test_what_cannot_be_compared(tmp_path):
    a, b = evaluation_of("a", [1, 0]), evaluation_of("b", [1, 0], benchmark="mlvu")
    with pytest.raises(ConfigError, match="different benchmarks: videomme, mlvu"):
        compare.compare(a, b)
    with pytest.raises(ConfigError, match="no question in common"):
        compare.compare(a, evaluation_of("b", []))
    with pytest.raises(ConfigError, match="holds no finished evaluation: run eval.py"):
        compare.read(tmp_path)
    (tmp_path / "results.json").write_text("{}")
    (tmp_path / "samples.jsonl").write_text("")
    with pytest.raises(ConfigError, match="not what eval.py leaves"):
        compare.read(tmp_path)
