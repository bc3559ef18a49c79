"""What a sweep is, what it leaves on disk, and what its results say; nothing here starts anything."""
