"""Picking one answer among several candidates, and searching for one step by step.

A search by steps sees only `Expander.extend`, which takes paths (`path.py`, a response on its way) one step further,
all at once and within the limits of the question. A `StepSource` is the one interface to a model. A quarter of a
token budget is kept to write the best response to its end where the rest of it finished none.
"""
