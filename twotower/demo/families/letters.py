"""Letters counted in a word, which the tokens of a prompt hide and the answer spells out."""

from __future__ import annotations

from random import Random

_WORDS = (
    "strawberry banana mississippi bookkeeper committee success tomato potato cherry raspberry blueberry parallel "
    "coffee cheese orange lemon melon mango papaya apricot coconut carrot pepper onion garlic cabbage pumpkin walnut "
    "almond peanut butter chocolate cookie pancake muffin bread noodle kitchen bottle kettle teapot elephant giraffe "
    "kangaroo squirrel hamster rabbit monkey gorilla leopard buffalo dolphin penguin parrot raccoon butterfly spider "
    "mountain river forest meadow island summer winter"
).split()
_LETTERS = "abcdefghijklmnopqrstuvwxyz"


def letters(rng: Random) -> tuple[str, str]:
    """How often a letter occurs in a word. The answer spells the word, each letter that counts as a capital: every
    place then follows from the word alone.
    """
    word = rng.choice(_WORDS)
    wanted = rng.choice(word if rng.random() < 0.7 else _LETTERS)
    spelled = ",".join(letter.upper() if letter == wanted else letter for letter in word)
    return f"letters {wanted}: {word}\n", f"{spelled}: {word.count(wanted)}"
