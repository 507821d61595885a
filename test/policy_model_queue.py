"""Serve a model's responses over HTTP (`xbai serve-policy`)."""

from xbai.cli import run_command, serve_policy

if __name__ == "__main__":
    run_command(serve_policy)
