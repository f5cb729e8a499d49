"""`resumed top`: live figures of a fleet."""
