"""The sections of a service's configuration: names, types, ranges, meanings.

Settings that engines and requests declare are taken over from those declarations.
"""

from collections.abc import Callable, Mapping
from typing import Annotated, Any, Literal, TypeVar

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    WithJsonSchema,
    create_model,
    model_validator,
)

from actors.settings import unseen_device
from twotower.core import PARAMETERS
from twotower.engine.settings import SETTINGS
from twotower.errors import ConfigError
from twotower.parameters import Choice, Integer, Kind, Number, Parameter
from twotower.showing import show
from twotower.text.chat_template import is_source

Count = Annotated[int, Field(ge=1)]
Seconds = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NonNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Age = Annotated[float, Field(ge=1, le=1_000_000, allow_inf_nan=False)]  # gRPC counts milliseconds in 31 bits
Origin = Annotated[str, Field(pattern=r"^(\*|https?://[^/\s]+)$")]
Port = Annotated[int, Field(ge=1, le=65535)]
_MAY_BE_SPLIT = ("auto", "split")
_PLAIN: Mapping[type[Kind], Any] = {Integer: int, Number: float, Choice: str}
_OF_MODEL = ("max_sequence_length", "experts", "expert_group")
_ELSEWHERE = (*_OF_MODEL, "max_queued_requests")  # settings of engines that are not of the section `cell`


class Section(BaseModel):
    """A part of the configuration: strict types, no unknown names, never changed."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


_Section = TypeVar("_Section", bound=Section)


def _with(settings: Mapping[str, tuple[Any, object]]) -> Callable[[type[_Section]], type[_Section]]:
    """Adds settings that are declared elsewhere to a section's own. To mypy they are not the section's fields, so code
    reads them from `ServiceConfig.engine`, or all together from `given`.
    """

    def make(section: type[_Section]) -> type[_Section]:
        fields: dict[str, Any] = dict(settings)
        name, module = section.__name__, section.__module__
        return create_model(name, __base__=section, __module__=module, __doc__=section.__doc__, **fields)

    return make


def _told_engines(*names: str) -> dict[str, tuple[Any, object]]:
    """Settings of engines: type and default."""
    declared = {name: SETTINGS[name] for name in names}
    return {
        name: (_checked(told.kind), Field(told.default, description=told.meaning)) for name, told in declared.items()
    }


def _checked(kind: Kind) -> Any:
    """A kind's values as a type that checks them."""
    if isinstance(kind, Choice):
        return Annotated[Literal[tuple(map(str, kind.words))], BeforeValidator(_word_of)]
    ends: Mapping[str, Any] = kind.schema
    low, above, high = (ends.get(end) for end in ("minimum", "exclusiveMinimum", "maximum"))
    finite = False if isinstance(kind, Number) else None
    return Annotated[_PLAIN[type(kind)], Field(ge=low, gt=above, le=high, allow_inf_nan=finite)]


def _word_of(value: object) -> object:
    """YAML reads `on` and `off` as true and false."""
    return ("off", "on")[value] if isinstance(value, bool) else value


def _default_of(parameter: Parameter) -> tuple[Any, object]:
    """A request's parameter as a setting; the parameter's own checks apply. The default is None if it depends on the
    cell."""
    kind: Any = Annotated[_PLAIN[type(parameter.kind)], WithJsonSchema({**parameter.kind.schema})]
    if parameter.default_is:
        return kind | None, Field(None, description=parameter.meaning)
    return kind, Field(parameter.default, description=parameter.meaning)


@_with(_told_engines(*_OF_MODEL))
class ModelSection(Section):
    """What is served."""

    checkpoint: str = Field(default="demo", description="a directory in the released layout, or `demo`")
    name: str | None = Field(
        default=None, min_length=1, description="the model's name for clients; else the directory's name"
    )
    dtype: Literal["float32", "bfloat16"] = Field(default="float32", description="dtype of weights, keys and values")
    chat_template: str | None = Field(
        default=None,
        min_length=1,
        description="jinja template of chats: the absolute path of its file, or its text; else the checkpoint's own",
    )

    @model_validator(mode="after")
    def _template_for_every_process(self) -> "ModelSection":
        given = self.chat_template
        if given is not None and not (given.startswith("/") or is_source(given)):
            raise ValueError(f"chat_template: got {show(given)}, wanted an absolute path or a template's text")
        return self


@_with({name: _default_of(parameter) for name, parameter in PARAMETERS.items() if parameter.by_service})
class DecodeSection(Section):
    """The defaults of a request's parameters, under the same names and with the same ranges.

    Without a `mode` the default is `diffusion` if the cells can serve it, else `ar`.
    """

    @property
    def given(self) -> dict[str, object]:
        """The given settings by name, without those that are left to the cell."""
        return self.model_dump(exclude_none=True)


@_with(_told_engines(*(name for name in SETTINGS if name not in _ELSEWHERE)))
class CellSection(Section):
    """One cell: where its towers run, how much they hold and how patient they are.

    `placement: auto` is `split` if one node has a GPU for each tower or, on the CPU, more cores than towers; else it is
    `colocated`. With several denoisers, or with rounded states on the wire, it is always `split`. `device: auto` is
    CUDA if one node has GPUs for all towers of a cell, else the CPU. `cuda:N` is the Nth of the GPUs that a tower
    process sees. Ray shows a process `gpus_per_tower` GPUs (0: all of its node).
    """

    placement: Literal["auto", "split", "colocated", "ar_only"] = Field(
        default="auto", description="a process for each tower, one process for both, or the context tower alone"
    )
    device: str = Field(default="auto", description="auto, cpu, cuda or cuda:N")
    denoisers_per_context: Count = Field(default=1, description="denoiser towers that share one context tower")
    gpus_per_tower: NonNegative | None = Field(
        default=None, description="GPUs that Ray gives a tower process; by default one on CUDA, none on the CPU"
    )
    ssm_wire_dtype: Literal["float32", "bfloat16", "int8", "float8_e4m3fn"] = Field(
        default="float32",
        description="dtype in which Mamba states are sent to a denoiser; bfloat16 rounds them and halves their bytes, "
        "int8 and float8_e4m3fn (with scales) bring them to little more than a quarter",
    )

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


