"""Serve a model's responses over HTTP (`xbai serve-policy`)."""

import typer

from xbai.cli import serve_policy

if __name__ == "__main__":
    typer.run(serve_policy)
