"""What clients of a protected service show and believe: a key, certificates, and the name that they want to see."""

import json
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

import grpc
import httpx

from twotower_client import Tls


@dataclass(frozen=True, slots=True)
class Access:
    """`tls.server_name`: the name in the certificate of the service, which is asked by its address."""

    key: str = field(repr=False)
    tls: Tls

    def to(self, name: str) -> "Access":
        """The same, where the certificate has this name."""
        return Access(self.key, replace(self.tls, server_name=name))

    @property
    def channel(self) -> grpc.ChannelCredentials:
        shown = grpc.ssl_channel_credentials(*self.tls.read())
        return grpc.composite_channel_credentials(shown, grpc.access_token_call_credentials(self.key))

    @property
    def options(self) -> list[tuple[str, str]]:
        """Of the channel."""
        # Each channel has connections of its own, or a new one would show nothing.
        return [("grpc.ssl_target_name_override", self.tls.server_name or ""), ("grpc.use_local_subchannel_pool", 1)]

    @property
    def headers(self) -> dict[str, str]:
        return {"authorization": f"Bearer {self.key}"}

    @property
    def hooks(self) -> dict[str, list[Callable[[httpx.Request], Awaitable[None]]]]:
        """Of httpx: the name for each request."""

        async def named(request: httpx.Request) -> None:
            request.extensions["sni_hostname"] = self.tls.server_name

        return {"request": [named]}

    def written(self) -> str:
        """For another process."""
        files = (self.tls.root_certificates, self.tls.certificate, self.tls.key)
        return json.dumps([self.key, *map(str, files), self.tls.server_name])

    @classmethod
    def read(cls, text: str) -> "Access":
        key, roots, certificate, own_key, name = json.loads(text)
        return cls(key, Tls(Path(roots), Path(certificate), Path(own_key), server_name=name))
