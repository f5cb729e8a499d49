"""The standard library's http.server: python http_server.py PORT."""

import http.server
import os
import ssl
import sys

import resumed

context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
context.load_cert_chain("server.pem")
resumed.install(context, target=os.environ["STORE"], namespace="shop", keyring="fleet.keys")

server = http.server.ThreadingHTTPServer(("127.0.0.1", int(sys.argv[1])), http.server.SimpleHTTPRequestHandler)
server.socket = context.wrap_socket(server.socket, server_side=True)
server.serve_forever()
