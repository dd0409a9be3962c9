"""Which of the environment's proxies leads to a service. Opens no connection."""

from importlib.util import find_spec
from urllib.request import getproxies, proxy_bypass

import httpx2

from twotower_client.target import Target

_SCHEMES = ("http", "https", "socks5", "socks5h")


def proxy_to(target: Target) -> httpx2.Proxy | None:
    """None if the target has no proxy: `use_proxies` is off, no variable names one, or NO_PROXY names its host. Raises
    ValueError for a proxy that cannot be used.
    """
    if not target.use_proxies:
        return None
    named = getproxies()
    told = named.get(target.scheme) or named.get("all")
    if not told or proxy_bypass(target.address.replace("[", "").replace("]", "")):
        return None
    try:
        url = httpx2.URL(told if "://" in told else f"http://{told}")
    except httpx2.InvalidURL as error:
        raise ValueError(f"proxy: got an invalid URL: {error}") from None
    if url.scheme not in _SCHEMES:
        raise ValueError(f"proxy: got {url.scheme}://, wanted one of {', '.join(_SCHEMES)}")
    if url.scheme.startswith("socks") and find_spec("socksio") is None:
        raise ValueError(f"proxy: got {url.scheme}://, wanted http:// or https://; SOCKS needs the package socksio")
    return httpx2.Proxy(url)
