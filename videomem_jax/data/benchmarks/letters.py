"""Which option a reply in free words names.

Rules go from the surest to the vaguest; the first that finds a letter decides. A letter counts only
where it stands for an option: the article in "A man walks" and the capital of "Dogs" do not, and a
reply that names no option has none.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence

from videomem_jax.tokenizer import LETTERS

# Words that only turn up before what is chosen, and what may stand between them and the letter.
_CHOSEN = (
    r"(?:answer|option|choice|response|letter|conclusion)s?\b"
    r"(?:\s+(?:here|to\b[^.\n:]{0,60}?|for\b[^.\n:]{0,60}?|number))?"
    r"\s*(?:would be|should be|must be|will be|could be|is clearly|is most likely|is probably|"
    r"is likely|is|was|be|as|:|=|-|\u2192)\s*:?\s*(?:option|choice|letter|answer)?"
)
_PICKED = (
    r"\bi(?:'d|'ll| would| will| am going to)?\s+(?:choose|select|pick|go with|say|guess|opt for|"
    r"think|believe)\s*(?:it is|it's|that)?\s*(?:the)?\s*(?:option|choice|answer|letter)?"
)
_SAID = (
    "(?:\u7b54\u6848\u662f|\u7b54\u6848\u4e3a|\u7b54\u6848|\u9009|\u9078|\uc815\ub2f5\uc740)[:\\s]*"
)
_RIGHT = (
    r"(?:option|choice|answer|letter)?\s*{mark}\s*(?:is|seems|looks|would be|appears)\s+"
    r"(?:to be\s+)?(?:the\s+)?(?:\w+\s+)?(?:correct|right|best|true|answer|most)"
)


def extract(reply: str, options: Sequence[str], *, letters: str = LETTERS) -> str | None:
    """The letter of the option that a reply names; None if it names none.

    Args:
      reply: what a model said.
      options: without letters; those beyond them do not exist.
      letters: of the options.
    """
    text = _plain(reply)
    if not text:
        return None
    one = f"[{letters[: len(options)]}]"
    if found := re.fullmatch(rf"[\W_]*({one})[\W_]*", text, re.IGNORECASE):
        return found[1].upper()
    same = [i for i, option in enumerate(options) if _words(option) == _words(text)]
    if len(same) == 1:
        return letters[same[0]]
    # Not inside a word, nor before an apostrophe; "A" and "I" by themselves may be words.
    alone = rf"(?<![\w'])({one})(?![\w'])"
    marked = rf"[(\[\"'`]*\s*{alone}"
    for rule in (
        rf"(?i:{_CHOSEN})\s*{marked}(?!\s+[a-z]|\s*(?:is|was)\b|-)",
        rf"(?i:{_PICKED})\s*{marked}(?!\s+[a-z])",
        rf"{_SAID}[(\[]?({one})(?!\w)",
        rf"(?i:{_CHOSEN})\s*[(\[]?((?i:{one}))[)\]]?\W*$",
        rf"(?i:{_CHOSEN}|{_PICKED})\s*{marked}(?=\s*(?:because|since|as|and|with|for)\b)",
        rf"(?<!\bnot )(?i:{_RIGHT.format(mark=f'[(]?(?-i:{alone})[)]?')})",
    ):
        if found := list(re.finditer(rule, text)):
            return next(group for group in reversed(found[-1].groups()) if group).upper()
    lines = [line.strip() for line in text.split("\n") if line.strip()]
    for line in dict.fromkeys((lines[0], lines[-1])):
        if found := re.fullmatch(rf"[\W_]*({one})[\W_]*", line):
            return found[1]
    if found := re.match(rf"[\W_]*{alone}(?:\s*[.):\]\n\u2013-]|,|;)(?!\w\.)", text):
        return found[1]
    # A letter that is no English word may go without a mark.
    found = re.match(rf"{alone}\s", text)
    if found and (found[1] not in "AI" or re.match(r"\w\s+(?:is|because|since|as)\b", text)):
        return found[1]
    if found := re.search(rf"{alone}[\s.)\]!\"'`]*$", text):
        return found[1]
    for rule in (rf"[(\[]\s*({one})\s*[)\]]", rf"(?i:option|choice)\s+{alone}"):
        if found := re.findall(rule, text):
            return found[-1]
    told = [i for i, option in enumerate(options) if _tells(text, option)]
    if len(told) == 1:
        return letters[told[0]]
    for rule in (rf"{alone}\s*[.):](?!\w)", alone):
        found = [letter for letter in re.findall(rule, text) if rule != alone or letter not in "AI"]
        if found:
            return found[-1]
    return None


def _plain(reply: str) -> str:
    """The reply without thoughts, tags, and the marks of Markdown and LaTeX; in plain letters."""
    text = unicodedata.normalize("NFKC", reply)
    text = re.sub(r"<think>.*?</think>", " ", text, flags=re.DOTALL)
    tagged = re.findall(r"<answer>(.*?)(?:</answer>|$)", text, flags=re.DOTALL)
    text = tagged[-1] if tagged else text
    text = re.sub(r"<[^<>\n]*>", " ", text)
    text = re.sub(r"\\(?:boxed|text|textbf|mathbf|mathrm)\s*", "", text)
    return re.sub(r"[*_#`{}$]+", "", text).strip()


def _words(text: str) -> list[str]:
    return re.findall(r"\w+", text.casefold())


def _tells(text: str, option: str) -> bool:
    """Whether a reply has an option's words in a row."""
    words, wanted = _words(text), _words(option)
    if not wanted:
        return False
    return any(words[i : i + len(wanted)] == wanted for i in range(len(words) - len(wanted) + 1))
