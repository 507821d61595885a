"""Best-of-N in one process: sample N responses, keep the one that the model's own head scores highest.

    python examples/best_of_n.py models/MetaStone-S1-1.5B "How many primes are there below 100?" --n 8 --max_tokens 8192

MODEL is a folder with `score_module.pt`: a published model, or `outputs/quickstart/model` of a finished quickstart,
which knows one kind of question: "Make 10 from 7 8 1 1 5". The scores come with the tokens where vLLM is installed
and has the model with the head inside, else by a second pass. For many questions, or several processes, start the
services instead (README, Evaluation).
"""

from __future__ import annotations

import argparse

from rich.console import Console

from xbai.engine import SamplingParams, load_engine
from xbai.errors import exit_on_user_error
from xbai.prompts import prompt_text
from xbai.search.choice import best_candidate
from xbai.sprm import aggregate


@exit_on_user_error
def main() -> None:
    """Print the score of every response, and the best one."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a model folder with a score head")
    parser.add_argument("question")
    parser.add_argument("--n", type=int, default=8, help="responses among which the score chooses")
    parser.add_argument("--max_tokens", type=int, default=1024, help="of each")
    parser.add_argument("--temperature", type=float, default=0.6)
    parser.add_argument("--seed", type=int, help="gives the same responses again")
    parser.add_argument("--engine", default="auto", help="vllm, hf, or auto: vllm where it is installed")
    options = parser.parse_args()

    engine = load_engine(options.engine, options.model, with_scores=True)
    prompt = prompt_text(engine.tokenizer, [{"role": "user", "content": options.question}])
    prompt_ids = engine.tokenizer.encode(prompt, add_special_tokens=False)
    sampling = SamplingParams(
        n=options.n,
        max_tokens=options.max_tokens,
        temperature=options.temperature,
        top_p=0.95,
        seed=options.seed,
    )
    (responses,) = engine.generate([prompt_ids], sampling, return_scores=True)
    engine.close()

    scores = [aggregate(response.step_scores) for response in responses]
    best = best_candidate(scores)
    console = Console(highlight=False)
    for number, (response, score) in enumerate(zip(responses, scores, strict=True)):
        mark = "best" if number == best else ""
        console.print(f"{number}  {score:.3f}  {len(response.token_ids)} tokens, {response.finish_reason}  {mark}")
    console.print(responses[best].text, markup=False)


if __name__ == "__main__":
    main()
