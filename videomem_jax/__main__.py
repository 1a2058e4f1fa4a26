"""The commands there are, and the version of the package.

    python -m videomem_jax.ask             asks a model about a video
    python -m videomem_jax.app             the same in a browser
    python -m videomem_jax.keys            every key of a configuration: default and meaning
    python -m videomem_jax.picture         a question of a run as a picture
    python -m videomem_jax.compare         pairs two evaluations question by question
    python -m videomem_jax.data.inspect    what is in a folder of videos and questions
    python -m videomem_jax.data.prepare    decodes the frames of a data set once for all
    python -m videomem_jax.data.chains     writes chains of memory for the cold start
    python -m videomem_jax.data.review     a page to accept, edit or reject them
    python -m videomem_jax.models.convert  checkpoints to Hugging Face folders and back

Training and evaluation are train.py and eval.py of the repository.

Each says with --help what it takes.
"""

from __future__ import annotations

from videomem_jax import __version__, command_line


def main(argv: list[str] | None = None) -> None:
    """Prints what was asked for; with nothing asked, the help."""
    parser = command_line.parser_of("videomem_jax", __doc__)
    parser.add_argument("--version", action="version", version=f"videomem_jax {__version__}")
    parser.parse_args(argv)
    parser.print_help()


if __name__ == "__main__":
    main()
