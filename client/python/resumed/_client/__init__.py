"""The RPCs of the store as Python functions."""
