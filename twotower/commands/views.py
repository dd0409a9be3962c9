"""An answer on the terminal as it arrives: its text alone or, on request, token by token and step by step.

Colour is used on a terminal only. Elsewhere new text is `{+so+}` and rejected text `[-so-]`, as in `git diff
--word-diff`.
"""

import math
import os
import sys
from collections.abc import Iterable, Sequence
from itertools import groupby

from twotower.commands.told import Piece
from twotower.core import Likelihood, RoundEvent, StepEvent, TraceEvent
from twotower.text.token_names import TokenNames
from twotower.text.token_texts import Texts

_MASKED, _KNOWN, _NEW, _REJECTED = range(4)
_CODES = {_MASKED: "2", _NEW: "1;32", _REJECTED: "9;31"}
_MARKS = {_NEW: ("{+", "+}"), _REJECTED: ("[-", "-]")}
_NAMED = 28  # columns of a token's name, and of what stands before a step's text


class TextView:
    """The text alone."""

    def hear(self, told: Piece | TraceEvent) -> None:
        if isinstance(told, Piece) and told.text:
            print(told.text, end="", flush=True)

    def end(self) -> None:
        print(flush=True)


class DetailView:
    """A line for each step and round of a trace, and each token that has a likelihood; the whole text at the end."""

    def __init__(self, texts: Texts, colour: bool) -> None:
        self._names, self._colour = TokenNames(texts), colour
        self._text, self._below_head, self._start = "", False, -1
        self._places: dict[int, str] = {}  # of the block that fills: by index among the new tokens

    def hear(self, told: Piece | TraceEvent) -> None:
        if isinstance(told, Piece):
            self._text += told.text
            if self._start >= 0:
                self._say(f"  {f'committed, {len(told.token_ids)} tokens':{_NAMED}}{_escaped(told.text)}")
                self._start = -1
            self._table(told.token_ids, told.likelihoods)
            return
        self._below_head = False
        if told.start != self._start or (isinstance(told, StepEvent) and told.step == 0):
            self._begin(told)
        self._say(self._step(told) if isinstance(told, StepEvent) else self._round(told))

    def end(self) -> None:
        print(f"\n{self._text}", flush=True)

    def _say(self, line: str) -> None:
        print(line.rstrip(), flush=True)

    def _begin(self, told: TraceEvent) -> None:
        self._start, self._places = told.start, {}
        size = told.size if isinstance(told, StepEvent) else 0
        self._say(f"block at {told.start}" + (f", {size} positions" if size else ""))

    def _step(self, step: StepEvent) -> str:
        new = dict(zip(step.positions, self._shown(step.token_ids), strict=True))
        self._places |= new
        places = range(step.start, step.start + step.size)
        parts = [(_NEW if n in new else _KNOWN if n in self._places else _MASKED, self._places.get(n)) for n in places]
        about = f"step {step.step}, {len(new)} fixed" + (f", p ≥ {min(step.confidence):.2f}" if new else "")
        return f"  {about:{_NAMED}}" + self._painted((kind, text or "░") for kind, text in parts)

    def _round(self, verdict: RoundEvent) -> str:
        draft, cut = self._shown(verdict.draft), verdict.num_accepted
        parts = [(_KNOWN, text) for text in draft[:cut]] + [(_REJECTED, text) for text in draft[cut:]]
        parts += [(_NEW, text) for text in self._shown([verdict.token_id])]
        about = f"{cut} of {len(draft)} drafted stand" if draft else "no draft"
        return f"  {about:{_NAMED}}" + self._painted(parts)

    def _shown(self, token_ids: Sequence[int], quotes: bool = False) -> list[str]:
        """Token texts without characters that a terminal would obey; the id if the text does not identify the token."""
        names = zip(token_ids, self._names.of(token_ids), strict=True)
        return [f"‹{token}›" if name == f"token_id:{token}" else _escaped(name, quotes) for token, name in names]

    def _painted(self, parts: Iterable[tuple[int, str]]) -> str:
        runs = [(kind, "".join(text for _, text in run)) for kind, run in groupby(parts, lambda part: part[0])]
        return "".join(self._paint(kind, text) for kind, text in runs)

    def _paint(self, kind: int, text: str) -> str:
        if self._colour:
            return f"\033[{_CODES[kind]}m{text}\033[0m" if kind in _CODES else text
        before, behind = _MARKS.get(kind, ("", ""))
        return before + text + behind

    def _table(self, token_ids: Sequence[int], likelihoods: Sequence[Likelihood]) -> None:
        if likelihoods and not self._below_head:
            self._say(f"{'log-prob':>10} {'p':>8} {'denoiser':>9}  {'token':{_NAMED}}likeliest")
            self._below_head = True
        for token, one in zip(token_ids, likelihoods, strict=False):
            [name] = self._shown([token], quotes=True)
            tops = zip(self._shown(one.top_token_ids, quotes=True), one.top_log_probs, strict=True)
            likeliest = "  ".join(f"{top} {log_prob:.4f}" for top, log_prob in tops)
            denoiser = "–" if one.confidence is None else f"{one.confidence:.1%}"
            sure = f"{one.log_prob:10.4f} {math.exp(one.log_prob):8.1%} {denoiser:>9}"
            self._say(f"{sure}  {name:{_NAMED - 1}} {likeliest}")


def _escaped(text: str, quotes: bool = False) -> str:
    return repr(text) if quotes else repr(text)[1:-1]


View = TextView | DetailView


def view_of(trace: bool, logprobs: bool, texts: Texts) -> View:
    """The view that fits the request."""
    colour = sys.stdout.isatty() and not os.environ.get("NO_COLOR")
    return DetailView(texts, colour) if trace or logprobs else TextView()
