"""From a user's input (flags, or a line of JSON) to a checked request. Reads headers and tokenizer, no tower."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import twotower
from twotower.core import LOGPROBS, PARAMETERS, PRIORITY, TRACE, DecodingParams, Request
from twotower.errors import InvalidRequest
from twotower.expert_formats import ExpertFormat
from twotower.model.checkpoint import Checkpoint
from twotower.parameters import Integer, check_text
from twotower.strict_json import parse_line, read_lines
from twotower.text.grammars import Grammars
from twotower.text.tokenizer import Tokenizer, check_stop, encode_prompt, load_tokenizer
from twotower.validation import ModelLimits, Problems, check_known, make_request

_FIELDS = {"id", "prompt", "prompt_token_ids", "stop", "priority", "trace", "logprobs", *PARAMETERS}


@dataclass(frozen=True, slots=True)
class Model:
    """A checkpoint as the command sees it before its towers are loaded."""

    directory: Path
    checkpoint: Checkpoint
    tokenizer: Tokenizer | None
    limits: ModelLimits
    grammars: Grammars | None = None

    @property
    def nbytes(self) -> int:
        return sum(path.stat().st_size for path in set(self.checkpoint.files.values()))


@dataclass(frozen=True, slots=True)
class Order:
    """A checked request, its stop strings, and the user's name for it."""

    request: Request
    stop: tuple[str, ...] = ()
    id: str | int | None = None


@dataclass(frozen=True, slots=True)
class BadLine:
    """A line of the input that cannot be served. Numbers begin at 1."""

    number: int
    error: InvalidRequest


def directory_of(name: str) -> Path:
    """The directory of the named checkpoint; `demo` is the one shipped with the library."""
    return Path(twotower.__file__).parent / "demo" / "checkpoint" if name == "demo" else Path(name)


def open_model(name: str, max_sequence_length: object, experts: ExpertFormat | None = None) -> Model:
    """`demo`, or a directory. `experts`: the format in which experts are held. Raises CheckpointError, or
    InvalidRequest for an invalid length.
    """
    longest = Integer(2).read("max_sequence_length", max_sequence_length)
    directory = directory_of(name)
    checkpoint = Checkpoint.open(directory, experts)
    defaults = DecodingParams(mode=checkpoint.modes[0])
    limits = ModelLimits(checkpoint.config.vocab_size, longest, checkpoint.modes, defaults)
    grammars = Grammars(directory, checkpoint.config.vocab_size, checkpoint.config.eos_token_id)
    return Model(directory, checkpoint, load_tokenizer(directory), limits, grammars)


def order_of(values: Mapping[str, object], model: Model, number: int = 1) -> Order:
    """One checked request. Raises InvalidRequest."""
    problems = Problems()
    check_known(values, _FIELDS, problems)
    problems.raise_any()
    prompt = _prompt(values, model)
    params = {name: value for name, value in values.items() if name in PARAMETERS}
    priority = values.get("priority", PRIORITY.default)
    trace, logprobs = values.get("trace", TRACE.default), values.get("logprobs", LOGPROBS.default)
    request = make_request(str(number), prompt, params, model.limits, priority, trace, logprobs)
    if request.params.structured_outputs is not None and model.grammars is not None:
        model.grammars.matcher(request.params.structured_outputs)  # before any tower is loaded
    return Order(request, check_stop(model.tokenizer, values.get("stop", ())), _id(values))


def read_orders(path: Path, model: Model, given: Mapping[str, object]) -> Iterator[Order | BadLine]:
    """Every line of a JSON lines file, in order, without blank ones. `given` fills in what a line leaves out. So a flag
    without a meaning in a line's own mode is refused for that line.
    """
    for number, line in read_lines(path):
        yield _order_of_line(line, model, given, number)


def _order_of_line(line: bytes, model: Model, given: Mapping[str, object], number: int) -> Order | BadLine:
    try:
        return order_of({**given, **parse_line(line)}, model, number)
    except InvalidRequest as error:
        return BadLine(number, error)


def _prompt(values: Mapping[str, object], model: Model) -> Sequence[object]:
    if ("prompt" in values) == ("prompt_token_ids" in values):
        got = "both" if "prompt" in values else "neither"
        raise InvalidRequest.of("prompt", f"got {got}, wanted either prompt (text) or prompt_token_ids")
    if "prompt" in values:
        return encode_prompt(model.tokenizer, values["prompt"], model.limits.max_sequence_length)
    return values["prompt_token_ids"]  # type: ignore[return-value]


def _id(values: Mapping[str, object]) -> str | int | None:
    name = values.get("id")
    if isinstance(name, bool) or not isinstance(name, str | int | None):
        raise InvalidRequest.of("id", f"got a {type(name).__name__}, wanted a string or an integer")
    return check_text("id", name) if isinstance(name, str) else name
