"""What an expired worker was doing, found out without its cooperation."""
