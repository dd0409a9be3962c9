"""Letters counted in a word that is spelled out."""

from __future__ import annotations

from random import Random

_WORDS = (
    "strawberry banana mississippi bookkeeper committee success tomato potato cherry raspberry blueberry parallel "
    "coffee cheese hippopotamus orange lemon melon mango papaya apricot coconut avocado carrot pepper onion garlic "
    "cabbage cucumber spinach pumpkin walnut almond cashew peanut butter yogurt chocolate cookie biscuit pancake "
    "muffin bread noodle spaghetti lasagna ravioli mushroom mustard vinegar cinnamon vanilla ginger parsley rosemary "
    "lemonade breakfast dinner kitchen bottle kettle saucer teapot elephant giraffe kangaroo squirrel hamster rabbit "
    "monkey gorilla panther leopard cheetah buffalo dolphin penguin pelican sparrow swallow parrot pigeon raccoon "
    "reindeer rhinoceros crocodile alligator butterfly grasshopper mosquito dragonfly caterpillar spider beetle "
    "mountain valley river forest meadow desert island lagoon waterfall volcano thunder lightning rainbow winter "
    "summer autumn spring morning evening midnight tomorrow yesterday weekend calendar century minute second window "
    "curtain carpet pillow blanket mirror ladder hammer screwdriver scissors needle button zipper jacket sweater "
    "trousers slipper umbrella suitcase"
).split()
_LETTERS = "abcdefghijklmnopqrstuvwxyz"


def letters(rng: Random) -> tuple[str, str]:
    """How often a letter occurs in a word. The answer writes each that counts as a capital.

    Tokens hide letters, so the prompt spells the word. Otherwise the answer would have to be known by heart.
    """
    word = rng.choice(_WORDS)
    wanted = rng.choice(word if rng.random() < 0.7 else _LETTERS)
    marked = ",".join(letter.upper() if letter == wanted else letter for letter in word)
    return f"letters {wanted}: {' '.join(word)}\n", f"{marked}: {word.count(wanted)}"
