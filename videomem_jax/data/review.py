"""A page to look at chains of memory, and to accept, edit or reject them.

    pip install -r requirements-app.txt
    python -m videomem_jax.data.review DATA/coldstart.jsonl

Shows what `videomem_jax.data.chains` made: the frames of each clip, its summary, the memory after
it. What is decided goes at once into DATA/coldstart.reviews.jsonl, which the cold start follows.
Serves on this machine only.
"""

from __future__ import annotations

import argparse
import dataclasses
import html
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from videomem_jax import command_line, report_timelines
from videomem_jax.data import chain_files, chain_writers
from videomem_jax.data.chain_files import Chain, Review
from videomem_jax.data.records import LETTERS, BadRecord, RecordError
from videomem_jax.models.config import ConfigError
from videomem_jax.tokenizer import Tokenizer

if TYPE_CHECKING:
    import gradio

SHOWN = ("not reviewed", "kept by the checks", "rejected by the checks", "reviewed", "all")

_STYLE = """
.clip .frames { display: flex; flex-wrap: wrap; gap: 4px; margin-bottom: 6px; }
.clip figure { margin: 0; width: calc(25% - 4px); }
.clip figure img { width: 100%; display: block; border-radius: 4px; }
.clip figcaption { font-size: 0.8rem; opacity: 0.7; }
.about .why { color: #b3261e; }
"""


class Desk:
    """The chains of a file and what was decided on them.

    Attributes:
      path: the file of chains.
      chains: by id, in the order in which they were made.
      reviews: by id.
      segments: of the longest chain.
    """

    def __init__(self, path: Path, model: Path | None = None, allow_outside: bool = False):
        """`model`: folder of the model that is to learn; by default the one they were made for.

        Raises:
          RecordError: there are no chains to review.
          ConfigError: the model's tokenizer cannot be read.
        """
        self.path = path
        self.chains = chain_files.read_chains(path, allow_outside)
        if not self.chains:
            log = chain_files.beside(path, "chains.jsonl")
            raise RecordError(
                f"{log} holds no chain: make some with python -m videomem_jax.data.chains"
            )
        self.reviews = chain_files.read_reviews(path, allow_outside)
        for name, review in list(self.reviews.items()):
            chain = self.chains.get(name)
            if chain is None or review.of != chain_files.fingerprint(chain.record):
                del self.reviews[name]  # of an older chain
        self.segments = max(len(chain.record.memories) for chain in self.chains.values())
        newest = next(reversed(self.chains.values()))
        self._tokenizer = Tokenizer.load(model or newest.model)
        self._lock = threading.Lock()

    def names(self, shown: str) -> list[str]:
        """Ids of the chains of one of SHOWN."""
        tests = {
            "not reviewed": lambda chain: chain.record.id not in self.reviews,
            "kept by the checks": lambda chain: not chain.cause,
            "rejected by the checks": lambda chain: bool(chain.cause),
            "reviewed": lambda chain: chain.record.id in self.reviews,
            "all": lambda chain: True,
        }
        return [name for name, chain in self.chains.items() if tests[shown](chain)]

    def decide(
        self, name: str, verdict: str, memories: Sequence[str], answers: Sequence[str]
    ) -> str:
        """Writes a decision; returns what was written.

        Args:
          name: id of the chain.
          verdict: accept, edit or reject; an acceptance of changed texts is an edit.
          memories, answers: one a segment, as they stand on the page.

        Raises:
          BadRecord: the texts cannot be a chain.
        """
        chain = self.chains[name]
        record = dataclasses.replace(
            chain.record,
            memories=tuple(text.strip() for text in memories),
            answers=tuple(text.strip() for text in answers),
        )
        if verdict == "reject":
            record = chain.record
        else:
            self._check(record.memories, chain.budget)
            old = chain.record
            same = (record.memories, record.answers) == (old.memories, old.answers)
            verdict = "accept" if same else "edit"
        review = Review(record, verdict, chain_files.fingerprint(chain.record))
        with self._lock:
            with chain_files.Log(chain_files.beside(self.path, "reviews.jsonl")) as log:
                log.add(review)
            self.reviews[name] = review
        return verdict

    def _check(self, memories: Sequence[str], budget: int) -> None:
        for number, memory in enumerate(memories, 1):
            tokens = len(self._tokenizer.encode_memory(memory))
            if tokens > budget:
                raise BadRecord(
                    "over budget", f"Memory {number} has {tokens} tokens, the budget is {budget}."
                )

    def texts(self, name: str) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """Memories and answers of a chain, as they would be learnt now."""
        review = self.reviews.get(name)
        record = review.record if review else self.chains[name].record
        return record.memories or (), record.answers or ()


