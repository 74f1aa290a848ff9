"""What a timer server does between a request and a signal; imports nothing from outside of here."""
