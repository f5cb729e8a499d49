"""Start, health and stop of the server and its worker processes."""
