"""Ask a running `xbai serve` with OpenAI's client: the answer as it comes, and what it took.

    python examples/ask.py models/MetaStone-S1-1.5B "How many primes are there below 100?" --effort high

MODEL is the folder, or the name, that `xbai serve --model_path MODEL --port 8080` serves. Needs `pip install openai`,
which vLLM brings along.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from openai import OpenAI
from rich.console import Console


def main() -> None:
    """Print thinking and answer, and the tokens of all candidates."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a model folder, or the name that it is served by")
    parser.add_argument("question")
    parser.add_argument("--effort", default="medium", help="none, minimal, low, medium or high")
    parser.add_argument("--url", default="http://127.0.0.1:8080/v1")
    parser.add_argument("--api_key", default="none")
    options = parser.parse_args()

    console = Console(highlight=False)
    chunks = OpenAI(base_url=options.url, api_key=options.api_key).chat.completions.create(
        model=Path(options.model).name,
        messages=[{"role": "user", "content": options.question}],
        reasoning_effort=options.effort,
        stream=True,
        stream_options={"include_usage": True},
    )
    for chunk in chunks:
        for choice in chunk.choices:
            if thinking := getattr(choice.delta, "reasoning", None):
                console.print(thinking, style="dim", markup=False, end="")
            if choice.delta.content:
                console.print(choice.delta.content, style="bold", markup=False, end="")
        if chunk.usage is not None:
            console.print(f"\n{chunk.usage.completion_tokens} tokens for it")


if __name__ == "__main__":
    main()
