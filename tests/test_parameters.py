"""Parameters as they are declared: each kind's JSON Schema takes what the kind reads, at every edge."""

import math
from dataclasses import fields
from typing import Any

import jsonschema
import pytest

from twotower.constraints import Constraints
from twotower.core import PARAMETERS, PRIORITY, STOP, DecodingParams, Mode
from twotower.engine.settings import SETTINGS, EngineSettings
from twotower.errors import ConfigError, InvalidRequest
from twotower.parameters import Choice, Flag, Integer, Kind, Number, Texts, TokenBiases, TokenIds

DECLARED = {**PARAMETERS, "stop": STOP, "priority": PRIORITY}
KINDS = [setting.kind for setting in (*DECLARED.values(), *SETTINGS.values())]


def _edges(kind: Kind) -> list[Any]:
    """Values at and beside each end of a kind, and some of every other kind."""
    match kind:
        case Integer(low, high):
            own = [low, low - 1] + ([] if high is None else [high, high + 1])
        case Number(low, high):
            own = [low, low - 0.001, low + 0.001, *([1e30] if high is None else [high, high + 0.001])]
        case Choice(words):
            own = [*map(str, words), words.__name__]
        case TokenIds(most):
            own = [[5] * most, [5] * (most + 1)]
        case Constraints(most):
            own = [{kind: "a" * size} for kind in ("json", "regex", "grammar") for size in (0, 1, most, most + 1)]
            own += [{"json": {"type": "object"}}, {"json": 5}, {"json_object": True}, {"json_object": False}]
            own += [{"choice": texts} for texts in (["a", "b"], [], [""], "a", [5])]
            own += [{"regex": "a", "json": "b"}, {"structural_tag": "a"}]
        case TokenBiases(most, largest):
            bias, over = [{str(id): 0 for id in range(count)} for count in (most, most + 1)]
            own = [bias, over, *({"7": n} for n in (largest, -largest, largest + 1, True, "1", None))]
            own += [{name: 0} for name in ("07", "-1", "a", "", " 7", "99999999999")]
        case Texts(most, characters):
            own = ["x" * characters, "x" * (characters + 1), ["x"] * most, ["x"] * (most + 1), ["x", ""], ["x", 5]]
        case _:
            own = []
    return [*own, None, True, False, 1, 1.5, "1", "", [], [1], {}]


def _reads(kind: Kind, value: object) -> bool:
    try:
        kind.read("a", value)
    except InvalidRequest as error:
        assert [problem.field for problem in error.problems] == ["a"]
        return False
    return True


@pytest.mark.parametrize("kind", [*KINDS, Integer(2)], ids=str)
def test_a_schema_takes_what_is_read(kind: Kind) -> None:
    schema = jsonschema.Draft202012Validator(kind.schema)
    schema.check_schema(kind.schema)
    taken = {repr(value): (_reads(kind, value), schema.is_valid(value)) for value in _edges(kind)}
    assert {value for value, (read, valid) in taken.items() if read != valid} == set()
    assert {read for read, _ in taken.values()} == {True, False}


def test_every_parameter_is_declared_and_its_default_is_one_of_its_values() -> None:
    assert list(PARAMETERS) == [field.name for field in fields(DecodingParams)]
    for name, parameter in DECLARED.items():
        assert parameter.kind.read(name, parameter.default) == parameter.default
        assert set(parameter.modes) <= set(Mode) and parameter.meaning
    assert DecodingParams() == DecodingParams(**{name: p.default for name, p in PARAMETERS.items()})  # type: ignore[arg-type]


def test_every_setting_of_an_engine_is_declared_and_its_default_is_one_of_its_values() -> None:
    assert list(SETTINGS) == [field.name for field in fields(EngineSettings)]
    for name, setting in SETTINGS.items():
        assert setting.kind.read(name, setting.default) == setting.default and setting.meaning
    assert EngineSettings() == EngineSettings(**{name: setting.default for name, setting in SETTINGS.items()})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("name", "value", "wanted"),
    [
        ("max_sequences", 0, "an integer at least 1"),
        ("cache_tokens", -1, "an integer at least 0"),
        ("link_timeout_s", 2.9, "a number of at least 3"),
        ("stall_timeout_s", 0, "a number above 0"),
        ("mend_timeout_s", math.inf, "a number above 0"),
        ("start_timeout_s", math.nan, "a number above 0"),
        ("capture", "often", "one of auto, on, off"),
    ],
)
def test_engines_refuse_what_a_setting_does_not_take(name: str, value: Any, wanted: str) -> None:
    with pytest.raises(ConfigError, match=f"^{name}: got .*, wanted {wanted}$"):
        EngineSettings(**{name: value})


def test_in_words() -> None:
    assert [Integer(0, 2**63 - 1).allowed, Integer(-(2**31), 5).allowed] == ["0 – 2⁶³−1", "−2³¹ – 5"]
    assert [Integer(2).allowed, Number(3).allowed, Number(0, low_open=True).allowed] == ["from 2", "from 3", "above 0"]
    assert (Flag().allowed, PARAMETERS["top_p"].kind.allowed) == ("true, false", "(0, 1]")
    told = [PARAMETERS[name].default_told for name in ("top_k", "top_p", "seed", "stop_token_ids", "ignore_eos")]
    assert told == ["0 (off)", "1 (off)", "drawn and returned", "none", "false"]
