"""Asks a model about a video.

    python -m videomem_jax.ask film.mp4 "Who opens the door?" --weights DIR --options Ann Bo Cleo
    python -m videomem_jax.ask film.mp4 "What happens at the door?" --weights DIR --segments auto

Prints each memory as it is written, then the answer. Without --weights it asks the model that
`make demo` leaves.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import sys

from tqdm import tqdm

from videomem_jax import command_line
from videomem_jax.models.config import ConfigError

DEMO = pathlib.Path("runs/demo/model")


def weights_folder(given: str | None) -> pathlib.Path:
    """The folder of the model to ask: the one given, or the demo's."""
    if given is not None:
        return pathlib.Path(given)
    if not (DEMO / "config.json").is_file():
        raise ConfigError(
            f"there is no model in {DEMO}: run make demo, or give the folder of one with --weights"
        )
    return DEMO


def segments_value(text: str) -> int | str:
    """The value of --segments."""
    if text == "auto":
        return text
    try:
        return int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is neither a number nor 'auto'") from None


def sizes(arguments: argparse.Namespace) -> dict:
    """Sizes and limit given on the command line, as `VideoMem.from_pretrained` takes them."""
    names = ("max_pixels", "slots", "answer", "time_limit")
    return {name: value for name in names if (value := getattr(arguments, name)) is not None}


def model_parser(module: str, doc: str | None) -> argparse.ArgumentParser:
    """A parser with what this command and the app have in common (see `command_line.parser_of`)."""
    parser = command_line.parser_of(module, doc)
    parser.add_argument(
        "--weights",
        metavar="DIR",
        help=f"folder of a Qwen3-VL in Hugging Face's layout, or of a model that train.py left "
        f"(default: {DEMO})",
    )
    parser.add_argument("--max-pixels", type=int, metavar="N", help="of a frame after resizing")
    parser.add_argument("--slots", type=int, metavar="N", help="room for a memory, in tokens")
    parser.add_argument("--answer", choices=("letter", "text"), help="how an option is answered")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), help="of the parameters")
    parser.add_argument(
        "--time-limit",
        type=float,
        metavar="SECONDS",
        help="for decoding a segment's frames (default: 60)",
    )
    return parser


def _arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = model_parser("videomem_jax.ask", __doc__)
    parser.add_argument("video", help="a file; .txt and .md are read as texts")
    parser.add_argument("question", help="in words")
    parser.add_argument("--options", nargs="+", metavar="TEXT", help="to choose the answer from")
    parser.add_argument(
        "--segments",
        type=segments_value,
        metavar="N",
        help="parts to cut the video into, or 'auto' to follow its length "
        "(default: as the model was trained, 4 for a Qwen3-VL)",
    )
    parser.add_argument("--frames", type=int, metavar="N", help="read of each segment; even")
    parser.add_argument("--report", metavar="FILE", help="write a page with frames and memories")
    parser.add_argument("--json", action="store_true", help="print one JSON object, nothing else")
    return parser.parse_args(argv)


def ask(arguments: argparse.Namespace) -> None:
    """The whole command."""
    # Here, since it takes seconds: --help and misspelt flags need not wait for it.
    from videomem_jax import answer_page, asking, videomem

    folder = weights_folder(arguments.weights)
    options = asking.check_question(arguments.question, arguments.options)
    # All that can be wrong is found before the weights are read.
    changes = sizes(arguments)
    settings = asking.sized(folder, **changes)
    times = asking.plan(arguments.video, settings, arguments.segments, arguments.frames)
    if arguments.report and not pathlib.Path(arguments.report).parent.is_dir():
        raise ConfigError(f"--report={arguments.report}: the folder to write to does not exist")
    model = videomem.VideoMem.from_pretrained(folder, dtype=arguments.dtype, **changes)
    question = (arguments.video, arguments.question, arguments.options)
    read = []
    with tqdm(total=len(times), unit="segment", disable=arguments.json, file=sys.stderr) as bar:
        for segment in model.read(*question, *times.shape):
            read.append(segment)
            bar.update()
            if not arguments.json:
                with tqdm.external_write_mode(file=sys.stdout):
                    print(described(segment, arguments.video), flush=True)
    answer = videomem.Answer(arguments.video, arguments.question, options, tuple(read))
    if arguments.report:
        answer_page.write(answer, arguments.report)
    if arguments.json:
        print(json.dumps(answer.to_row(), ensure_ascii=False))
    else:
        print(f"answer: {answer_page.named(answer) or 'none, the format was broken'}")
        if arguments.report:
            print(f"report: {arguments.report}")


def described(segment, video: str) -> str:
    """A segment of a video as two lines; the report and --json keep the memory's own lines."""
    from videomem_jax import answer_page, report_timelines

    span = report_timelines.span(video, segment.times).replace("\u2013", "-")
    memory = " ".join(segment.memory.split()) or "(empty)"
    text = f"[{segment.number}/{segment.of}] {span}  memory: {memory}"
    said = answer_page.named(segment)
    if said is None:
        return f"{text}\n    no answer so far"
    chance = ""
    if segment.probabilities is not None:
        chance = f" ({segment.probabilities[segment.choice]:.0%})"
    return f"{text}\n    so far: {said}{chance}"


def main(argv: list[str] | None = None) -> None:
    """Reads the command line, then asks."""
    arguments = _arguments(argv)
    command_line.entry(lambda: ask(arguments))


if __name__ == "__main__":
    main()
