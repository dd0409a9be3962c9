"""Letters counted in a word, which the tokens of a prompt hide and the answer spells out."""

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
    """How often a letter occurs in a word; the answer spells the word and counts along."""
    word = rng.choice(_WORDS)
    wanted = rng.choice(word if rng.random() < 0.7 else _LETTERS)
    found, steps = 0, []
    for letter in word:
        found += letter == wanted
        steps.append(f"{letter}{found}" if letter == wanted else letter)
    return f"letters {wanted}: {word}\n", f"{','.join(steps)}: {found}"
