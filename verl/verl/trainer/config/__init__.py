"""The configuration: its defaults, how it is composed, and its checks."""
