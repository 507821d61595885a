"""The inference driver: questions in, several scored responses to each out, nothing lost."""