@_with(_told_engines("max_queued_requests"))
class ClusterSection(Section):
    """How many cells and routers there are, when cells start and end, and what a router does when a cell dies.

    Requests wait in the routers. Each router has an equal part of each cell's `max_queued_requests`.
    """

    min_cells: Count = Field(default=1, description="the least number of cells")
    max_cells: Count = Field(default=1, description="the greatest number of cells")
    target_fullness: Annotated[float, Field(gt=0, le=1)] = Field(
        default=0.8,
        description="another cell starts once running and waiting requests fill more than this share of slots or pages",
    )
    upscale_delay_s: NonNegative = Field(default=2.0, description="how long they must do so before another cell starts")
    downscale_delay_s: NonNegative = Field(
        default=120.0,
        description="how long the other cells must be below three quarters of that before a quarter of the cells ends",
    )
    start_tries: Annotated[int, Field(ge=1, le=20)] = Field(
        default=1,
        description="after so many failed starts of cells, or of routers, Serve gives up until settings change; at the "
        "latest after three for each cell or router that is wanted",
    )
    drain_timeout_s: Seconds = Field(
        default=600.0, description="how long a cell that is being removed may take to finish its requests"
    )
    num_routers: Count | None = Field(
        default=None, description="how many routers; by default 2, on two nodes, in a cluster of several nodes, else 1"
    )
    surge: bool = Field(
        default=True,
        description="after a change of settings, start new cells before old ones end; false if both have no room",
    )
    max_resumes: Annotated[int, Field(ge=0, le=100)] = Field(
        default=3, description="how often a request may be resumed after the loss of its cell"
    )
    queue_timeout_s: Seconds = Field(
        default=30.0,
        description="how long a request waits while no cell takes it; while cells are full, it waits for its turn "
        "until its deadline",
    )

    @model_validator(mode="before")
    @classmethod
    def _none_of_before(cls, values: Any) -> Any:
        if isinstance(values, Mapping) and "target_ongoing_requests" in values:
            raise ValueError(
                "target_ongoing_requests: gone; wanted target_fullness, the share of the cells' slots and pages in use "
                "(0.8: of 10 slots the ninth request starts another cell)"
            )
        return values

    @property
    def routers(self) -> int:
        return self.num_routers or 1

    @model_validator(mode="after")
    def _range_of_cells(self) -> "ClusterSection":
        if self.max_cells < self.min_cells:
            raise ValueError(f"max_cells: got {self.max_cells}, wanted at least min_cells ({self.min_cells})")
        return self


class IngressSection(Section):
    """Where the service listens, and what it accepts from clients."""

    host: str = Field(default="127.0.0.1", min_length=1, description="address that both faces listen on")
    http_port: Port = Field(default=8000, description="port of HTTP")
    grpc_port: Port = Field(default=50051, description="port of gRPC")
    max_request_bytes: Count = Field(default=4 * 2**20, description="the largest request")
    request_timeout_s: Seconds = Field(default=600.0, description="the deadline of a request without its own")
    body_timeout_s: Seconds = Field(default=30.0, description="how long a body may take to arrive")
    grpc_max_connection_age_s: Age = Field(
        default=300.0,
        description="after this time, give or take a tenth, a gRPC connection takes no new calls. The client opens "
        "another one, perhaps to another router. Running calls continue",
    )
    cors_origins: list[Origin] = Field(
        default_factory=list, description="origins whose web pages may read answers in a browser; `*`: all"
    )
    keys_file: str | None = Field(
        default=None,
        description="absolute path of the file of keys (`python -m cluster key` makes entries); without it no key is "
        "needed",
    )
    tls_cert_file: str | None = Field(
        default=None,
        description="absolute path of the certificate chain of both faces, in PEM, the service's own certificate "
        "first; with it both faces speak TLS only",
    )
    tls_key_file: str | None = Field(default=None, description="absolute path of the certificate's private key, in PEM")
    grpc_client_ca_file: str | None = Field(
        default=None,
        description="absolute path of CA certificates, in PEM; a gRPC client must show a certificate signed by one of "
        "them. HTTP asks for none",
    )
    ops_page: bool = Field(
        default=True,
        description="whether HTTP serves `/ops`, which shows cells and requests, without text, to any allowed client",
    )

    @model_validator(mode="after")
    def _file_for_every_process(self) -> "IngressSection":
        for name in ("keys_file", "tls_cert_file", "tls_key_file", "grpc_client_ca_file"):
            path = getattr(self, name)
            if path is not None and not path.startswith("/"):
                raise ValueError(f"{name}: got {path!r}, wanted an absolute path")
        return self

    @model_validator(mode="after")
    def _certificate_with_key(self) -> "IngressSection":
        for name, path in (("tls_cert_file", self.tls_cert_file), ("tls_key_file", self.tls_key_file)):
            if path is None and (self.tls_cert_file or self.tls_key_file or self.grpc_client_ca_file):
                raise ValueError(f"{name}: got none, wanted a file: TLS takes tls_cert_file and tls_key_file")
        return self

    @model_validator(mode="after")
    def _two_ports(self) -> "IngressSection":
        if self.http_port == self.grpc_port:
            raise ValueError(f"grpc_port: got {self.grpc_port}, which is http_port too; wanted two ports")
        return self
