"""Handshakes that are suspended while their sessions are looked up, so that an event loop goes on."""
