"""The policy and the score service, as FastAPI applications over one model thread each."""
