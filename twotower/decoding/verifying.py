"""How much of a draft is accepted: the prefix that the causal tower would have written itself.

A draft is one guess for each position, so this is exact speculative sampling. At each position the tower makes `ar`'s
choice, with `ar`'s random number. A guess is accepted if it equals that choice, which happens with the probability that
the tower gives to the guess. Otherwise the choice, drawn from the other tokens, replaces the guess. So the tokens are
`ar`'s own, whatever was drafted.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from twotower.core import DecodingParams
from twotower.decoding.sampling import TokenParams
from twotower.decoding.steering import Steered, Steering


@dataclass(frozen=True, slots=True)
class Verdict:
    """The accepted part of a block: its first `cut` tokens; `token` is the causal tower's next one. `margin`: the
    smallest margin of these decisions. `finite`: their logits hold no NaN and no infinity; if False, the rest is
    undefined.
    """

    cut: int
    token: int
    margin: float
    finite: bool


def places(
    params: DecodingParams, first: int, count: int, steering: Steering | None = None, draft: Sequence[int] = ()
) -> list[TokenParams]:
    """How the answer's tokens from place `first` on are chosen. `draft`: the tokens between them if the draft is right;
    used only with a `steering`.
    """
    if steering is not None:
        return [TokenParams.of(params, first + place, Steered(steering, draft, place)) for place in range(count)]
    if not params.samples:
        return [TokenParams.of(params, first)] * count
    return [TokenParams.of(params, first + place) for place in range(count)]


def verdict(block: Sequence[int], chosen: Sequence[Sequence[float]]) -> Verdict:
    """`chosen[i]`: token, margin and finiteness of the choice after `block[i]`, and perhaps more columns. The block's
    first token is certain.
    """
    cut = 1
    while cut < len(block) and block[cut] == chosen[cut - 1][0]:
        cut += 1
    made = chosen[:cut]
    return Verdict(cut, int(made[-1][0]), min(one[1] for one in made), all(one[2] for one in made))
