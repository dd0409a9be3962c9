"""Which of the environment's proxies a client goes through."""

import pytest

from twotower_client import AsyncClient, Client
from twotower_client.proxies import proxy_to
from twotower_client.target import target_of

VARIABLES = ("http_proxy", "https_proxy", "all_proxy", "no_proxy")


@pytest.fixture(autouse=True)
def no_proxies(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)


def told(url: str, use_proxies: bool = True) -> str | None:
    proxy = proxy_to(target_of(url, use_proxies=use_proxies))
    return None if proxy is None else str(proxy.url)


def test_each_scheme_has_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    assert told("http://host") is None
    monkeypatch.setenv("http_proxy", "plain:1")
    monkeypatch.setenv("all_proxy", "http://me:secret@all:2")
    assert (told("http://host"), told("https://host")) == ("http://plain:1", "http://all:2")
    assert told("http://host", use_proxies=False) is None


@pytest.mark.parametrize("kept", ["*", "host", ".example.org", "other, sub.example.org:8000", "::1"])
def test_hosts_that_have_none(kept: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", "http://proxy:1")
    monkeypatch.setenv("no_proxy", kept)
    urls = {"*": "http://any", "host": "http://host", "::1": "http://[::1]"}
    assert told(urls.get(kept, "http://sub.example.org:8000")) is None
    assert kept == "*" or told("http://elsewhere") == "http://proxy:1"


@pytest.mark.parametrize("kind", [Client, AsyncClient])
@pytest.mark.parametrize(
    ("proxy", "words"), [("ftp://proxy", "got ftp://, wanted one of"), ("http://a:b", "got an invalid URL")]
)
def test_one_that_cannot_be(kind: type, proxy: str, words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("all_proxy", proxy)
    with pytest.raises(ValueError, match=f"proxy: .*{words}"):
        kind("http://host", use_proxies=True)
    kind("http://host")
