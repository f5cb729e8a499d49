"""Watch: the fan-out of the change log to subscriptions."""
