"""What came of each case, and the acceptance table of all."""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from benchmarks.chaos_parts.client import BY_OTHER
from benchmarks.pods_parts.clients import Request
from benchmarks.reference.report import bullets, table

_WORDS = """\
- requests: all that the case saw, from the moment on that the service was whole. failed: ended with an error.
  changed: other tokens, text, usage or log-probabilities than the library gives in one process. near ties: fp32 may
  decide otherwise there (margin below 1e-5).
- told, then right: cut with an error, and right when asked again under the same request id. Only where a case says so
  are requests asked again; elsewhere an error is a failure.
- resumed, handed over: runs that went on on another cell, because theirs was gone, or was to go.
- longest pause: the longest time between two events of a stream, from the fault on; in brackets before it, under the
  same load. first tokens: the longest wait of a stream for its first event, likewise.
"""
_SHOWN = 300


@dataclass(slots=True)
class Result:
    """Of one case. `struck`: when the fault came, on the clients' clock. `waited`: what took how many seconds."""

    case: str
    what: str
    struck: float = 0.0
    requests: list[Request] = field(default_factory=list)
    resumed: int = 0
    handed_over: int = 0
    waited: list[tuple[str, float]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)

    def outcomes(self, begin: str) -> list[Request]:
        return [request for request in self.requests if request.outcome.startswith(begin)]

    @property
    def bad(self) -> list[Request]:
        """Those under way still count as failed."""
        return [request for request in self.requests if not request.is_good]

    @property
    def told(self) -> list[Request]:
        return [request for request in self.requests if request.errors and request.is_good]

    @property
    def passed(self) -> bool:
        return bool(self.requests) and not self.bad and not self.wrong


def render(results: Sequence[Result], setting: dict[str, str]) -> str:
    parts = [
        "# What Kubernetes does to the service, and what its clients notice",
        bullets(setting),
        acceptance(results),
        _WORDS,
        *map(_story, results),
        "## What went wrong\n\n" + ("\n".join(line for result in results for line in _wrongs(result)) or "Nothing."),
    ]
    return "\n\n".join(parts) + "\n"


def acceptance(results: Sequence[Result]) -> str:
    head = (
        "case,passed,requests,failed,changed,near ties,told then right,resumed,handed over,"
        "longest pause s,first tokens s"
    )
    return table(head.split(","), [_row(result) for result in results])


def _row(result: Result) -> list[str]:
    changed, near = result.outcomes("changed"), result.outcomes("near tie")
    numbers = [
        len(result.requests), len(result.bad) - len(changed), len(changed), len(near), len(result.told),
        result.resumed, result.handed_over,
    ]  # fmt: skip
    after, before = pauses(result)
    late, early = first_tokens(result)
    return [
        result.case, "yes" if result.passed else "**no**", *map(str, numbers),
        f"{after:.1f} ({before:.1f})", f"{late:.1f} ({early:.1f})",
    ]  # fmt: skip


def pauses(result: Result) -> tuple[float, float]:
    """The longest of a stream's, from the fault on and before it."""
    requests = result.requests
    after = max((request.pause_s(since=result.struck) for request in requests), default=0.0)
    return after, max((request.pause_s(until=result.struck) for request in requests), default=0.0)


def first_tokens(result: Result) -> tuple[float, float]:
    """The longest wait for them, of those that came from the fault on and of those before it."""
    waits = [(request.events[0], request.events[0] - request.sent) for request in result.requests if request.events]
    after = max((wait for at, wait in waits if at > result.struck), default=0.0)
    return after, max((wait for at, wait in waits if at <= result.struck), default=0.0)


def _story(result: Result) -> str:
    lines = [f"- {took_s:.1f} s until {what}" for what, took_s in result.waited]
    lines += [f"- {note}" for note in result.notes]
    other = len(result.outcomes(BY_OTHER))
    if other:
        lines.append(f"- {other} answers are those of the other weights, {len(result.outcomes('right')) - other} not")
    return f"## {result.case}\n\n{result.what}\n\n" + "\n".join(lines)


def _wrongs(result: Result) -> Iterable[str]:
    """Each way to go wrong once, with how often."""
    for text in result.wrong:
        yield f"- {result.case}: {text.splitlines()[0][:_SHOWN]}"
    for outcome, number in Counter(request.outcome or "no end" for request in result.bad).items():
        first = next(request for request in result.bad if (request.outcome or "no end") == outcome)
        when = f"sent {first.sent - result.struck:+.1f} s, ended {first.ended - result.struck:+.1f} s"
        yield f"- {result.case}: {number} × {outcome[:_SHOWN]} ({first.what}; {len(first.events)} events; {when})"
