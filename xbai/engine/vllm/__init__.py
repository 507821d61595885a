"""The fast engine, on vLLM."""
