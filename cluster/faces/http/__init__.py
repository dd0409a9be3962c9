"""OpenAI's completions over HTTP, behind Serve's proxies."""
