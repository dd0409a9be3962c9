"""How the two ends of a link between processes find each other: gloo on CPUs, NCCL between GPUs, one code path.

The context side listens (`open_port`); its address reaches the denoiser side by someone else's means; the denoiser
side connects. One control connection and one data group per (link, epoch), all on one host address, never reused:
after a loss both sides close their ends and begin again under the next epoch.
"""

import time
from collections.abc import Callable
from multiprocessing import AuthenticationError

from torch.distributed import TCPStore  # type: ignore[attr-defined]

from twotower.errors import LinkDown, TwoTowerError
from twotower.exchange.codec import Hello, Message, Refused, Welcome
from twotower.exchange.control import Channel, Listener, dial
from twotower.exchange.data_group import (
    CONTEXT_RANK,
    DENOISER_RANK,
    DataGroup,
    choose_backend,
    device_name,
    join_store,
    serve_store,
)
from twotower.exchange.distributed_link import DistributedLink
from twotower.exchange.distributed_port import DistributedPort
from twotower.exchange.endpoint import Endpoint, MessageStream
from twotower.exchange.settings import EngineHooks, LinkAddress, LinkSettings
from twotower.exchange.staging import DeltaLayout, StagingPool
from twotower.model.cache import TowerCache
from twotower.model.transfer import current
from twotower.wire import CodecError

_VERSION = 1
_GREETING_BYTES = 16
_HANDSHAKE_S = 5.0


def _as_it_is(channel: Channel) -> Channel:
    return channel


def open_port(
    cache: TowerCache,
    link: int,
    epoch: int,
    settings: LinkSettings | None = None,
    hooks: EngineHooks | None = None,
    host: str = "127.0.0.1",
    wrap_channel: Callable[[Channel], Channel] = _as_it_is,
) -> tuple[DistributedPort, LinkAddress]:
    """Listen for one denoiser. Returns at once; the port is lost if nobody connects in `setup_timeout_s`.

    `wrap_channel` puts something around the control channel, such as faults for a test.
    """
    settings = settings or LinkSettings()
    listener = Listener(host)
    store = serve_store(host, settings.setup_timeout_s)
    address = LinkAddress(link, epoch, host, listener.port, store.port, settings, listener.authkey)
    endpoint = Endpoint(address.name, "the denoiser side", settings, hooks or EngineHooks(), cache.device)
    layout = DeltaLayout(cache, settings.ssm_wire_dtype)
    port = DistributedPort(cache, endpoint, layout)
    welcome = _Reception(address, endpoint, layout, device_name(cache.device), wrap_channel)
    endpoint.when_lost(listener.abort)

    def serve() -> None:
        deadline = time.monotonic() + settings.setup_timeout_s
        stream, backend = welcome.accept(listener, deadline)
        left = max(deadline - time.monotonic(), 0.1)
        group, pool = _build(backend, store, CONTEXT_RANK, cache, address, endpoint, left)
        stream.channel.set_timeout(settings.link_timeout_s)
        port.run(stream, group, pool)

    endpoint.spawn("receiver", serve)
    return port, address


def connect(
    address: LinkAddress,
    cache: TowerCache,
    hooks: EngineHooks | None = None,
    wrap_channel: Callable[[Channel], Channel] = _as_it_is,
) -> DistributedLink:
    """Connect `cache`, the mirror, to the port at `address`. Blocks up to `setup_timeout_s`. Raises LinkDown."""
    settings = address.settings
    endpoint = Endpoint(address.name, "the context side", settings, hooks or EngineHooks(), cache.device)
    layout = DeltaLayout(cache, settings.ssm_wire_dtype)
    deadline = time.monotonic() + settings.setup_timeout_s
    try:
        channel = wrap_channel(dial(address.host, address.control_port, address.authkey, settings.setup_timeout_s))
        endpoint.adopt(channel)
        stream = MessageStream(channel)
        hello = Hello(_VERSION, address.link, address.epoch, layout.fingerprint, device_name(cache.device))
        backend = _introduce(stream, hello)
        left = max(deadline - time.monotonic(), 0.1)
        store = join_store(address.host, address.store_port, left)
        with current(cache.device):
            group, pool = _build(backend, store, DENOISER_RANK, cache, address, endpoint, left)
        channel.set_timeout(settings.link_timeout_s)
    except (OSError, EOFError, AuthenticationError, TwoTowerError, RuntimeError) as error:
        reason = endpoint.explain(error, settings.setup_timeout_s)
        endpoint.close(reason)
        raise LinkDown(f"{address.name}: could not connect: {reason}") from error
    link = DistributedLink(cache, endpoint, layout, pool)
    link.run(stream, group)
    return link


