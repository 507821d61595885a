"""Generate and score responses to a benchmark (`xbai infer`)."""

from xbai.cli import infer, run_command

if __name__ == "__main__":
    run_command(infer)
