"""`resumed ticket-keys`: the ticket keys of a fleet, for TLS stacks that take only keys."""
