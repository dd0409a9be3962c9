"""OpenAI's shape of an error, for routers and for Serve's proxies. Imports nothing."""


def error_shape(message: str, kind: str, param: str | None = None, code: str | None = None) -> dict[str, object]:
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}
