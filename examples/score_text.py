r"""Score a text: what the model's own head thinks of each step of a response.

    python examples/score_text.py models/MetaStone-S1-1.5B --text_file response.txt

MODEL is a folder with `score_module.pt`: a published model, or `outputs/quickstart/model` of a finished quickstart.
The text holds prompt and response, the prompt as the model's chat template writes it (without one, all of it is the
response). Only the layers up to the head are loaded, on a GPU where there is one. On standard input, the same:

    printf "First, 2 + 3 is 5.\n\nSo the answer is 6.\n\n" | python examples/score_text.py outputs/quickstart/model
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from rich.console import Console

from xbai.engine import Scorer
from xbai.errors import exit_on_user_error
from xbai.model_folder import load_tokenizer
from xbai.sprm import split_response


@exit_on_user_error
def main() -> None:
    """Print each step with its score, and the response's score."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a model folder with a score head")
    parser.add_argument("--text_file", type=Path, help="prompt and response; standard input by default")
    options = parser.parse_args()

    scorer, tokenizer = Scorer.from_folder(options.model), load_tokenizer(options.model)
    text = sys.stdin.read() if options.text_file is None else options.text_file.read_text(encoding="utf-8")
    # Apart, as they were generated: no token straddles the border.
    prompt, response = split_response(text, scorer.step_rule)
    prompt_ids, response_ids = (tokenizer.encode(part, add_special_tokens=False) for part in (prompt, response))
    (scored,) = scorer.score([prompt_ids + response_ids], [len(prompt_ids)])

    console, begin = Console(highlight=False), len(prompt_ids)
    for position, score in zip(scored.positions, scored.step_scores, strict=True):
        # The token after the position ends the step.
        end = position + 2
        step = " ".join(tokenizer.decode(scored.token_ids[begin:end]).split())
        console.print(f"{score:.3f}  {step}", markup=False)
        begin = end
    console.print(f"{scored.value:.3f}  the response, {len(scored.step_scores)} steps")


if __name__ == "__main__":
    main()
