"""Every key of a configuration: its default and what it means.

    python -m videomem_jax.keys                   of training runs
    python -m videomem_jax.keys prpo data.folder  of parts, or single ones
    python -m videomem_jax.keys --eval            of benchmarks (configs/eval.py)

On a command line a key is set by --config.KEY=VALUE.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import io
import textwrap
import tokenize
import typing

from videomem_jax import command_line, settings
from videomem_jax.benchmark import config as benchmark
from videomem_jax.models.config import ConfigError


@dataclasses.dataclass(frozen=True)
class Key:
    """A key: `prpo.group_size`, the name of its type, its default, and its meaning in words."""

    name: str
    kind: str
    default: typing.Any
    meaning: str


@dataclasses.dataclass(frozen=True)
class Part:
    """Keys that stand together: the name before theirs ("" of the whole), and what they are."""

    name: str
    about: str
    keys: tuple[Key, ...]


def parts(cls: type) -> tuple[Part, ...]:
    """The keys of a dataclass of settings, and those of each dataclass in it.

    A key's meaning is the comment behind it in the source, and after it those on the lines before.
    """
    return tuple(_parts(cls, cls(), ""))


def _parts(cls, values, prefix: str) -> typing.Iterator[Part]:
    meanings, kinds = _comments(cls), typing.get_type_hints(cls)
    own, inner = [], []
    for field in dataclasses.fields(cls):
        value, name = getattr(values, field.name), f"{prefix}{field.name}"
        if dataclasses.is_dataclass(value):
            inner.append((type(value), value, f"{name}."))
        else:
            own.append(Key(name, kinds[field.name].__name__, value, meanings[field.name]))
    about = " ".join(inspect.getdoc(cls).split())
    yield Part(prefix.rstrip("."), about, tuple(own))
    for each in inner:
        yield from _parts(*each)


@functools.cache
def _comments(cls: type) -> dict[str, str]:
    """Comments of a dataclass's fields, by name."""
    fields = {field.name for field in dataclasses.fields(cls)}
    found, name, before = dict.fromkeys(fields, ""), None, []
    source = textwrap.dedent(inspect.getsource(cls))
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        text = token.string.lstrip("# ").strip()
        if token.type == tokenize.NAME and token.start[1] == 4 and token.string in fields:
            name = token.string
        elif token.type == tokenize.COMMENT and name is None:
            before.append(text)
        elif token.type == tokenize.COMMENT:
            note = " ".join(before)
            found[name] = f"{text}. {note}" if note else text
        elif token.type == tokenize.NEWLINE and name is not None:
            name, before = None, []
    return found


def chosen(found: tuple[Part, ...], names: list[str]) -> tuple[Part, ...]:
    """The parts and single keys of some names; all, if there are none.

    Raises:
      ConfigError: a name is neither a part nor a key.
    """
    if not names:
        return found
    names = [name.removeprefix("config.").rstrip(".") for name in names]
    every = {part.name for part in found} | {key.name for part in found for key in part.keys}
    for name in names:
        if name not in every and not any(known.startswith(f"{name}.") for known in every):
            raise ConfigError(
                f"{name} is neither a key nor a part of the keys; there are "
                f"{', '.join(sorted(part.name for part in found if part.name))}"
            )

    def asked(key: Key) -> bool:
        return any(key.name == name or key.name.startswith(f"{name}.") for name in names)

    kept = (dataclasses.replace(p, keys=tuple(k for k in p.keys if asked(k))) for p in found)
    return tuple(part for part in kept if part.keys)


def described(found: tuple[Part, ...]) -> str:
    """The keys as text for a terminal."""
    lines = []
    for part in found:
        lines += ["", part.about, ""]
        for key in part.keys:
            lines.append(f"  {key.name} = {key.default!r}")
            indent = " " * 6
            lines += textwrap.wrap(key.meaning, 92, initial_indent=indent, subsequent_indent=indent)
    return "\n".join(lines[1:])


def main(argv: list[str] | None = None) -> None:
    """Reads the command line, then prints."""
    parser = command_line.parser_of("videomem_jax.keys", __doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help="parts or keys; all by default")
    parser.add_argument("--eval", action="store_true", help="those of configs/eval.py")
    arguments = parser.parse_args(argv)
    cls = benchmark.Config if arguments.eval else settings.Settings
    command_line.entry(lambda: print(described(chosen(parts(cls), arguments.names))))


if __name__ == "__main__":
    main()
