"""Says what a folder or file of data is, how many records it has, and what is wrong with which.

    python -m videomem_jax.data.inspect PATH
    python -m videomem_jax.data.inspect PATH --videos 0 --page ""

Decodes some of the videos, within the limits of training. Leaves a page with a few examples as
pictures, which loads nothing.
"""

from __future__ import annotations

import base64
import concurrent.futures
import dataclasses
import io
import os
from collections import Counter, defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from tqdm import tqdm

from videomem_jax import command_line, report
from videomem_jax.atomic_file import replacing
from videomem_jax.data import benchmarks, prepared, sources, texts
from videomem_jax.data.benchmarks import Question
from videomem_jax.data.decoder import Decoder
from videomem_jax.data.records import LETTERS, BadRecord, Record, RecordError, Skipped
from videomem_jax.data.sampling import Sample, Wanted
from videomem_jax.data.video import VideoError

_PICTURES = 6  # of an example
_PIXELS = 64 * 32 * 32  # of a picture
_NAMED = 20  # videos that are named


@dataclasses.dataclass(frozen=True)
class Found:
    """What there is of one data set.

    Attributes:
      path: of it.
      form: what it is.
      counts: of what, in words.
      skipped: records that cannot be used.
      tried: videos that were decoded.
      bad: what is wrong with those that cannot be, by the sentence's cause.
      examples: rows for the page.
    """

    path: Path
    form: str
    counts: dict[str, Any]
    skipped: Skipped
    tried: int
    bad: list[tuple[str, str]]
    examples: list[dict[str, Any]]

    def text(self) -> str:
        """For the terminal."""
        lines = [f"{self.path}: {self.form}"]
        lines += [f"  {name}: {value}" for name, value in self.counts.items()]
        lines.append(f"  {self.skipped.summary()}")
        lines += [f"    {sentence}" for sentence in self.skipped.named]
        causes = ", ".join(f"{n} {cause}" for cause, n in Counter(c for c, _ in self.bad).items())
        lines.append(f"  {self.tried} videos decoded, {len(self.bad)} of them cannot be used")
        lines[-1] += f" ({causes})" if causes else ""
        lines += [f"    {sentence}" for _, sentence in self.bad[:_NAMED]]
        return "\n".join(lines)


def find(path: Path) -> list[tuple[Path, str]]:
    """The data sets that a path is, or that lie in it, with what they are.

    Raises:
      RecordError: there is none.
    """
    if not path.exists():
        raise RecordError(f"{path} does not exist.")
    inside = [path, *sorted(path.iterdir())] if path.is_dir() else [path]
    # A folder of several sets may look like one of them from above.
    inner = [(p, form) for p in inside[1:] if (form := _form(p))]
    whole = _form(path)
    if _benchmark_of(whole):  # its table is found from a level above, too
        there = [one for one in [(path, whole), *inner] if _has_videos(*one)]
        found = there[:1] if (path, whole) in there else there or [(path, whole)]
    elif whole in ("VideoMarathon", "prepared data") or not inner:
        found = [(path, whole)] if whole else []
    elif whole and {form for _, form in inner} == {whole}:
        found = [(path, whole)]
    else:
        found = inner
    if not found:
        videos = sum(1 for p in path.rglob("*.mp4")) if path.is_dir() else 0
        what = f"it has {videos} .mp4 files and no questions about them" if videos else "it is none"
        raise RecordError(
            f"{path} holds no data set of a known form ({what}): a .jsonl of records, "
            f"VideoMarathon, LLaVA-Video-178K, a benchmark of eval.py, or what data.prepare writes."
        )
    return found


def _form(path: Path) -> str:
    if prepared.read_plan(path) is not None:
        return "prepared data"
    # First: that of VideoMarathon is any folder of parquet files.
    if path.is_dir() and (name := benchmarks.name_of(path)):
        return benchmarks.TITLES[name]
    return sources.form_of(path)


def _benchmark_of(form: str) -> str:
    """The name of the benchmark that a form is, for eval.py; "" if it is none."""
    names = {title: name for name, title in benchmarks.TITLES.items()}
    return names.get(form, "")


def _has_videos(path: Path, form: str) -> bool:
    """Whether it is a benchmark with some of its videos."""
    name = _benchmark_of(form)
    try:
        return bool(name and benchmarks.read(name, path))
    except RecordError:
        return False


