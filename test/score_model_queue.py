"""Serve a model's step-score judgement over HTTP (`xbai serve-score`)."""

import typer

from xbai.cli import serve_score

if __name__ == "__main__":
    typer.run(serve_score)
