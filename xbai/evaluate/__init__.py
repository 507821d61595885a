"""From a benchmark and running services to results, metrics and figures."""
