"""The reference engine, on transformers."""
