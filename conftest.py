"""Makes `import verl` mean the package in every test, whichever is collected first."""

# The folder `verl/` holds both the package and its tests, and pytest's importlib mode would take the folder itself for
# a namespace package `verl` as it imports `verl/tests/...`, unless the real one is loaded already.
import verl  # noqa: F401
