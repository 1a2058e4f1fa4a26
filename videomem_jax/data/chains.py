r"""Writes chains of memory for the cold start, with models that are already there.

    python -m videomem_jax.data.chains DATA/train.jsonl --model Qwen3-VL-8B-Instruct \
        --vlm http://localhost:8000/v1 --vlm-model Qwen/Qwen3-VL-32B-Instruct \
        --llm http://localhost:8001/v1 --llm-model Qwen/Qwen3-8B

For each record the VLM summarises every clip, and the LLM goes through the summaries in order and
keeps what the question needs: a chain of memory. It is kept if its memories are within the budget,
tell no option's letter, and the last of them alone gives the right answer. With --own DIR, this
project's model reads the videos and writes the chains.

Stopped at any moment, the same command goes on. Look at the chains with
`python -m videomem_jax.data.review DATA/coldstart.jsonl`.
"""

from __future__ import annotations

import argparse
import collections
import concurrent.futures
import contextlib
import dataclasses
import hashlib
import inspect
import json
import os
import sys
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from videomem_jax import command_line, instructions, llm
from videomem_jax import settings as cfg
from videomem_jax.data import chain_files, chain_writers, records
from videomem_jax.data.chain_files import Chain
from videomem_jax.data.chain_writers import Count, NoReply, Writer
from videomem_jax.data.video import VideoError
from videomem_jax.judge import Judge, LLMJudge, exact
from videomem_jax.models.config import ConfigError
from videomem_jax.prompt import PromptError
from videomem_jax.tokenizer import Tokenizer

# What a writer says of a record that it cannot use.
_UNUSABLE = (VideoError, PromptError, ConfigError, records.RecordError)
_GIVE_UP = 20  # records in a row that no model answered for
_NAMED = 20  # unfinished records that are named


class Maker:
    """Makes one chain a record; may be used by several threads."""

    def __init__(
        self, writer: Writer, settings: cfg.Settings, model: Path, count: Count, judge: Judge
    ):
        """`model` is the folder of the model that is to learn, `count` its tokens of a memory."""
        self._writer, self._settings, self._count, self._judge = writer, settings, count, judge
        self._model = str(model.resolve())
        p, m = settings.prompt, settings.memory
        sizes = [p.segments, p.frames, p.max_pixels, m.budget]
        words = inspect.getsource(instructions)
        self._depends = json.dumps([writer.identity, sizes, self._model, words])

    def depends(self, record: records.Record) -> str:
        """Hash of all that a record's chain is made from; VideoError if its video is not there."""
        try:
            video = os.stat(record.video)
        except OSError as error:
            raise VideoError(f"{record.video}: {error.strerror}.") from None
        parts = [self._depends, record.to_row(), video.st_size, video.st_mtime_ns]
        return hashlib.sha256(json.dumps(parts, default=str).encode()).hexdigest()

    def made(self, record: records.Record, chain: Chain | None) -> bool:
        """Whether a chain of the record is what would be made now."""
        with contextlib.suppress(VideoError):
            return chain is not None and chain.depends == self.depends(record)
        return False

    def make(self, record: records.Record) -> Chain:
        """The chain of a record, with what the checks say of it.

        Raises:
          NoReply, VideoError: it cannot be made now.
        """
        depends, budget = self.depends(record), self._settings.memory.budget
        draft = self._writer.write(record)
        tokens = tuple(map(self._count, draft.memories))
        cause = why = ""
        try:
            chain_writers.checks(record, draft, tokens, budget, self._judge)
        except records.BadRecord as error:
            cause, why = error.cause, str(error)
        chained = dataclasses.replace(record, memories=draft.memories, answers=draft.answers)
        made = (chained, draft.times, draft.summaries, tokens)
        return Chain(*made, self._model, budget, cause, why, depends)


