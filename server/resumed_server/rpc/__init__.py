"""gRPC: the servers, the services, and the statuses they answer with."""
