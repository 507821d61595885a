"""Serve a model's step-score judgement over HTTP (`xbai serve-score`)."""

from xbai.cli import run_command, serve_score

if __name__ == "__main__":
    run_command(serve_score)
