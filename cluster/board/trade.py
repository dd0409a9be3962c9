"""The trade of quality for throughput, for the ops page: the results of `python -m cluster tune` for the served
checkpoint, and the service's defaults. `/ops/trade` returns them on request; the stream does not repeat them.
"""

import asyncio
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from fastapi import FastAPI, Response
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from pydantic_core import to_json

from cluster.runs.served_model import ServedModel
from twotower.core import Mode
from twotower.showing import one_line, show

RECORD = "tuned.json"  # in the checkpoint's directory: what `tune --output DIRECTORY/tuned` writes
_MOST_BYTES = 2**20
_Share = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]
_OfArs = Annotated[float, Field(ge=0, le=1000, allow_inf_nan=False)]
_Rate = Annotated[float, Field(gt=0, allow_inf_nan=False)]


class _Told(BaseModel):
    """A part of a foreign file: other names in it stay out of the page."""

    model_config = ConfigDict(frozen=True, strict=True, extra="ignore")


class MeasuredWay(_Told):
    """One way of decoding: `threshold` is γ, None for `ar`. Quality and its 95 % interval are shares of `ar`'s, so is
    throughput (`times_ar`)."""

    threshold: _Share | None
    quality: _OfArs
    low: _OfArs
    high: _OfArs
    tokens_per_step: _Rate
    times_ar: _Rate


class MeasuredVerified(MeasuredWay):
    """The figures of `verified`. `same_as_ar`: all answers were `ar`'s, token for token. `recommended`: it is better
    than any γ.
    """

    threshold: None = None
    same_as_ar: bool
    recommended: bool


class TradeRecord(_Told):
    """A sweep's results. `quality`: by known answers, or by agreement with `ar`. `ways`: `ar` first, then γ.

    `verified`: None in records of sweeps that did not ask for it.
    """

    checkpoint: str
    quality: Literal["answers", "agreement"]
    prompts: int = Field(ge=1)
    concurrency: int = Field(ge=1)
    quality_floor: _Share
    recommendation: _Share | None
    measured: str = Field(default="", max_length=40)
    hardware: str = Field(default="", max_length=200)
    ways: list[MeasuredWay] = Field(min_length=2, max_length=64)
    verified: MeasuredVerified | None = None

    @model_validator(mode="after")
    def _ar_and_thresholds(self) -> "TradeRecord":
        first, *others = (way.threshold for way in self.ways)
        if first is not None or None in others or len({*others}) != len(others):
            raise ValueError("wanted ar (threshold null) first, then each threshold once")
        return self


@dataclass(frozen=True, slots=True)
class Told:
    """The service's defaults, and the record; without a record, `why` there is none."""

    mode: Mode
    threshold: float
    record: TradeRecord | None
    why: str = ""


class Trade:
    """`directory`: the checkpoint's that is served, as `model`."""

    def __init__(self, directory: Path, model: ServedModel) -> None:
        self._file, self._fingerprint = directory / RECORD, model.fingerprint
        self._modes, self._defaults = model.limits.modes, model.limits.defaults

    def told(self) -> Told:
        """Reads the file each time, because a sweep of this service may have written it since."""
        record = self._read()
        why, found = (record, None) if isinstance(record, str) else ("", record)
        return Told(self._defaults.mode, self._defaults.confidence_threshold, found, why)

    def _read(self) -> TradeRecord | str:
        """The record, or why there is none."""
        if Mode.DIFFUSION not in self._modes:
            return "this service has no diffusion, so there is no γ to choose"
        try:
            if self._file.stat().st_size > _MOST_BYTES:
                return f"{RECORD}: got {self._file.stat().st_size} bytes, wanted at most {_MOST_BYTES}"
            record = TradeRecord.model_validate_json(self._file.read_bytes())
        except FileNotFoundError:
            return f"the checkpoint brings no {RECORD}"
        except OSError as error:
            return f"{RECORD}: cannot be read: {error.strerror}"
        except ValidationError as error:
            return f"{RECORD}: {_first_problem(error)}"
        if record.checkpoint != self._fingerprint:
            return f"{RECORD}: got the figures of checkpoint {show(record.checkpoint)}, wanted {self._fingerprint}"
        return record


def add_trade(app: FastAPI, trade: Trade) -> None:
    """Adds the path to a router's application."""

    @app.api_route("/ops/trade", methods=["GET", "HEAD"])
    async def told() -> Response:
        body = to_json(await asyncio.to_thread(trade.told))
        return Response(
            body,
            headers={"cache-control": "no-store", "x-content-type-options": "nosniff"},
            media_type="application/json",
        )


def _first_problem(error: ValidationError) -> str:
    problem = error.errors(include_url=False)[0]
    where = ".".join(map(str, problem["loc"]))
    got = "" if problem["type"] == "missing" else f", got {show(problem['input'])}"
    return one_line(f"{where}: {problem['msg']}{got}" if where else f"{problem['msg']}")
