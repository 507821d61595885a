"""What is on disk of a run: written whole, checked when read, copied elsewhere."""
