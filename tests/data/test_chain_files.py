"""Chains that people have reviewed, as the cold start takes them."""

import dataclasses
import json

import pytest

from videomem_jax import run, settings
from videomem_jax.data import chain_files
from videomem_jax.data.records import Record, read_records, write_records


@pytest.fixture
def chained(tmp_path):
    """Three chains in a file, and the means to review them."""
    row = {"video": "film.mp4", "question": "?", "options": ("a", "b"), "answer": "A"}
    found = [
        Record(id=f"c{i}", memories=("x", f"y {i}"), answers=("", "A"), **row) for i in range(3)
    ]
    path = tmp_path / "coldstart.jsonl"
    write_records(path, found)
    found, _ = read_records(path)

    def review(record, verdict, **changes):
        made = chain_files.Review(
            dataclasses.replace(record, **changes), verdict, chain_files.fingerprint(record)
        )
        with chain_files.Log(chain_files.beside(path, "reviews.jsonl")) as log:
            log.add(made)

    return path, found, review


def learnt(path):
    """What the cold start reads, by id."""
    s = settings.Settings(data=settings.Data(folder=str(path.parent)))
    return {r.id: r for r in run.training_data(s, path.name, chains=True, open_ended=True)}


def test_the_cold_start_honours_reviews(chained, capsys):
    path, found, review = chained
    assert list(learnt(path)) == ["c0", "c1", "c2"]
    review(found[0], "reject")
    review(found[1], "reject")
    review(found[1], "edit", memories=("x", "better"))
    review(found[2], "accept")
    # One that the checks rejected, so that it is in no file but this.
    review(dataclasses.replace(found[2], id="c9"), "accept")
    got = learnt(path)
    assert list(got) == ["c1", "c2", "c9"]
    assert got["c1"].memories == ("x", "better") and got["c1"].video == found[1].video
    assert "1 rejected, 1 edited, 1 added" in capsys.readouterr().out
    # PRPO's records are no chains.
    s = settings.Settings(data=settings.Data(folder=str(path.parent)))
    assert len(run.training_data(s, path.name)) == 3


def test_a_review_of_an_older_chain_is_not_followed(chained, caplog):
    path, found, review = chained
    review(dataclasses.replace(found[0], memories=("older", "chain")), "reject")
    assert list(learnt(path)) == ["c0", "c1", "c2"]
    assert "c0: its review is of an older chain" in caplog.text


def test_reviews_that_reject_all_are_said(chained):
    path, found, review = chained
    for record in found:
        review(record, "reject")
    with pytest.raises(run.records.RecordError, match="review rejected all of its 3 chains"):
        learnt(path)


def test_broken_lines_of_reviews_are_skipped(chained):
    path, found, review = chained
    file = chain_files.beside(path, "reviews.jsonl")
    file.write_bytes(b'\xff\n[1]\n{"record": 3}\n{"verdict": "reject"}\n{"record": {"id": "c')
    review(found[0], "reject")
    outside = json.loads(file.read_text(errors="replace").splitlines()[-1])
    outside["record"] |= {"id": "c8", "video": "../../x.mp4"}
    outside["verdict"] = "accept"
    with open(file, "a") as lines:
        lines.write(json.dumps(outside) + "\n")
    assert list(learnt(path)) == ["c1", "c2"]
