"""Writers of chains: letters in free replies, and this project's own model."""

import shutil

import pytest

pytest.importorskip("openai")

from tests.data.test_chains import QUESTIONS, call, data  # noqa: F401
from videomem_jax import run, settings
from videomem_jax.data import chain_files
from videomem_jax.data.chain_writers import told_letter
from videomem_jax.data.records import Record, read_records, write_records


@pytest.mark.parametrize(
    "memory",
    [
        "A man walks in. The answer is B.",
        "the correct answer seems to be (B)",
        "the answer could be C",
        "Option B is likely",
        "Answer: C",
        "red, then blue (C)",
        "so far\nB\n",
        "B. the blue card",
        "b) x B) The Blue Card was shown",
    ],
)
def test_a_letter_is_found(memory):
    assert told_letter(memory, ("a cat", "the blue card", "none"))


@pytest.mark.parametrize(
    "memory",
    [
        "A man with vitamin C walks in.",
        "Plan B fails; Anna answers the phone.",
        "The answer machine plays a message.",
        "grade D",
        "An option is a car, the answer was A car.",
        "",
        "12.0 s: the blue card. Then C4 explodes.",
    ],
)
def test_no_letter(memory):
    assert not told_letter(memory, ("a cat", "the blue card", "none"))
    assert not told_letter("the answer is B", ())


@pytest.mark.slow
@pytest.mark.usefixtures("one_device")
def test_the_own_model_writes_chains(call, data, monkeypatch):  # noqa: F811
    own = data / "own"
    shutil.copytree(run.BASE, own)
    prompt = settings.Prompt(
        segments=4, frames=4, max_pixels=4096, prefix_tokens=104, answer="text", options=4
    )
    sized = settings.Settings(prompt=prompt, memory=settings.Memory(slots=8, budget=8))
    settings.save_sizes(sized, own)
    question, options, _ = QUESTIONS[0]
    rows = [Record(f"q{a}", "film.mp4", question, options, a) for a in "ABC"]
    write_records(data / "train.jsonl", rows)
    code, out, err = call(None, None, "--own", own)
    # Three times the same question, with another right answer: one of them is what it says.
    assert code == 0 and "1 chains kept" in out and "2 answer not in memory" in out, err
    [kept], _ = read_records(data / "coldstart.jsonl")
    assert len(kept.memories) == 4 and kept.answers[-1] == kept.answer
    from videomem_jax.videomem import VideoMem

    model = VideoMem.from_pretrained(own, answer_from="memory", max_pixels=4096)
    said = model.ask(str(data / "film.mp4"), kept.question, kept.options)
    assert [s.memory for s in said.segments] == list(kept.memories)
    # Its replies are kept too, and known by its weights.
    chain_files.beside(data / "coldstart.jsonl", "chains.jsonl").unlink()
    monkeypatch.setattr(VideoMem, "read", lambda *_: pytest.fail("it was read before"))
    assert call(None, None, "--own", own)[0] == 0
