"""Words of the stories of `facts`, and the sentences made of them: our own, of no other text."""

import numpy as np

# Every sentence has one of its part's words in it: none of a test's was read in training.
_WORDS = {
    "names": {
        "train": """
            Adam Alice Amy Anna Ben Bill Carl Charles Chris Clara Dan David Diana Edward Ella Emily
            Emma Eric Eva Frank Fred George Grace Harry Helen Henry Jack James Jane Jim John Kate
            Laura Leo Linda Lisa Lucy Mark Martin Mary Michael Nick Nina Paul Peter Rose Ruth Sam
        """,
        "test": """
            Albert Andrew Arthur Barbara Bob Daniel Elizabeth Jacob Joseph Julia Karen Kevin Maria
            Max Oliver Rachel Robert Sarah Simon Steve Susan Thomas Victor William
        """,
    },
    "things": {
        "train": """
            ball basket bell belt blanket bottle bowl box brush button candle card chain chair coat
            coin comb crown cup doll drum feather flag flute fork glove hammer hat helmet hook jar
            jacket kettle key knife ladder lamp letter map mask mirror nail needle pen plate pot
            ribbon ring
        """,
        "test": """
            bag blade book boot brick bucket clock cloth compass diamond dress dish guitar globe
            lens magnet microscope painting phone pillow rope shoe sword watch
        """,
    },
    "people": {
        "train": """
            baker miller doctor farmer teacher driver sailor soldier painter singer lawyer nurse
        """,
        "test": "guard priest hunter judge writer cook",
    },
}
# Every sentence has one of its part's words in it: none of a test's was read in training.
NAMES, THINGS, _PEOPLE = (
    {part: tuple(words.split()) for part, words in kind.items()} for kind in _WORDS.values()
)
_TIMES = (
    "In the morning",
    "At noon",
    "After dinner",
    "Before sunset",
    "A little later",
    "On the way home",
    "For a while",
    "That night",
    "Once again",
    "Without a word",
)
_DEEDS = (
    "walked slowly",
    "stood and waited",
    "sat in silence",
    "sang an old song",
    "told a long story",
    "looked at the sky",
    "slept for an hour",
    "talked to a friend",
    "laughed out loud",
    "worked very hard",
    "thought of the sea",
    "ate some bread",
)
_PLACES = (
    "by the river",
    "near the bridge",
    "in the garden",
    "at the market",
    "under the trees",
    "behind the church",
    "in front of the house",
    "on the hill",
    "in the kitchen",
    "at the station",
    "along the road",
    "by the well",
)
_TOPICS = (
    "the weather",
    "the harvest",
    "the price of wheat",
    "the new road",
    "an old war",
    "the coming winter",
    "the king",
    "the school",
    "a wedding in the town",
    "the long journey",
)
_SAID = (
    "It may rain tomorrow",
    "The summer was too short",
    "Nothing ever happens here",
    "The train is late again",
    "The birds have gone south",
    "My father knew this place",
)
_FACTS = (
    "{name} found a {thing} {place}.",
    "Then {name} found a {thing}.",
    "{place}, {name} found a {thing}.",
    "A {thing} was found by {name} {place}.",
)


def fact(rng: np.random.Generator, name: str, thing: str) -> str:
    """A sentence that tells who found what."""
    made = _one(rng, _FACTS).format(name=name, thing=thing, place=_one(rng, _PLACES))
    return made[0].upper() + made[1:]


def sentence(rng: np.random.Generator, part: str) -> str:
    """A sentence that tells nothing of what is asked; `part` is "train" or "test"."""
    who, place, topic = _one(rng, _PEOPLE[part]), _one(rng, _PLACES), _one(rng, _TOPICS)
    forms = (
        f"{_one(rng, _TIMES)} the {who} {_one(rng, _DEEDS)} {place}.",
        f"The {who} {_one(rng, _DEEDS)} and spoke of {topic}.",
        f"People {place} asked the {who} about {topic}.",
        f'"{_one(rng, _SAID)}," said the {who}.',
    )
    return _one(rng, forms)


def _one(rng: np.random.Generator, choices) -> str:
    return str(choices[rng.integers(len(choices))])
