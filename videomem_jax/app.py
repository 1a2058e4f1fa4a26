"""A page to ask a model about a video, and to watch its memory change clip by clip.

    pip install -r requirements-app.txt
    python -m videomem_jax.app --weights DIR --videos FOLDER

Serves on this machine only, unless --host says otherwise.
"""

from __future__ import annotations

import argparse
import functools
import html
import os
import pathlib
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from videomem_jax import command_line
from videomem_jax.ask import model_parser, segments_value, sizes, weights_folder
from videomem_jax.models.config import ConfigError

if TYPE_CHECKING:
    import gradio

    from videomem_jax.videomem import VideoMem

FILM = pathlib.Path(__file__).parent / "assets" / "film" / "bbb_320x192_1fps.mp4"
SUFFIXES = (".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi", ".ts")

# Gradio has styles of its own for lists, paragraphs and figures in text.
_STYLE = """
.segments { background: var(--card); color: var(--ink); padding: 0 14px; border-radius: 8px; }
.segments .steps { margin: 0; padding: 0; }
.segments ins, .segments del { margin: 0; }
.said { font-size: 1.15rem; }
"""


def find_videos(folders: Sequence[str | os.PathLike]) -> dict[str, str]:
    """Videos to pick from: path by name. With no folder, the film that comes with the package.

    Raises:
      ConfigError: a folder is not there.
    """
    if not folders:
        return {"Big Buck Bunny (1 frame a second)": str(FILM)}
    found = {}
    for folder in map(pathlib.Path, folders):
        if not folder.is_dir():
            raise ConfigError(f"--videos={folder}: there is no such folder")
        for path in sorted(folder.rglob("*")):
            if path.suffix.lower() in SUFFIXES and path.is_file():
                found[str(path.relative_to(folder))] = str(path)
    return found


def answer(
    model: VideoMem,
    videos: dict[str, str],
    picked: str | None,
    uploaded: str | None,
    question: str,
    options: str,
    segments: str,
) -> Iterator[tuple[str, str]]:
    """The page's work: after each segment, what is said of it and the list of segments so far.

    Args:
      model: to ask.
      videos: those to pick from.
      picked: name of one of them.
      uploaded: path of a file, which comes before a picked one.
      question: in words.
      options: one a line; none for an open question.
      segments: a number, "auto", or nothing for the model's own.

    Raises:
      gradio.Error: one sentence, which the page shows.
    """
    import gradio

    from videomem_jax import answer_page

    video = uploaded or videos.get(picked or "")
    if not video:
        raise gradio.Error("Pick a video, or upload one.", print_exception=False)
    listed = [line.strip() for line in options.splitlines() if line.strip()]
    items, before = [], None
    try:
        count = segments_value(segments.strip()) if segments.strip() else None
        read = model.read(video, question.strip(), listed or None, count)
        yield "Reading the first segment ...", ""
        for segment in read:
            items.append(answer_page.segment_html(video, listed, segment, before))
            before = segment
            said = html.escape(answer_page.named(segment) or "no answer")
            done = segment.number == segment.of
            head = "Answer" if done else f"After segment {segment.number} of {segment.of}"
            # The newest first: it is what one waits for.
            shown = "".join(items if done else items[::-1])
            body = f'<div class="timeline segments"><ol class="steps">{shown}</ol></div>'
            yield f'<p class="said">{head}: <b>{said}</b></p>', body
    except (*command_line.SAID, argparse.ArgumentTypeError) as error:
        # A path on this machine is nothing to the page's reader.
        text = str(error).replace(video, os.path.basename(video))
        raise gradio.Error(html.escape(text, quote=False), print_exception=False) from None


def build(model: VideoMem, videos: dict[str, str]) -> gradio.Blocks:
    """The page."""
    import gradio

    p = model.settings.prompt
    # Uploads are deleted after a day.
    day = 24 * 3600
    with gradio.Blocks(
        title="videomem_jax", analytics_enabled=False, delete_cache=(3600, day)
    ) as page:
        gradio.Markdown(
            "# Ask a video\nA model reads the video segment by segment. After each it rewrites "
            "its memory, a short text, and forgets the frames; it answers from the memory."
        )
        with gradio.Row():
            with gradio.Column():
                picked = gradio.Dropdown(
                    list(videos), value=next(iter(videos), None), label="Video"
                )
                uploaded = gradio.File(
                    label="or upload one", file_types=list(SUFFIXES), type="filepath", height=120
                )
            with gradio.Column():
                question = gradio.Textbox(
                    label="Question", value="Which picture was on the red card?", max_length=1000
                )
                options = gradio.Textbox(
                    label="Options, one a line (none for an answer in free words)",
                    lines=4,
                    max_length=2000,
                )
                segments = gradio.Textbox(
                    label=f"Segments (a number, or auto; {p.segments} by default)", max_length=8
                )
                button = gradio.Button("Ask", variant="primary", elem_id="ask")
        status, body = gradio.HTML(elem_id="status"), gradio.HTML(elem_id="segments")
        button.click(
            functools.partial(answer, model, videos),
            [picked, uploaded, question, options, segments],
            [status, body],
            api_name="ask",
        )
    return page.queue(max_size=16, default_concurrency_limit=1)


def launch(page: gradio.Blocks, host: str, port: int | None, max_mb: int, block: bool = True):
    """Serves the page; with `block` False, returns (app, local address, public address)."""
    from videomem_jax import answer_page

    return page.launch(
        server_name=host,
        server_port=port,
        share=False,
        max_file_size=f"{max_mb}mb",
        css=answer_page.style() + _STYLE,
        ssr_mode=False,  # it would look for Node.js
        prevent_thread_lock=not block,
        quiet=True,
        footer_links=[],
    )


def _arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = model_parser("videomem_jax.app", __doc__)
    parser.add_argument(
        "--videos", nargs="+", default=[], metavar="DIR", help="folders of videos to pick from"
    )
    parser.add_argument("--host", default="127.0.0.1", help="address to serve on")
    parser.add_argument("--port", type=int, help="to serve on (default: the first free from 7860)")
    parser.add_argument(
        "--max-mb", type=int, default=2000, metavar="MB", help="of an upload (2000)"
    )
    return parser.parse_args(argv)


def serve(arguments: argparse.Namespace) -> None:
    """The whole command."""
    try:
        import gradio  # noqa: F401
    except ImportError:
        raise ConfigError("the page needs Gradio: pip install -r requirements-app.txt") from None
    from videomem_jax.videomem import VideoMem

    videos = find_videos(arguments.videos)
    model = VideoMem.from_pretrained(
        weights_folder(arguments.weights), dtype=arguments.dtype, **sizes(arguments)
    )
    port = f" port {arguments.port}" if arguments.port else ""
    print(f"serving on {arguments.host}{port}; Ctrl-C ends it", flush=True)
    launch(build(model, videos), arguments.host, arguments.port, arguments.max_mb)


def main(argv: list[str] | None = None) -> None:
    """Reads the command line, then serves."""
    arguments = _arguments(argv)
    command_line.entry(lambda: serve(arguments))


if __name__ == "__main__":
    main()
