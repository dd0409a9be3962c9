"""The service's configuration: one model for `--config` files, `--set` overrides and the `args` of a Serve YAML.

Parses settings and reports their errors; does not open the checkpoint.
"""

import difflib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from cluster.sections import CellSection, ClusterSection, DecodeSection, IngressSection, ModelSection, Section
from twotower.core import DecodingParams, Mode
from twotower.engine.settings import SETTINGS, EngineSettings
from twotower.errors import ConfigError, InvalidRequest
from twotower.expert_formats import ExpertFormat
from twotower.showing import one_line, show, show_name
from twotower.validation import ModelLimits, check_values, make_request


class ServiceConfig(Section):
    """All settings. `parse` is the way to make one."""

    model: ModelSection = ModelSection()
    decode: DecodeSection = DecodeSection()
    cell: CellSection = CellSection()
    cluster: ClusterSection = ClusterSection()
    ingress: IngressSection = IngressSection()

    @property
    def engine(self) -> EngineSettings:
        """The settings of a cell's engines."""
        given = dict(chain(self.model, self.cell, self.cluster))
        return EngineSettings(**{name: given[name] for name in SETTINGS})

    @classmethod
    def parse(cls, values: Mapping[str, Any]) -> "ServiceConfig":
        """Raises ConfigError: one line naming every wrong setting, with what was got and what was wanted."""
        try:
            config = cls.model_validate(dict(values))
        except ValidationError as error:
            raise ConfigError("; ".join(_explain(problem) for problem in error.errors())) from None
        problems = [*_wrong_experts(config)] or [*_wrong_defaults(config), *_too_small_cache(config)]
        if problems:
            raise ConfigError("; ".join(problems))
        return config


def _wrong_experts(config: ServiceConfig) -> Iterator[str]:
    """The error of two settings that must fit together."""
    given = dict(config.model)
    try:
        ExpertFormat.of(given["experts"], given["expert_group"])
    except ConfigError as error:
        yield f"model.{error}"


def _wrong_defaults(config: ServiceConfig) -> Iterator[str]:
    """A default must be a value that a request could ask for."""
    mode = Mode.AR if config.cell.placement == "ar_only" else Mode.DIFFUSION
    limits = ModelLimits(1, config.engine.max_sequence_length, defaults=DecodingParams(mode=mode))
    try:
        values = check_values(config.decode.given)
        defaults = replace(limits.defaults, **values)
        # The shortest of all prompts.
        make_request("decode", [0], {"max_new_tokens": defaults.max_new_tokens}, replace(limits, defaults=defaults))
    except InvalidRequest as error:
        yield from (f"decode.{problem}" for problem in error.problems)


def _too_small_cache(config: ServiceConfig) -> Iterator[str]:
    tokens, longest = config.engine.cache_tokens, config.engine.max_sequence_length
    if 0 < tokens < longest:
        yield (
            f"cell.cache_tokens: got {tokens}, wanted 0 (room for every sequence's longest) or at least "
            f"model.max_sequence_length ({longest})"
        )


def load_config(file: Path | None, overrides: Iterable[str] = ()) -> ServiceConfig:
    """The configuration of a YAML file (or all defaults) with `a.b=value` overrides. Raises ConfigError."""
    values = _read(file) if file is not None else {}
    for override in overrides:
        _override(values, override)
    return ServiceConfig.parse(values)


def _read(file: Path) -> dict[str, Any]:
    try:
        values = yaml.safe_load(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"{file}: no such file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{file}: cannot be read: {error}") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"{file}: not YAML: {' '.join(str(error).split())}") from error
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise ConfigError(f"{file}: got a {type(values).__name__}, wanted sections such as 'model:' and 'cell:'")
    return values


def _override(values: dict[str, Any], override: str) -> None:
    path, equals, text = override.partition("=")
    section, dot, name = path.strip().partition(".")
    if not (equals and dot and section and name):
        raise ConfigError(f"--set {one_line(override)}: wanted section.name=value, such as cell.placement=colocated")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError:
        raise ConfigError(f"--set {one_line(override)}: {show(text)} is not a YAML value") from None
    inner = values.setdefault(section, {})
    if not isinstance(inner, dict):
        raise ConfigError(f"{section}: got {show(inner)}, wanted a mapping of settings")
    inner[name] = value


def _explain(problem: Any) -> str:
    where = ".".join(show_name(str(part)) for part in problem["loc"])
    got = show(problem["input"])
    match problem["type"]:
        case "extra_forbidden":
            return f"{where}: unknown setting{_did_you_mean(problem['loc'])}"
        case "value_error":
            message = str(problem["ctx"]["error"])
            return f"{where}.{message}" if where else message
        case "model_type":
            return f"{where}: got {got}, wanted a mapping of settings"
        case "literal_error":
            return f"{where}: got {got}, wanted one of {problem['ctx']['expected']}"
    wanted = problem["msg"].removeprefix("Input should be ").removeprefix("a valid ")
    return f"{where}: got {got}, wanted {wanted}"


def _did_you_mean(location: tuple[str | int, ...]) -> str:
    section: Any = ServiceConfig
    for part in location[:-1]:
        section = section.model_fields[str(part)].annotation
    near = difflib.get_close_matches(str(location[-1]), section.model_fields, n=1)
    if near:
        return f"; did you mean {near[0]}?"
    return f", wanted one of {', '.join(section.model_fields)}"
