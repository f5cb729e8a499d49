"""uvicorn: python uvicorn_server.py PORT."""

import os
import sys

import uvicorn

import resumed


async def app(scope, receive, send):
    """Answer every request."""
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"2")]})
    await send({"type": "http.response.body", "body": b"ok"})


def ssl_context(config, default_ssl_context_factory):
    """Return uvicorn's own context, with shared sessions."""
    context = default_ssl_context_factory()
    resumed.install(context, target=os.environ["STORE"], namespace="shop", keyring="fleet.keys")
    return context


uvicorn.run(app, port=int(sys.argv[1]), lifespan="off", ssl_certfile="server.pem", ssl_context_factory=ssl_context)
