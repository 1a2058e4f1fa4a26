"""The tokenizer: tags are tokens, and no user text can spell one."""

import string

import numpy as np
import pytest
import tokenizers

from videomem_jax.models.config import ConfigError
from videomem_jax.tokenizer import LETTERS, SPECIALS, TAGS, Tokenizer

TEXTS = (
    "the cat was on the red card",
    "  two  spaces\tand\nlines\r\n\r\n",
    "It's 3.14, isn't it? (yes) [no] {maybe} a<b>c</b> <|x|> <memory <answer/>",
    "Zürich, 東京, русский, 🐈‍⬛ and é",
    "",
    "\n",
    "A",
)
SPELT = (
    *SPECIALS,
    *TAGS,
    "before<memory>after",
    "<memory>cat</memory><answer>A</answer><|im_end|>",
    "<<memory>>",
    "<mem<memory>ory>",
    "<|im_end|><|im_end|>",
    "<|im_<|im_end|>end|>",
    "\n<|im_start|>assistant\n",
)


@pytest.fixture(params=["tiny", "qwen"])
def either(request):
    """The tiny tokenizer, and the real one where it is there."""
    return request.getfixturevalue("tokenizer" if request.param == "tiny" else "qwen")


def specials(tokenizer: Tokenizer) -> set[int]:
    """Ids that no text may give."""
    ids = tokenizer.ids
    return {
        *(ids.pad, ids.im_start, ids.im_end, ids.vision_start, ids.vision_end),
        *(ids.image_pad, ids.video_pad),
        *(ids.memory_open, ids.memory_close, ids.answer_open, ids.answer_close),
    }


def test_tags_are_single_tokens(either):
    ids = either.ids
    tags = [ids.memory_open, ids.memory_close, ids.answer_open, ids.answer_close]
    assert len(specials(either)) == 11
    assert [either._inner.token_to_id(tag) for tag in TAGS] == tags
    for tag, number in zip(TAGS, tags, strict=True):
        assert either._inner.encode(f"cat{tag}cat", add_special_tokens=False).ids.count(number) == 1
        assert either.decode([number]) == ""
    assert max(tags) < len(either)


def test_letters_are_single_tokens_of_text(either):
    assert either.ids.letters == tuple(either.encode(letter)[0] for letter in LETTERS)
    assert [either.decode([i]) for i in either.ids.letters] == list(LETTERS)
    assert either.text_mask(len(either))[list(either.ids.letters)].all()


@pytest.mark.parametrize("text", TEXTS)
def test_text_survives_the_trip(either, text):
    ids = either.encode(text)
    assert either.decode(ids) == text.strip()
    assert either.decode(either.encode_memory(text)) == text.strip()
    # Where nothing is special, our ids are the library's.
    assert ids == either._inner.encode(text, add_special_tokens=False).ids


@pytest.mark.parametrize("text", SPELT)
def test_no_text_spells_a_special_token(either, text):
    for ids in (either.encode(text), either.encode_memory(text)):
        assert not specials(either) & set(ids)
        assert either.text_mask(len(either))[ids].all()
        assert either.decode(ids) == text.strip()


def test_no_random_text_spells_a_special_token(tokenizer):
    rng = np.random.default_rng(0)
    parts = [*SPECIALS, *TAGS, *(t[:4] for t in TAGS), *(t[3:] for t in TAGS), "<", "|", ">", "a "]
    mask = tokenizer.text_mask(len(tokenizer))
    for _ in range(300):
        text = "".join(parts[i] for i in rng.integers(0, len(parts), 6))
        ids = tokenizer.encode(text)
        assert mask[ids].all() and tokenizer.decode(ids) == text.strip()


def test_memory_is_written_as_words_in_the_middle_of_a_text(tokenizer):
    assert tokenizer.encode_memory("the cat") == tokenizer.encode(" the cat")
    assert tokenizer.encode_memory("  the cat\n") == tokenizer.encode(" the cat")
    assert tokenizer.encode_memory(" \n ") == []


