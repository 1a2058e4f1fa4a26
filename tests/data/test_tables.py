"""Tables on disk: the same rows from every format, and a sentence for what is none."""

import json

import pyarrow
import pyarrow.parquet
import pytest

from videomem_jax.data import tables
from videomem_jax.data.records import RecordError

ROWS = [{"id": f"{i}", "options": ["a", "b"], "length": i, "none": None} for i in range(2500)]


def write(path):
    if path.suffix == ".parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), path)
    elif path.suffix == ".json":
        path.write_text(json.dumps(ROWS))
    else:
        path.write_text("\n".join(map(json.dumps, ROWS)) + "\n\n")
    return path


@pytest.mark.parametrize("suffix", tables.SUFFIXES)
def test_rows(tmp_path, suffix):
    assert list(tables.rows(write(tmp_path / f"table{suffix}"))) == ROWS


@pytest.mark.parametrize("suffix", tables.SUFFIXES)
def test_damage_is_said_in_one_sentence(tmp_path, suffix):
    path = write(tmp_path / f"table{suffix}")
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(RecordError, match=f"table{suffix}.* cannot be read as ") as caught:
        list(tables.rows(path))
    assert "\n" not in str(caught.value)


def test_what_is_no_table(tmp_path):
    with pytest.raises(RecordError, match="Cannot read .*gone.parquet"):
        list(tables.rows(tmp_path / "gone.parquet"))
    with pytest.raises(RecordError, match="is none of .parquet, .jsonl, .json"):
        list(tables.rows(tmp_path / "table.csv"))
    (tmp_path / "one.json").write_text("{}")
    with pytest.raises(RecordError, match="must hold a JSON list"):
        list(tables.rows(tmp_path / "one.json"))
