"""Letters counted in a word, which the tokens of a prompt hide and the answer spells out."""

from __future__ import annotations

from random import Random

_WORDS = (
    "strawberry blueberry raspberry banana cherry orange lemon melon mango papaya apricot coconut avocado tomato "
    "potato carrot pepper onion garlic cabbage cucumber spinach pumpkin walnut almond cashew peanut butter cheese "
    "yogurt chocolate cookie biscuit pancake muffin bread noodle spaghetti lasagna ravioli mushroom mustard vinegar "
    "cinnamon vanilla ginger parsley rosemary coffee lemonade breakfast dinner kitchen bottle kettle saucer teapot "
    "elephant giraffe kangaroo squirrel hamster rabbit monkey gorilla panther leopard cheetah buffalo dolphin penguin "
    "pelican sparrow swallow parrot pigeon raccoon reindeer hippopotamus rhinoceros crocodile alligator butterfly "
    "grasshopper mosquito dragonfly caterpillar spider beetle mountain valley river forest meadow desert island "
    "lagoon waterfall volcano thunder lightning rainbow winter summer autumn spring morning evening midnight tomorrow "
    "yesterday weekend calendar century minute second window curtain carpet pillow blanket mirror ladder hammer "
    "screwdriver scissors needle button zipper jacket sweater trousers slipper umbrella suitcase wallet bicycle "
    "scooter tractor airplane helicopter submarine rocket balloon engine wheel bridge tunnel station railroad harbor "
    "lighthouse library museum theater cinema stadium hospital school college university professor student teacher "
    "doctor lawyer engineer carpenter painter musician violin trumpet guitar piano drummer orchestra melody rhythm "
    "computer keyboard monitor printer network program compiler algorithm function variable parameter tensor matrix "
    "vector gradient transformer attention embedding token mississippi tennessee massachusetts hawaii jamaica morocco "
    "canada brazil germany finland sweden bookkeeper committee success address possess occasion necessary accommodate "
    "parallel happiness kindness wisdom courage freedom justice silence laughter whisper shadow mystery puzzle riddle"
).split()
_CONSONANTS, _VOWELS = "bcdfghjklmnprstvwz", "aeiou"


def _made_up(rng: Random) -> str:
    """Two to four syllables that nobody has heard, so that spelling has to be learned piece by piece."""
    syllables = []
    for _ in range(rng.choice((2, 3, 3, 4))):
        end = rng.choice(("", "", "n", "r", "s", "l", "t", "ll", "ss", "y"))
        syllables.append(rng.choice(_CONSONANTS) + rng.choice(_VOWELS) + end)
    return "".join(syllables)


def letters(rng: Random) -> tuple[str, str]:
    """How often a letter occurs in a word; the answer spells the word and counts along."""
    word = rng.choice(_WORDS) if rng.random() < 0.75 else _made_up(rng)
    wanted = rng.choice(word) if rng.random() < 0.85 else rng.choice(_CONSONANTS + _VOWELS)
    steps = [f"{letter}{word[: place + 1].count(wanted)}" for place, letter in enumerate(word)]
    return f"letters {wanted}: {word}\n", f"{','.join(steps)}: {word.count(wanted)}"
