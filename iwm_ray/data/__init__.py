"""Which samples exist, in which order they are read, and how their bytes become pixels."""
