"""The engine on Redis or Valkey: one server, a cluster, or Sentinels."""
