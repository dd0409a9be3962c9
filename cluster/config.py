"""The service's settings: one model for `--config` files, `--set` overrides and the `args` of a Serve YAML.

Knows names, types and ranges; does not open the checkpoint. Every setting here has an effect.
"""

import difflib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from actors.settings import unseen_device
from twotower.core import Mode
from twotower.errors import ConfigError, InvalidRequest
from twotower.validation import ModelLimits, make_request, one_line, parse_params, show, show_name

Count = Annotated[int, Field(ge=1)]
Seconds = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Origin = Annotated[str, Field(pattern=r"^(\*|https?://[^/\s]+)$")]
Port = Annotated[int, Field(ge=1, le=65535)]
_MAY_BE_SPLIT = ("auto", "split")


class Section(BaseModel):
    """A part of the configuration: strict types, no unknown names, never changed."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class ModelSection(Section):
    """What is served. `checkpoint` is a directory or `demo`; `name` defaults to the directory's."""

    checkpoint: str = "demo"
    name: str | None = Field(default=None, min_length=1)
    dtype: Literal["float32", "bfloat16"] = "float32"
    max_sequence_length: Count = 4096


class DecodeSection(Section):
    """What a request that says nothing gets. Without a `mode`: diffusion where the cell can do it, else ar.

    Ranges are those of a request's own parameters.
    """

    mode: Literal["diffusion", "mock_ar", "ar"] | None = None
    max_new_tokens: int = 128
    block_size: int = 16
    steps_per_block: int = 16
    confidence_threshold: float = 0.8
    temperature: float = 0.0


class CellSection(Section):
    """One cell: where its towers run and how much they hold.

    `placement` auto: `split` where one node has a GPU for each tower or, on the CPU, more cores than towers; else
    `colocated`; with several denoisers or a rounded wire always `split`. `device` auto: CUDA where one node has GPUs
    for all towers of a cell, else the CPU; cuda:N is the Nth of the GPUs that a tower process sees, of which Ray shows
    it `gpus_per_tower` (0: all of its node). `cache_tokens` 0: room for every sequence's longest. `capture` on: all
    usual passes at start, which takes a while; on CUDA a model with experts must be bfloat16, the GPU of compute
    capability 9 or 10. `gpus_per_tower` not given: one on CUDA, none on the CPU.
    `ssm_wire_dtype` bfloat16 rounds the Mamba states that a context tower sends to its denoisers, which is half the
    bytes of a commit.
    """

    placement: Literal["auto", "split", "colocated", "ar_only"] = "auto"
    device: str = "auto"
    denoisers_per_context: Count = 1
    max_sequences: Count = 32
    cache_tokens: Annotated[int, Field(ge=0)] = 0
    prefill_chunk_tokens: Count = 512
    capture: Literal["auto", "on", "off"] = "auto"
    gpus_per_tower: Annotated[float, Field(ge=0, allow_inf_nan=False)] | None = None
    ssm_wire_dtype: Literal["float32", "bfloat16"] = "float32"
    link_timeout_s: Annotated[float, Field(ge=3, allow_inf_nan=False)] = (
        10.0  # a tower with nothing to say speaks every second
    )
    stall_timeout_s: Seconds = 60.0
    start_timeout_s: Seconds = 600.0

    @model_validator(mode="after")
    def _device_that_is_seen(self) -> "CellSection":
        try:
            problem = unseen_device(self.device, self.gpus_per_tower)
        except ConfigError as error:
            problem = str(error)
        if problem is not None:
            raise ValueError(problem)
        return self

    @model_validator(mode="after")
    def _no_wire_but_when_split(self) -> "CellSection":
        if self.placement not in _MAY_BE_SPLIT and self.ssm_wire_dtype != "float32":
            raise ValueError(
                f"ssm_wire_dtype: got {self.ssm_wire_dtype} with placement {self.placement}, which sends no states; "
                "wanted float32"
            )
        return self

    @model_validator(mode="after")
    def _several_denoisers_only_when_split(self) -> "CellSection":
        if self.placement not in _MAY_BE_SPLIT and self.denoisers_per_context != 1:
            raise ValueError(
                f"denoisers_per_context: got {self.denoisers_per_context} with placement {self.placement}, wanted 1"
            )
        return self


class ClusterSection(Section):
    """How many cells and routers, when another cell starts or ends, and what a router does where a cell dies.

    A request goes on elsewhere at most `max_resumes` times; while no cell takes it, it waits for one no longer than
    `queue_timeout_s`.
    """

    min_cells: Count = 1
    max_cells: Count = 1
    target_ongoing_requests: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 8.0
    upscale_delay_s: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 10.0
    downscale_delay_s: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 120.0
    drain_timeout_s: Seconds = 600.0
    num_routers: Count = 1
    max_queued_requests: Annotated[int, Field(ge=0)] = 64
    max_resumes: Annotated[int, Field(ge=0, le=100)] = 3
    queue_timeout_s: Seconds = 30.0

    @model_validator(mode="after")
    def _range_of_cells(self) -> "ClusterSection":
        if self.max_cells < self.min_cells:
            raise ValueError(f"max_cells: got {self.max_cells}, wanted at least min_cells ({self.min_cells})")
        return self


class IngressSection(Section):
    """Where the service listens, how big a request may be and how long its body may take to arrive, how long one
    without its own deadline may take, and whose web pages (origins, or `*` for all) may read answers in a browser.
    """

    host: str = Field(default="127.0.0.1", min_length=1)
    http_port: Port = 8000
    grpc_port: Port = 50051
    max_request_bytes: Count = 4 * 2**20
    request_timeout_s: Seconds = 600.0
    body_timeout_s: Seconds = 30.0
    cors_origins: list[Origin] = Field(default_factory=list)

    @model_validator(mode="after")
    def _two_ports(self) -> "IngressSection":
        if self.http_port == self.grpc_port:
            raise ValueError(f"grpc_port: got {self.grpc_port}, which is http_port too; wanted two ports")
        return self


class ServiceConfig(Section):
    """All settings. `parse` is the way to make one."""

    model: ModelSection = ModelSection()
    decode: DecodeSection = DecodeSection()
    cell: CellSection = CellSection()
    cluster: ClusterSection = ClusterSection()
    ingress: IngressSection = IngressSection()

    @classmethod
    def parse(cls, values: Mapping[str, Any]) -> "ServiceConfig":
        """Raises ConfigError: one line naming every wrong setting, with what was got and what was wanted."""
        try:
            config = cls.model_validate(dict(values))
        except ValidationError as error:
            raise ConfigError("; ".join(_explain(problem) for problem in error.errors())) from None
        problems = [*_wrong_defaults(config), *_too_small_cache(config)]
        if problems:
            raise ConfigError("; ".join(problems))
        return config


def _wrong_defaults(config: ServiceConfig) -> Iterator[str]:
    """What a request could not ask for cannot be its default either."""
    limits = ModelLimits(1, config.model.max_sequence_length)
    values = config.decode.model_dump(exclude={"mode"})
    mode = config.decode.mode or (Mode.AR if config.cell.placement == "ar_only" else Mode.DIFFUSION)
    try:
        params = parse_params(values, limits)
        # The shortest of all prompts, in the mode that it would get.
        given = {"max_new_tokens": config.decode.max_new_tokens}
        make_request("decode", [0], given, replace(limits, defaults=replace(params, mode=Mode(mode))))
    except InvalidRequest as error:
        yield from (f"decode.{problem}" for problem in error.problems)


def _too_small_cache(config: ServiceConfig) -> Iterator[str]:
    tokens, longest = config.cell.cache_tokens, config.model.max_sequence_length
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