def inspect(
    path: Path, form: str, decoder: Decoder, videos: int, examples: int, allow_outside: bool
) -> Found:
    """Looks through one data set.

    Args:
      path, form: of `find`.
      decoder: within whose limits videos must be read.
      videos: how many are decoded, spread over the set.
      examples: how many records are shown.
      allow_outside: whether videos may lie outside the set's folder.
    """
    if form == "prepared data":
        return _prepared(path, examples)
    if name := _benchmark_of(form):
        return _benchmark(path, name, decoder, videos, examples, allow_outside)
    found, skipped = sources.open_records(path, allow_outside=allow_outside)
    usable, first = [], {}
    names = {"categories": Counter(), "sources": Counter()}
    for index in tqdm(range(len(found)), desc="records", delay=2):
        try:
            record = found[index]
        except BadRecord as error:
            skipped.skip(f"{path}: record {index + 1}", error)
            continue
        names["categories"][record.category] += 1
        names["sources"][record.source] += 1
        first.setdefault(record.video, index)
        usable.append(record.is_open)
    counts = {
        "records": f"{len(usable)}, {sum(usable)} of them open-ended",
        "videos": f"{len(first)}, {sum(map(os.path.isfile, first))} of them there",
    }
    counts |= {name: _listed(counter) for name, counter in names.items()}
    chosen = [found[index] for index in _spread(list(first.values()), videos)]
    shown, bad = _shown(chosen, decoder, examples)
    return Found(path, form, counts, skipped, len(chosen), bad, shown)


def _benchmark(
    path: Path, name: str, decoder: Decoder, videos: int, examples: int, allow_outside: bool
) -> Found:
    """Of a benchmark: arguments as of `inspect`. What it skips counts as wrong in eval.py."""
    found = benchmarks.read(name, path, allow_outside)
    skipped, kinds = Skipped(), defaultdict(Counter)
    for lost in found.lost:
        skipped.skip(str(path), BadRecord(lost.cause, lost.sentence))
    for question in found.questions:
        for kind, values in question.groups.items():
            kinds[kind].update(values)
    first = {question.video: question for question in reversed(found.questions)}
    counts = {
        "evaluated by": f"python eval.py --config=configs/eval.py:{name} --config.data_dir={path}",
        "questions": f"{len(found.questions)}, {sum(q.is_open for q in found.questions)} of them "
        f"open-ended",
        "videos": f"{len(first)}, {sum(map(os.path.isfile, first))} of them there",
    }
    counts |= {kind: _listed(counter) for kind, counter in kinds.items()}
    if found.notes:
        counts["notes"] = " ".join(found.notes)
    chosen = _spread(list(first.values())[::-1], videos)
    shown, bad = _shown(chosen, decoder, examples)
    return Found(path, benchmarks.TITLES[name], counts, skipped, len(chosen), bad, shown)


def _shown(
    chosen: Sequence[Record | Question], decoder: Decoder, examples: int
) -> tuple[list[dict[str, Any]], list[tuple[str, str]]]:
    """Some of the chosen for the page, and what is wrong with the videos of others."""
    samples, bad = _decode(chosen, decoder)
    good = [(r, sample) for r, sample in zip(chosen, samples, strict=True) if sample is not None]
    return [_example(*pair) for pair in _spread(good, examples)], bad


def _spread(items: Sequence, count: int) -> list:
    """Some of the items, evenly."""
    places = np.linspace(0, len(items) - 1, min(count, len(items))).round().astype(int)
    return [items[place] for place in places]


def _listed(counter: Counter, most: int = 12) -> str:
    parts = [f"{name or 'none'} {count}" for name, count in counter.most_common(most)]
    rest = len(counter) - most
    return ", ".join(parts) + (f", and {rest} more" if rest > 0 else "")


def _decode(
    chosen: Sequence[Record | Question], decoder: Decoder
) -> tuple[list[Sample | None], list[tuple[str, str]]]:
    """A few frames of each record's video (None of a text), and what is wrong with which."""
    bad: list[tuple[str, str]] = []

    def read(record: Record | Question) -> Sample | None:
        asked = Wanted(record.video, 1, _PICTURES, _PIXELS, record.start, record.end)
        try:
            if texts.is_text(record.video):
                texts.read(record.video, 1, record.start, record.end)
                return None
            return decoder.read(asked)
        except (VideoError, BadRecord) as error:
            bad.append((error.cause, str(error)))
            return None

    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        bar = tqdm(pool.map(read, chosen), desc="videos", total=len(chosen), unit="video", delay=1)
        return list(bar), sorted(bad)


