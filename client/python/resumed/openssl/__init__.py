"""The only code that knows libssl: finding its functions, and setting the session callbacks of an SSL_CTX."""

from resumed.openssl.binding import Binding

__all__ = ["Binding"]
