"""What data.inspect says of folders, and the page that it leaves."""

import re
from pathlib import Path

import pytest

from tests.data import benchmark_folders as folders
from tests.data import training_folders as make
from videomem_jax.data import benchmarks, inspect, records
from videomem_jax.data.records import Record


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Three data sets; of one a video is broken, another gone, and a record has no answer."""
    folder = tmp_path_factory.mktemp("data")
    make.videomarathon(folder / "VideoMarathon")
    (folder / "VideoMarathon/videos/panda/film_2.mp4").write_bytes(b"no video")
    (folder / "VideoMarathon/videos/ego4d/film_3.mp4").unlink()
    make.llava_video(folder / "LLaVA")
    make.write_film(folder / "a.mp4", 50.0)
    one = Record("<b>1</b>", "a.mp4", "<script>alert(1)</script>?", ("<i>x", "y"), "A")
    records.write_records(folder / "own.jsonl", [one])
    with (folder / "own.jsonl").open("a") as out:
        out.write('{"id": "2", "video": "a.mp4", "question": "Q?", "options": ["x", "y"]}\n')
    return folder


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr(inspect.sources, "CACHE", str(tmp_path / "cache"))


def test_a_folder_of_data_sets(folder, tmp_path, capsys, cache):
    page = tmp_path / "page.html"
    inspect.main([str(folder), "--page", str(page)])
    said = capsys.readouterr().out
    assert f"{folder}/VideoMarathon: VideoMarathon\n  records: 12, 6 of them open-ended" in said
    assert "videos: 4, 3 of them there" in said
    assert "4 videos decoded, 2 of them cannot be used (1 broken, 1 missing)" in said
    assert "film_3.mp4: there is no such video file" in said
    assert f"{folder}/LLaVA: LLaVA-Video-178K\n  records: 16, 8 of them open-ended" in said
    assert "categories: mc 8, oe 8" in said
    assert f"{folder}/own.jsonl: records\n  records: 1, 0 of them open-ended" in said
    assert (
        "1 records skipped (1 missing field)" in said and "own.jsonl:2: 'answer' is missing" in said
    )
    text = page.read_text()
    # 1 of own, 2 of LLaVA and 2 of VideoMarathon, of 6 pictures each.
    assert len(re.findall(r'<img src="data:image/jpeg;base64,', text)) == 30
    assert "<script>" not in text and "&lt;script&gt;alert(1)&lt;/script&gt;?" in text
    assert "&lt;b&gt;1&lt;/b&gt;" in text and "<i>x" not in text
    assert 'class="right">A. &lt;i&gt;x' in text
    assert "own.jsonl:2: &#39;answer&#39; is missing" in text
    assert not re.search(r"(src|href)=\"(?!data:)", text)


def test_one_file_and_no_videos(folder, tmp_path, capsys, cache, monkeypatch):
    monkeypatch.chdir(tmp_path)
    inspect.main([str(folder / "own.jsonl"), "--videos", "0", "--page", ""])
    assert "0 videos decoded" in capsys.readouterr().out and not list(tmp_path.glob("*.html"))


@pytest.mark.parametrize("kind", sorted(set(folders.MAKERS) - {"records"}))
def test_a_benchmark(film_records, tmp_path_factory, capsys, kind):
    """With what eval.py is to be told; also from a folder that holds the benchmark."""
    above = tmp_path_factory.mktemp("above")
    folder, page = folders.make(kind, above / "it", film_records), above / "page.html"
    name, title = kind.split()[0], benchmarks.TITLES[kind.split()[0]]
    inspect.main([str(folder), "--page", str(page), "--videos", "2", "--examples", "1"])
    said = capsys.readouterr().out
    assert said.startswith(f"{folder}: {title}\n")
    assert f"python eval.py --config=configs/eval.py:{name} --config.data_dir={folder}\n" in said
    open_ended = 2 if kind == "mlvu" else 0
    assert f"questions: 12, {open_ended} of them open-ended" in said
    assert re.search(r"videos: (\d+), \1 of them there", said)
    assert "2 videos decoded, 0 of them cannot be used" in said
    if kind == "mlvu":
        assert "1 records skipped (1 answer)" in said and "'something else' is none" in said
    assert page.read_text().count("data:image/jpeg") == 6
    assert inspect.find(above) == [(folder, title)]


@pytest.mark.parametrize(
    ("path", "says"),
    [
        ("gone", "gone does not exist"),
        ("VideoMarathon/videos/panda", "no data set of a known form (it has 2 .mp4 files and no"),
        ("a.mp4", "holds no data set of a known form (it is none)"),
    ],
)
def test_what_is_no_data(folder, capsys, path, says):
    with pytest.raises(SystemExit) as caught:
        inspect.main([str(folder / path), "--page", ""])
    assert caught.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and says in error and error.count("\n") == 1


def test_a_set_without_a_good_record(tmp_path, capsys, cache):
    (tmp_path / "x.jsonl").write_text("{}\n")
    with pytest.raises(SystemExit):
        inspect.main([str(tmp_path), "--page", ""])
    assert "records, which cannot be used: " in capsys.readouterr().out


def test_prepared_data(tmp_path, capsys, folder):
    from videomem_jax import settings as cfg
    from videomem_jax.data import prepare

    s = cfg.Settings(
        data=cfg.Data(folder=str(folder), train="own.jsonl"),
        prompt=cfg.Prompt(2, 4, 6 * 1024, 300),
        coldstart=cfg.Coldstart(steps=0),
    )
    prepare.prepare(s, tmp_path / "out", "lossless", 1, 4)
    capsys.readouterr()
    inspect.main([str(tmp_path / "out"), "--page", str(tmp_path / "page.html")])
    said = capsys.readouterr().out
    assert "prepared data\n  rows: 1, all written" in said
    assert "made for: 2 segments of 4 frames, at most 6144 pixels each" in said
    assert Path(tmp_path / "page.html").read_text().count("data:image/jpeg") == 6
