"""Reflective generative models: reasoning and judging its own reasoning with one causal LM (arXiv 2507.01951)."""
