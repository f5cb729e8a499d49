"""The only code that knows libssl: finding its functions, and setting the session callbacks of an SSL_CTX."""

from resumed.openssl.binding import Binding
from resumed.openssl.session_ids import session_ids

__all__ = ["Binding", "session_ids"]
