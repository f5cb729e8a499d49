"""TLS, authentication by client certificate, and authorization by grants."""
