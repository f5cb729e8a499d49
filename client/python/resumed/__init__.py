"""resumed: share TLS sessions between all frontends of a fleet.

install() puts the store under a server's TLS context; that is all that most frontends need:

    import resumed

    resumed.install(context, target="dns:///store:7400", namespace="shop", keyring="fleet.keys")
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from resumed._public import *  # noqa: F403
else:

    def __getattr__(name: str) -> object:
        """Return a public name. Programs that import only the stubs, such as the server, start faster without them."""
        value = globals()[name] = getattr(import_module("resumed._public"), name)
        return value

    def __dir__() -> list[str]:
        """Return the public names, also before the first use."""
        return [*globals(), *import_module("resumed._public").__all__]
