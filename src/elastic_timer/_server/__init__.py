"""What a timer server does between a request and a signal; nothing here knows of bytes or pipes."""