def _prepared(path: Path, examples: int) -> Found:
    """Of prepared data: its plan, and some of its rows."""
    plan = prepared.read_plan(path)
    finished = (path / "dataset_info.json").is_file()
    size = sum(file.stat().st_size for file in path.glob("*.array_record-*"))
    counts = {
        "rows": f"{len(plan['rows'])}, " + ("all written" if finished else "not finished"),
        "size": f"{size / 1e9:.3g} GB, {plan['storage']}",
        "made for": f"{plan['segments']} segments of {plan['frames']} frames, at most "
        f"{plan['max_pixels']} pixels each",
    }
    rows, bad, shown = _spread(range(len(plan["rows"])), examples if finished else 0), [], []
    source = prepared.Prepared(path, plan, "")
    for row in rows:
        name, start, end = plan["rows"][row]
        part = "" if end is None else f", {start or 0:g} to {end:g} s"
        try:
            sample = source.read(row)
        except VideoError as error:
            bad.append((error.cause, str(error)))
            continue
        times = sample.times.ravel()
        some = _spread(range(len(times)), _PICTURES)
        pictures = sample._replace(times=times[some][None], frames=sample.frames[some])
        shown.append(
            {"title": f"{name}{part}", "facts": "", "options": [], "answer": ""}
            | {"pictures": _pictures(pictures)}
        )
    return Found(path, "prepared data", counts, Skipped(), len(rows), bad, shown)


def _example(record: Record | Question, sample: Sample) -> dict[str, Any]:
    """A record for the page."""
    facts = {"id": record.id, "category": record.category}
    facts |= {"source": record.source} if isinstance(record, Record) else {}
    facts |= {"video": os.path.basename(record.video), "length": f"{sample.duration:.1f} s"}
    return {
        "title": record.question,
        "facts": "; ".join(f"{name}: {value}" for name, value in facts.items() if value),
        "options": list(zip(LETTERS, record.options, strict=False)),
        "answer": record.answer,
        "pictures": _pictures(sample),
    }


def _pictures(sample: Sample) -> list[dict[str, str]]:
    pictures = []
    for time, frame in zip(sample.times.ravel(), sample.frames, strict=True):
        data = io.BytesIO()
        Image.fromarray(frame).save(data, "JPEG", quality=80)
        url = "data:image/jpeg;base64," + base64.b64encode(data.getvalue()).decode()
        pictures.append({"url": url, "time": f"{time:.1f} s"})
    return pictures


def write_page(path: Path, found: Sequence[Found]) -> None:
    """Writes the page, all or nothing."""
    page = report.environment().get_template("inspect.html.j2").render(sets=found, named=_NAMED)
    with replacing(path) as out:
        out.write(page.encode(errors="replace"))


def main(argv: Sequence[str] | None = None) -> None:
    """Looks through the data that the command line names."""
    parser = command_line.parser_of("videomem_jax.data.inspect", __doc__)
    parser.add_argument("path", type=Path, help="folder or file of data")
    for name, default, metavar, text in (
        ("videos", 100, "N", "videos to decode (100)"),
        ("examples", 6, "N", "records on the page (6)"),
        ("page", "inspect.html", "FILE", 'the page (inspect.html); "" for none'),
        ("time-limit", 60.0, "SECONDS", "that decoding a video may take (60)"),
        ("decoder-mb", 4096, "MB", "of memory that it may take (4096)"),
    ):
        kind = type(default)
        parser.add_argument(f"--{name}", type=kind, default=default, metavar=metavar, help=text)
    parser.add_argument("--allow-outside", action="store_true", help="follow paths out of a set")
    given = parser.parse_args(argv)

    def work() -> None:
        decoder = Decoder(given.time_limit, given.decoder_mb)
        found = []
        for path, form in find(given.path):
            try:
                found.append(
                    inspect(path, form, decoder, given.videos, given.examples, given.allow_outside)
                )
                print(found[-1].text())
            except RecordError as error:
                print(f"{path}: {form}, which cannot be used: {error}")
        if given.page and found:
            write_page(Path(given.page), found)
            print(f"page: {given.page}")
        if not found:
            raise RecordError(f"{given.path} holds no data that can be used.")

    command_line.entry(work)


if __name__ == "__main__":
    main()