def about_html(desk: Desk, name: str) -> str:
    """A chain's question, options, and what was said of it."""
    chain, review = desk.chains[name], desk.reviews.get(name)
    record, escape = chain.record, html.escape
    lines = [f"<p><b>{escape(record.question)}</b></p>"]
    if record.is_open:
        lines.append(f"<p>Right answer: <b>{escape(record.answer)}</b></p>")
    else:
        options = [
            f"<li>{'<b>' if letter == record.answer else ''}{letter}. {escape(option)}"
            f"{' (right)</b>' if letter == record.answer else ''}</li>"
            for letter, option in zip(LETTERS, record.options, strict=False)
        ]
        lines.append(f"<ul>{''.join(options)}</ul>")
    checked = "kept by the checks"
    if chain.cause:
        checked = f'<span class="why">rejected by the checks: {escape(chain.why)}</span>'
    memories = enumerate(desk.texts(name)[0], 1)
    told = [i for i, memory in memories if chain_writers.told_letter(memory, record.options)]
    if told and not chain.cause:
        checked += f"; memory {told[0]} tells an option's letter"
    state = f"; reviewed: <b>{escape(review.verdict)}</b>" if review else "; not reviewed"
    lines.append(f"<p>{escape(record.id)}: {checked}{state}</p>")
    return f'<div class="about">{"".join(lines)}</div>'


def clip_html(chain: Chain, segment: int, frames: Sequence[dict], trouble: str | None) -> str:
    """Frames and summary of a clip."""
    escape, times = html.escape, chain.times[segment]
    span = f"{report_timelines.clock(times[0])}\u2013{report_timelines.clock(times[-1])}"
    figures = "".join(
        f'<figure><img src="{escape(frame["uri"])}" alt=""><figcaption>{escape(frame["time"])}'
        f"</figcaption></figure>"
        for frame in frames
    )
    shown = f'<div class="frames">{figures}</div>' if figures else f"<p>{escape(trouble or '')}</p>"
    summary = chain.summaries[segment] if chain.summaries else "(the model read the clip itself)"
    return (
        f'<div class="clip"><p><b>Clip {segment + 1}, {span}</b></p>{shown}'
        f"<p>{escape(summary)}</p></div>"
    )


def clips_html(chain: Chain) -> list[str]:
    """Each clip of a chain."""
    row = {"video": chain.record.video, "steps": [{"times": list(t)} for t in chain.times]}
    frames, trouble = report_timelines.frames(row)
    return [
        clip_html(chain, i, frames[i] if frames else (), trouble) for i in range(len(chain.times))
    ]


