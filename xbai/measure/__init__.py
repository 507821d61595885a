"""From results to numbers, tables and figures."""
