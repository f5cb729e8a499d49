"""Cheroot with pyOpenSSL: python cheroot_pyopenssl.py PORT."""

import os
import sys

from cheroot.ssl.pyopenssl import pyOpenSSLAdapter
from cheroot.wsgi import Server

import resumed


def app(environ, start_response):
    """Answer every request."""
    start_response("200 OK", [("content-length", "2")])
    return [b"ok"]


server = Server(("127.0.0.1", int(sys.argv[1])), app)
server.ssl_adapter = pyOpenSSLAdapter("server.pem", "server.pem")
server.ssl_adapter.context = server.ssl_adapter.get_context()
resumed.install(server.ssl_adapter.context, target=os.environ["STORE"], namespace="shop", keyring="fleet.keys")
server.start()
