"""Hypercorn: python hypercorn_server.py PORT."""

import asyncio
import os
import sys

import hypercorn.asyncio
import hypercorn.config

import resumed


class Config(hypercorn.config.Config):
    """Hypercorn's configuration, with shared sessions."""

    def create_ssl_context(self):
        """Return Hypercorn's own context."""
        context = super().create_ssl_context()
        resumed.install(context, target=os.environ["STORE"], namespace="shop", keyring="fleet.keys")
        return context


async def app(scope, receive, send):
    """Answer every request."""
    if scope["type"] == "http":
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"2")]})
        await send({"type": "http.response.body", "body": b"ok"})


config = Config()
config.bind = [f"127.0.0.1:{sys.argv[1]}"]
config.certfile = config.keyfile = "server.pem"
asyncio.run(hypercorn.asyncio.serve(app, config))
