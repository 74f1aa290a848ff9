"""How requests get from a worker to its server: bytes, pipes and what they say."""
