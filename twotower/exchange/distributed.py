"""How the two ends of a link between processes find each other: gloo on CPUs, NCCL between GPUs, one code path.

The context side listens (`open_port`). The caller brings its address to the denoiser side, which connects. Each (link,
epoch) has one control connection and one data group, all on one host address. None is reused: after a loss both sides
close their ends and begin again under the next epoch.
"""

import time
from collections.abc import Callable

from torch.distributed import TCPStore  # type: ignore[attr-defined]

from twotower.errors import LinkDown, TwoTowerError
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
from twotower.transport.handshake import About

_GREETING_BYTES = 16


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
    address = LinkAddress(link, epoch, listener.address, store.port, settings)
    endpoint = Endpoint(address.name, "the denoiser side", settings, hooks or EngineHooks(), cache.device)
    layout = DeltaLayout(cache, settings.ssm_wire_dtype)
    port = DistributedPort(cache, endpoint, layout)
    reception = _Reception(address, layout, device_name(cache.device))
    endpoint.when_lost(listener.abort)

    def serve() -> None:
        deadline = time.monotonic() + settings.setup_timeout_s
        channel = wrap_channel(reception.accept(listener, deadline))
        endpoint.adopt(channel)
        left = max(deadline - time.monotonic(), 0.1)
        group, pool = _build(reception.backend, store, CONTEXT_RANK, cache, address, endpoint, left)
        channel.set_timeout(settings.link_timeout_s)
        port.run(MessageStream(channel), group, pool)

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
        about = _about(address, layout, device_name(cache.device))
        dialled, told = dial(address.control, about, settings.setup_timeout_s)
        channel = wrap_channel(dialled)
        endpoint.adopt(channel)
        left = max(deadline - time.monotonic(), 0.1)
        store = join_store(address.control.host, address.store_port, left)
        with current(cache.device):
            group, pool = _build(told.get("backend", ""), store, DENOISER_RANK, cache, address, endpoint, left)
        channel.set_timeout(settings.link_timeout_s)
    except (OSError, EOFError, TwoTowerError, RuntimeError) as error:
        reason = endpoint.explain(error, settings.setup_timeout_s)
        endpoint.close(reason)
        raise LinkDown(f"{address.name}: could not connect: {reason}") from error
    link = DistributedLink(cache, endpoint, layout, pool)
    link.run(MessageStream(channel), group)
    return link


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
    group = DataGroup(backend, store, rank, cache.device, address.control.host, timeout_s)
    endpoint.when_lost(group.abort)
    buffer = pool.take()
    assert buffer is not None
    buffer.grow(_GREETING_BYTES)
    greet = group.send if rank == CONTEXT_RANK else group.receive
    greet(buffer, _GREETING_BYTES, 0, timeout_s)
    pool.give(buffer)
    return group, pool


class _Reception:
    """The context side's half of the handshake: lets in the one who was meant. `backend`: then the data group's."""

    def __init__(self, address: LinkAddress, layout: DeltaLayout, device: str) -> None:
        self._address, self._device = address, device
        self._mine = _about(address, layout, device)
        self.backend = ""

    def accept(self, listener: Listener, deadline: float) -> Channel:
        """Raises LinkDown when nobody fitting comes in time."""
        try:
            return listener.accept(deadline, self._admit)
        except TimeoutError as error:
            patience = self._address.settings.setup_timeout_s
            raise LinkDown(f"the denoiser side did not connect within {patience:g} s") from error
        finally:
            listener.close()

    def _admit(self, theirs: About) -> About:
        """Raises a TwoTowerError that says why the caller cannot come in."""
        for field in ("link", "epoch", "layout"):
            got, wanted = theirs.get(field), self._mine[field]
            if got != wanted:
                raise LinkDown(f"{field}: got {got}, wanted {wanted}")
        self.backend = choose_backend(self._address.settings.data_backend, self._device, theirs.get("device", ""))
        return {"backend": self.backend}


def _about(address: LinkAddress, layout: DeltaLayout, device: str) -> dict[str, str]:
    """`layout` describes a delta's tensors, `device` where the cache lives."""
    return {
        "link": str(address.link),
        "epoch": str(address.epoch),
        "layout": layout.fingerprint,
        "device": device,
    }