def _introduce(stream: MessageStream, hello: Hello) -> str:
    """The data group's backend, as the context side chose it."""
    stream.send([hello])
    match stream.receive():
        case [Welcome(backend=backend)]:
            return backend
        case [Refused(reason=reason)]:
            raise LinkDown(f"refused by the context side: {reason}")
    raise LinkDown("the context side did not answer the introduction")


def _build(
    backend: str,
    store: TCPStore,
    rank: int,
    cache: TowerCache,
    address: LinkAddress,
    endpoint: Endpoint,
    timeout_s: float,
) -> tuple[DataGroup, StagingPool]:
    """The data group, with one greeting sent through it: what is broken shows here, not at the first commit."""
    settings = address.settings
    pool = StagingPool(settings.staging_buffers, settings.staging_bytes, cache.device, through_host=backend == "gloo")
    group = DataGroup(backend, store, rank, cache.device, address.host, timeout_s)
    endpoint.when_lost(group.abort)
    buffer = pool.take()
    assert buffer is not None
    buffer.grow(_GREETING_BYTES)
    greet = group.send if rank == CONTEXT_RANK else group.receive
    greet(buffer, _GREETING_BYTES, 0, timeout_s)
    pool.give(buffer)
    return group, pool


class _Reception:
    """The context side's half of the introduction: lets in the one who was meant."""

    def __init__(
        self,
        address: LinkAddress,
        endpoint: Endpoint,
        layout: DeltaLayout,
        device: str,
        wrap_channel: Callable[[Channel], Channel],
    ) -> None:
        self._address, self._endpoint, self._layout = address, endpoint, layout
        self._device, self._wrap_channel = device, wrap_channel

    def accept(self, listener: Listener, deadline: float) -> tuple[MessageStream, str]:
        """The connection and the data group's backend. Raises LinkDown when nobody fitting comes in time."""
        try:
            while True:
                channel = self._wrap_channel(listener.accept(deadline))
                stream = MessageStream(channel)
                backend = self._greet(stream)
                if backend is not None:
                    self._endpoint.adopt(channel)
                    return stream, backend
                channel.close()
        except TimeoutError as error:
            patience = self._address.settings.setup_timeout_s
            raise LinkDown(f"the denoiser side did not connect within {patience:g} s") from error
        finally:
            listener.close()

    def _greet(self, stream: MessageStream) -> str | None:
        """The backend, or None for one who was refused or left."""
        stream.channel.set_timeout(_HANDSHAKE_S)
        try:
            backend = self._backend_for(stream.receive())
            stream.send([Welcome(backend)])
            return backend
        except (OSError, EOFError):
            return None
        except TwoTowerError as error:
            self._refuse(stream, str(error))
            return None

    def _refuse(self, stream: MessageStream, reason: str) -> None:
        try:
            stream.send([Refused(reason)])
        except OSError:
            return

    def _backend_for(self, messages: list[Message]) -> str:
        """Raises a TwoTowerError that says why the caller cannot come in."""
        match messages:
            case [Hello() as hello]:
                pass
            case _:
                raise CodecError("wanted an introduction")
        mine = Hello(_VERSION, self._address.link, self._address.epoch, self._layout.fingerprint, hello.device)
        for field in ("version", "link", "epoch", "layout"):
            got, wanted = getattr(hello, field), getattr(mine, field)
            if got != wanted:
                raise LinkDown(f"{field}: got {got}, wanted {wanted}")
        return choose_backend(self._address.settings.data_backend, self._device, hello.device)
