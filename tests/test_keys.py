"""`python -m videomem_jax.keys` and `python -m videomem_jax`."""

import tomllib

import pytest

import videomem_jax
from tests.commands import ROOT
from videomem_jax import __main__, keys, settings
from videomem_jax.benchmark import config as benchmark


@pytest.mark.parametrize("cls", [settings.Settings, benchmark.Config])
def test_every_key_has_a_default_and_a_meaning(cls):
    found = {key.name: key for part in keys.parts(cls) for key in part.keys}
    for name, key in found.items():
        where = cls()
        for part in name.split("."):
            where = getattr(where, part)
        assert key.default == where
    assert len(found) == sum(len(part.keys) for part in keys.parts(cls))
    assert [name for name, key in found.items() if not key.meaning] == []


def test_a_note_before_a_key_follows_its_meaning():
    (part,) = keys.chosen(keys.parts(settings.Settings), ["config.data.train"])
    assert part.keys[0].meaning.startswith("PRPO's records. One data set or several with weights")


def test_parts_and_single_keys(capsys):
    keys.main(["prpo.optimizer", "config.seed"])
    out = capsys.readouterr().out
    assert "prpo.optimizer.warmup = 10\n" in out and "  seed = 0\n" in out
    assert "coldstart" not in out and "group_size" not in out
    keys.main(["--eval", "judge"])
    assert "  judge.url = ''\n" in capsys.readouterr().out


def test_no_such_key(capsys):
    with pytest.raises(SystemExit) as end:
        keys.main(["propo"])
    assert end.value.code == 2
    assert capsys.readouterr().err.startswith("error: propo is neither a key nor a part")


def test_version_and_commands(capsys):
    with pytest.raises(SystemExit) as end:
        __main__.main(["--version"])
    assert end.value.code == 0
    assert capsys.readouterr().out == f"videomem_jax {videomem_jax.__version__}\n"
    __main__.main([])
    for line in capsys.readouterr().out.splitlines():
        if line.startswith("    python -m "):
            module = line.split()[2].replace(".", "/")
            assert (ROOT / f"{module}.py").is_file() or (ROOT / module / "__main__.py").is_file()


def test_one_version_and_one_list_of_requirements():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert set(project["project"]["dynamic"]) == {"version", "dependencies"}
    dynamic = project["tool"]["setuptools"]["dynamic"]
    assert dynamic["dependencies"]["file"] == ["requirements.txt"]
    assert dynamic["version"]["attr"] == "videomem_jax.__version__"
    assert f"\nversion: {videomem_jax.__version__}\n" in (ROOT / "CITATION.cff").read_text()
