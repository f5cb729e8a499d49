"""The engine on a local LMDB database."""
