"""Twisted: python twisted_server.py PORT."""

import os
import sys
from pathlib import Path

from twisted.internet import reactor, ssl
from twisted.web.resource import Resource
from twisted.web.server import Site

import resumed
import resumed.twisted


class Answer(Resource):
    """Answers every request."""

    isLeaf = True

    def render_GET(self, request):
        return b"ok"


options = ssl.PrivateCertificate.loadPEM(Path("server.pem").read_text()).options()
installation = resumed.install(
    options.getContext(), target=os.environ["STORE"], namespace="shop", keyring="fleet.keys", ignore_id_context=True
)
creator = resumed.twisted.ConnectionCreator(options.getContext(), installation)
reactor.listenSSL(int(sys.argv[1]), Site(Answer()), creator, interface="127.0.0.1")
reactor.run()
