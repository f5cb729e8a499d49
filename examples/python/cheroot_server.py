"""Cheroot, CherryPy's server, with the ssl module: python cheroot_server.py PORT."""

import os
import sys

from cheroot.ssl.builtin import BuiltinSSLAdapter
from cheroot.wsgi import Server

import resumed


def app(environ, start_response):
    """Answer every request."""
    start_response("200 OK", [("content-length", "2")])
    return [b"ok"]


server = Server(("127.0.0.1", int(sys.argv[1])), app)
server.ssl_adapter = BuiltinSSLAdapter("server.pem", "server.pem")
resumed.install(server.ssl_adapter.context, target=os.environ["STORE"], namespace="shop", keyring="fleet.keys")
server.start()