class Run:
    """Makes the chains of many records, going on where it was stopped.

    Attributes:
      done: chains by id, those of earlier runs too.
      unfinished: records that could not be finished, by id: cause and sentence.
    """

    def __init__(self, found: Sequence[records.Record], maker: Maker, path: Path):
        """`path` is the file of chains; its log lies beside it."""
        self.found, self._maker, self._path = found, maker, path
        # Which videos may be read was decided when the records were.
        before = chain_files.read_chains(path, allow_outside=True)
        self.done = {r.id: before[r.id] for r in found if maker.made(r, before.get(r.id))}
        self.unfinished: dict[str, tuple[str, str]] = {}
        self._in_vain, self._last, self._lock = 0, "", threading.Lock()

    def work(self, workers: int, described: Callable[[], str], stop: Callable[[], None]) -> None:
        """Makes what is missing, and writes the chains that are kept, also when it is stopped.

        Args:
          workers: records under way at a time.
          described: what was used so far, to stand beside the bar.
          stop: ends all calls under way.

        Raises:
          LLMError: no model answers any more.
        """
        pool = concurrent.futures.ThreadPoolExecutor(workers)
        log = chain_files.Log(chain_files.beside(self._path, "chains.jsonl"))
        bar = tqdm(total=len(self.found), desc="chains", unit="record")
        kept = {name for name, chain in self.done.items() if not chain.cause}
        try:
            with log, bar:
                try:
                    tasks = {pool.submit(self._one, record, log): record for record in self.found}
                    for task in concurrent.futures.as_completed(tasks):
                        task.result()
                        name = tasks[task].id
                        good = name in self.done and not self.done[name].cause
                        (kept.add if good else kept.discard)(name)
                        bar.set_postfix_str(f"{len(kept)} kept{described()}", refresh=False)
                        bar.update()
                except BaseException:
                    stop()
                    raise
                finally:
                    pool.shutdown(cancel_futures=True)
        finally:
            made = [self.done[r.id].record for r in self.found if r.id in kept]
            if made:
                records.write_records(self._path, made)

    def _one(self, record: records.Record, log: chain_files.Log) -> None:
        if self._in_vain >= min(_GIVE_UP, len(self.found)):
            raise llm.LLMError(
                f"no model answered for {self._in_vain} records in a row; the last time: "
                f"{self._last}. Start the same command again when one does: it goes on"
            )
        try:
            if record.id not in self.done:
                chain = self._maker.make(record)
                with self._lock:
                    log.add(chain)
                    self.done[record.id], self._in_vain = chain, 0
        except NoReply as error:
            with self._lock:
                self._in_vain, self._last = self._in_vain + 1, str(error)
                self._missed(record, "no reply", error)
        except _UNUSABLE as error:
            with self._lock:
                self._missed(record, "video" if isinstance(error, VideoError) else "record", error)

    def _missed(self, record: records.Record, cause: str, error: Exception) -> None:
        self.unfinished[record.id] = cause, str(error)


def summary(done: dict[str, Chain], missed: dict[str, tuple[str, str]]) -> str:
    """What became of the records, by cause."""
    rejected = collections.Counter(chain.cause for chain in done.values() if chain.cause)
    unfinished = collections.Counter(cause for cause, _ in missed.values())
    kept = len(done) - rejected.total()
    lines = [f"{len(done) + len(missed)} records: {kept} chains kept"]
    for name, part in (("rejected", rejected), ("unfinished", unfinished)):
        if part:
            causes = ", ".join(f"{count} {cause}" for cause, count in part.most_common())
            lines.append(f"  {part.total()} {name}: {causes}")
    if unfinished:
        lines.append("  start the same command again for those unfinished")
    return "\n".join(lines)


def _arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = command_line.parser_of("videomem_jax.data.chains", __doc__)
    add = parser.add_argument
    add("records", type=Path, help="a JSONL file of records")
    add("--out", type=Path, help="file of chains (default: coldstart.jsonl beside the records)")
    what = "folder of the model that is to learn the chains; its tokenizer counts (default: --own)"
    add("--model", type=Path, metavar="DIR", help=what)
    what = "folder of a model of this project that writes the chains; --llm then only checks"
    add("--own", type=Path, metavar="DIR", help=what)
    for name, task in (("vlm", "summarises clips"), ("llm", "writes and checks memories")):
        _add_endpoint(parser, name, task)
    for name, of in (
        ("segments", "clips of a video"),
        ("frames", "frames of a clip"),
        ("max_pixels", "most pixels of a frame"),
        ("budget", "most tokens of a memory"),
    ):
        flag = f"--{name.replace('_', '-')}"
        add(flag, type=int, metavar="N", help=f"{of} (default: as --model was trained)")
    add("--concurrency", type=int, default=16, metavar="N", help="calls and records at a time")
    add("--timeout", type=float, default=120.0, metavar="S", help="seconds that a call may take")
    add("--retries", type=int, default=3, metavar="N", help="further tries of a call")
    add("--limit", type=int, metavar="N", help="records to take, from the first")
    add("--allow-outside", action="store_true", help="let records name files outside their folder")
    return parser.parse_args(argv)


