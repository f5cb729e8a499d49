"""gunicorn, which forks its workers: gunicorn -c gunicorn_conf.py --certfile server.pem --bind 127.0.0.1:PORT APP."""

import os

import resumed

context = None
workers = 2


def ssl_context(config, default_ssl_context_factory):
    """Return the context: gunicorn asks for it at every connection, and needs the same one each time."""
    global context
    if context is None:
        context = default_ssl_context_factory()
        resumed.install(context, target=os.environ["STORE"], namespace="shop", keyring="fleet.keys")
    return context
