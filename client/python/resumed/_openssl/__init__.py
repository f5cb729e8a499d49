"""The only code that knows libssl: finding its functions, and setting the session callbacks of an SSL_CTX."""

from resumed._openssl.callbacks import CallbackBinding
from resumed._openssl.session_ids import session_ids

__all__ = ["CallbackBinding", "session_ids"]
