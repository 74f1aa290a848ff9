"""The worker's side of a block: its name, what is held for it, its handle, and doing without."""
