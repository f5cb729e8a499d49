"""aiohttp: python aiohttp_server.py PORT."""

import os
import ssl
import sys

from aiohttp import web

import resumed

context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
context.load_cert_chain("server.pem")
resumed.install(context, target=os.environ["STORE"], namespace="shop", keyring="fleet.keys")


async def answer(request):
    """Answer every request."""
    return web.Response(text="ok")


app = web.Application()
app.router.add_get("/", answer)
web.run_app(app, host="127.0.0.1", port=int(sys.argv[1]), ssl_context=context)
