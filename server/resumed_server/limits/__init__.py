"""Rate limits and quotas: their configuration, the counters that workers share, and the enforcement."""