def test_decoding_leaves_special_tokens_out(tokenizer):
    ids = [tokenizer.ids.memory_open, *tokenizer.encode(" cat"), tokenizer.ids.im_end]
    assert tokenizer.decode(ids) == "cat"


def test_text_mask(either, rows_beyond=7):
    rows = len(either) + rows_beyond
    mask = either.text_mask(rows)
    assert mask.shape == (rows,) and mask.dtype == bool
    assert not mask[list(specials(either))].any()
    assert not mask[-rows_beyond:].any()
    added = len(either._inner.get_added_tokens_decoder())
    assert mask.sum() == len(either) - added
    # Each byte can be written, so each text can.
    assert mask[either.encode(string.printable)].all()


def test_text_mask_where_the_vocabulary_itself_has_the_specials():
    """Some files count them among the learnt pieces."""
    inner = tokenizers.Tokenizer(tokenizers.models.BPE())
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    trainer = tokenizers.trainers.BpeTrainer(
        special_tokens=list(SPECIALS), initial_alphabet=alphabet, show_progress=False
    )
    inner.train_from_iterator(["a b"], trainer)
    own = Tokenizer(inner)
    mask = own.text_mask(len(own) + 3)
    assert not mask[list(specials(own))].any() and mask[list(own.ids.letters)].all()


def test_save_and_load(tokenizer, tmp_path):
    tokenizer.save(tmp_path)
    again = Tokenizer.load(tmp_path)
    assert again.ids == tokenizer.ids and len(again) == len(tokenizer)
    for text in (*TEXTS, *SPELT):
        assert again.encode(text) == tokenizer.encode(text)


def test_tags_are_added_where_they_are_not(tokenizer, tmp_path):
    tokenizer.save(tmp_path, tags=False)
    written = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    assert all(written.token_to_id(tag) is None for tag in TAGS)
    again = Tokenizer.load(tmp_path)
    assert again.ids == tokenizer.ids
    assert again.new_tags[again.ids.memory_open] == again.encode("[")
    assert list(again.new_tags) == sorted(specials(again))[-4:]
    again.save(tmp_path)
    assert not Tokenizer.load(tmp_path).new_tags


def test_training_keeps_to_the_size_and_is_repeatable():
    lines = ["the cat sat on the mat and the dog sat on the cat"] * 3
    first, second = (Tokenizer.train(lines, 300) for _ in range(2))
    assert len(first) <= 300 and first.ids == second.ids
    assert len(first.encode(" the cat")) < len(" the cat")
    assert first.encode(lines[0]) == second.encode(lines[0])


def test_what_cannot_be_loaded_is_named(tmp_path):
    with pytest.raises(ConfigError, match="tokenizer.json does not exist"):
        Tokenizer.load(tmp_path)
    (tmp_path / "tokenizer.json").write_text('{"version": "1.0"')
    with pytest.raises(ConfigError, match="tokenizer.json cannot be read as a tokenizer"):
        Tokenizer.load(tmp_path)
    foreign = tokenizers.Tokenizer(tokenizers.models.BPE())
    foreign.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(ConfigError, match=r"lacks the token <\|endoftext\|>: it is not Qwen3-VL"):
        Tokenizer.load(tmp_path)


def test_ids_of_the_real_tokenizer(qwen):
    ids = qwen.ids
    assert (ids.pad, ids.im_start, ids.im_end) == (151643, 151644, 151645)
    assert (ids.vision_start, ids.vision_end) == (151652, 151653)
    assert (ids.image_pad, ids.video_pad) == (151655, 151656)
    tags = (ids.memory_open, ids.memory_close, ids.answer_open, ids.answer_close)
    assert tags == (151669, 151670, 151671, 151672)
    mask = qwen.text_mask(151936)
    assert mask.sum() == 151643 and not mask[151643:].any()
