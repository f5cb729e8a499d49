"""Settings: their types, their sources, and files that are read again when they change."""
