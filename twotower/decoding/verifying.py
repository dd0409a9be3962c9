"""How much of a draft stands: the beginning that the causal tower would have written itself.

A draft is one guess for each position, so this is exact speculative sampling. At each position the tower makes its own
choice as `ar` makes it, with `ar`'s random number. A guess stands where it is that choice, which happens with the
probability that the tower gives to the guess. Else the choice takes its place, drawn from the other tokens. So the
tokens are `ar`'s own, whatever was drafted.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from twotower.core import DecodingParams
from twotower.decoding.sampling import TokenParams
from twotower.decoding.steering import Steered, Steering


@dataclass(frozen=True, slots=True)
class Verdict:
    """What stands of a block: its first `cut` tokens; `token` is the causal tower's next one. `margin`: the smallest of
    their decisions. `finite`: no NaN and no infinity in the logits they are made from; else nothing else counts."""

    cut: int
    token: int
    margin: float
    finite: bool


def places(
    params: DecodingParams, first: int, count: int, steering: Steering | None = None, draft: Sequence[int] = ()
) -> list[TokenParams]:
    """How the answer's tokens from place `first` on are chosen. `draft`: what stands between them where it is right;
    only looked at with a `steering`."""
    if steering is not None:
        return [TokenParams.of(params, first + place, Steered(steering, draft, place)) for place in range(count)]
    if not params.samples:
        return [TokenParams.of(params, first)] * count
    return [TokenParams.of(params, first + place) for place in range(count)]


def verdict(block: Sequence[int], chosen: Sequence[Sequence[float]]) -> Verdict:
    """`chosen[i]`: token, margin and finiteness of the choice behind `block[i]`, and perhaps more. The block's first
    token is certain."""
    cut = 1
    while cut < len(block) and block[cut] == chosen[cut - 1][0]:
        cut += 1
    made = chosen[:cut]
    return Verdict(cut, int(made[-1][0]), min(one[1] for one in made), all(one[2] for one in made))