def _add_endpoint(parser: argparse.ArgumentParser, name: str, task: str) -> None:
    def add(part: str, what: str, **how: Any) -> None:
        parser.add_argument(f"--{name}{part}", help=what, **how)

    add("", f"endpoint of the model that {task}", metavar="URL")
    add("-model", "its name there", default="", metavar="NAME")
    variable = "environment variable with its key, if it needs one"
    add("-key-env", variable, default="OPENAI_API_KEY", metavar="VARIABLE")
    body = 'added to a request, such as {"chat_template_kwargs": {"enable_thinking": false}}'
    add("-extra", body, default="", metavar="JSON")
    moves = "stands for the URL in the cache, for a model that moves from host to host"
    add("-name", moves, default="", metavar="NAME")
    price = "of a million tokens read and written"
    add("-price", price, type=float, nargs=2, default=(0.0, 0.0), metavar=("IN", "OUT"))


def _settings(arguments: argparse.Namespace, folder: Path) -> cfg.Settings:
    names = ("segments", "frames", "max_pixels")
    changes = {n: v for n in names if (v := getattr(arguments, n)) is not None}
    settings = cfg.load_sizes(folder, **changes)
    budget, slots = arguments.budget, settings.memory.slots
    if budget is None:
        return settings
    if not 1 <= budget <= slots:
        raise ConfigError(f"--budget={budget} must be 1 to {slots}, the room for a memory")
    return dataclasses.replace(settings, memory=cfg.Memory(slots=slots, budget=budget))


def _client(arguments: argparse.Namespace, name: str, cache: llm.Cache) -> llm.Client | None:
    def given(key: str) -> Any:
        return getattr(arguments, f"{name}_{key}")

    url = getattr(arguments, name)
    if not url:
        return None
    endpoint = llm.Endpoint(
        url=url,
        **{key: given(key) for key in ("model", "key_env", "extra", "name")},
        **{key: getattr(arguments, key) for key in ("concurrency", "timeout", "retries")},
        price_in=given("price")[0],
        price_out=given("price")[1],
    )
    return llm.Client(endpoint, cache)


def chains(arguments: argparse.Namespace) -> None:
    """The whole command."""
    if not arguments.own and not (arguments.vlm and arguments.llm):
        raise ConfigError("give --vlm and --llm, the endpoints of two models, or --own DIR")
    model = arguments.model or arguments.own
    if model is None:
        raise ConfigError("give --model, the folder of the model that is to learn the chains")
    tokenizer = Tokenizer.load(model)
    settings = _settings(arguments, model)
    path = arguments.out or arguments.records.with_name("coldstart.jsonl")
    if path.resolve() == arguments.records.resolve():
        raise ConfigError(f"--out={path} is the file of records: chains need another")
    found, skipped = records.read_records(arguments.records, allow_outside=arguments.allow_outside)
    found = [dataclasses.replace(r, memories=None, answers=None) for r in found[: arguments.limit]]
    cache = llm.Cache(chain_files.beside(path, "replies.sqlite"))

    def count(memory: str) -> int:
        return len(tokenizer.encode_memory(memory))

    with contextlib.ExitStack() as stack:
        clients = {}
        for name in ("vlm", "llm"):
            client = _client(arguments, name, cache)
            if client is not None:
                clients[name] = stack.enter_context(client)
        asked = clients.get("llm")
        if arguments.own:
            reader = chain_writers.Reader(asked) if asked else None
            writer = chain_writers.OwnWriter(arguments.own, settings, cache, reader)
        else:
            writer = chain_writers.EndpointWriter(clients["vlm"], asked, settings, count)
        judge = LLMJudge(asked) if asked else exact
        maker = Maker(writer, settings, model, count, judge)

        def described() -> str:
            usages = [client.usage for client in clients.values()]
            tokens = sum(u.tokens_in + u.tokens_out for u in usages)
            cost = sum(u.cost for u in usages)
            said = f", {tokens / 1e6:.2f}M tokens" if usages else ""
            return said + (f", cost {cost:.2f}" if cost else "")

        job = Run(found, maker, path)
        job.work(arguments.concurrency, described, stack.close)
        for name, (cause, sentence) in list(job.unfinished.items())[:_NAMED]:
            print(f"{name}: unfinished ({cause}): {sentence}", file=sys.stderr)
        if skipped:
            print(f"{arguments.records.name}: {skipped.summary()}")
        print(summary(job.done, job.unfinished))
        for name, client in clients.items():
            print(f"{name}: {client.usage}")
    if all(chain.cause for chain in job.done.values()):
        raise records.RecordError(f"no chain was kept, {path} is not written")
    print(f"chains in {path}; next: python -m videomem_jax.data.review {path}")


def main(argv: list[str] | None = None) -> None:
    """Reads the command line, then makes the chains."""
    arguments = _arguments(argv)
    try:
        command_line.entry(lambda: chains(arguments))
    except KeyboardInterrupt:
        print("stopped; the same command goes on", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    main()
