"""The command `elastic-timer`."""
