"""Grade results and print pass@1 of Best-of-N (`xbai metric`)."""

from xbai.cli import metric, run_command

if __name__ == "__main__":
    run_command(metric)