def build(desk: Desk) -> gradio.Blocks:
    """The page."""
    import gradio

    def shown(name: str | None) -> list[Any]:
        """Values of all that shows a chain: about, then clip, memory, answer of each segment."""
        if name not in desk.chains:
            blank = [gradio.update(visible=False), "", "", ""] * desk.segments
            return ["<p>There is no chain to show here.</p>", *blank]
        chain, (memories, answers) = desk.chains[name], desk.texts(name)
        values: list[Any] = [about_html(desk, name)]
        clips = clips_html(chain)
        for i in range(desk.segments):
            here = i < len(clips)
            values += [
                gradio.update(visible=here),
                clips[i] if here else "",
                memories[i] if here else "",
                answers[i] if here and answers else "",
            ]
        return values

    def listed(which: str) -> list[Any]:
        names = desk.names(which)
        first = names[0] if names else None
        return [gradio.update(choices=names, value=first), *shown(first)]

    def decided(verdict: str, which: str, name: str | None, *texts: str) -> list[Any]:
        if name not in desk.chains:
            raise gradio.Error("There is no chain to decide on.", print_exception=False)
        count = len(desk.chains[name].record.memories)
        try:
            said = desk.decide(name, verdict, texts[::2][:count], texts[1::2][:count])
        except BadRecord as error:
            raise gradio.Error(html.escape(str(error)), print_exception=False) from None
        before = list(desk.chains)
        names = desk.names(which)
        # On to the next one in the list.
        after = [n for n in names if before.index(n) > before.index(name)]
        following = (after or [n for n in names if n != name] or [None])[0]
        status = f"<p><b>{html.escape(name)}</b>: {said}. {progress(desk)}</p>"
        return [status, gradio.update(choices=names, value=following), *shown(following)]

    with gradio.Blocks(title="Review chains of memory", analytics_enabled=False) as page:
        gradio.Markdown("# Chains of memory\nAccept, edit or reject what the cold start learns.")
        status = gradio.HTML(f"<p>{progress(desk)}</p>", elem_id="status")
        with gradio.Row():
            which = gradio.Dropdown(list(SHOWN), value=SHOWN[0], label="Show")
            names = desk.names(SHOWN[0])
            picked = gradio.Dropdown(
                names, value=names[0] if names else None, label="Chain", elem_id="picked"
            )
        about = gradio.HTML(elem_id="about")
        parts, texts = [about], []
        for i in range(desk.segments):
            with gradio.Row(elem_classes="segment") as row:
                clip = gradio.HTML()
                with gradio.Column():
                    memory = gradio.Textbox(
                        label=f"Memory {i + 1}", lines=4, elem_classes="memory", max_length=20000
                    )
                    answer = gradio.Textbox(label="Answer so far", max_length=1000)
            parts += [row, clip, memory, answer]
            texts += [memory, answer]
        with gradio.Row():
            accept = gradio.Button("Accept, with edits if any", variant="primary", elem_id="accept")
            reject = gradio.Button("Reject", variant="stop", elem_id="reject")
        page.load(shown, picked, parts, api_name="load")
        picked.input(shown, picked, parts, api_name="show")
        which.input(listed, which, [picked, *parts], api_name="list")
        for button, verdict in ((accept, "accept"), (reject, "reject")):
            button.click(
                lambda *values, v=verdict: decided(v, *values),
                [which, picked, *texts],
                [status, picked, *parts],
                api_name=verdict,
            )
    return page.queue(default_concurrency_limit=1)


def progress(desk: Desk) -> str:
    """How far the review is, as text."""
    return f"{len(desk.reviews)} of {len(desk.chains)} chains reviewed"


def launch(page: gradio.Blocks, port: int | None, block: bool = True):
    """Serves the page on this machine; with `block` False, returns (app, address, None)."""
    return page.launch(
        server_name="127.0.0.1",
        server_port=port,
        share=False,
        css=_STYLE,
        ssr_mode=False,  # it would look for Node.js
        prevent_thread_lock=not block,
        quiet=True,
        footer_links=[],
    )


def _arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = command_line.parser_of("videomem_jax.data.review", __doc__)
    add = parser.add_argument
    add("chains", type=Path, help="the file of chains")
    what = "folder of the model that is to learn (default: where it was when they were made)"
    add("--model", type=Path, metavar="DIR", help=what)
    add("--port", type=int, help="to serve on (default: the first free from 7860)")
    add("--allow-outside", action="store_true", help="show videos outside the chains' folder")
    return parser.parse_args(argv)


def serve(arguments: argparse.Namespace) -> None:
    """The whole command."""
    try:
        import gradio  # noqa: F401
    except ImportError:
        raise ConfigError("the page needs Gradio: pip install -r requirements-app.txt") from None
    desk = Desk(arguments.chains, arguments.model, arguments.allow_outside)
    port = f" port {arguments.port}" if arguments.port else ""
    print(f"{progress(desk)}; serving on 127.0.0.1{port}; Ctrl-C ends it", flush=True)
    launch(build(desk), arguments.port)


def main(argv: list[str] | None = None) -> None:
    """Reads the command line, then serves."""
    arguments = _arguments(argv)
    command_line.entry(lambda: serve(arguments))


if __name__ == "__main__":
    main()
