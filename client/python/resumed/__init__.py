"""resumed: a central TLS session store for fleets of TLS frontends."""
