"""The policy and the score service, as FastAPI applications over one model thread each.

One process serves one model. Its main thread answers HTTP, a second one owns the model and takes the work of all
connections in batches. A model that raises fails every waiting request with 503, makes `/health` fail, and ends the
process with status 1. After SIGTERM new work gets 503 and what was accepted is finished, within the shutdown time-out.
"""
