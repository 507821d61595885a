"""Peak memory of log-probs and entropies, forward and backward: by chunks of tokens beside whole logits.

    python bench/log_prob_memory.py [--tokens 8192] [--vocabulary 151936] [--hidden 1536] [--no-entropy] [...]

Each way runs in a process of its own. On CPU the memory is the peak of the process's resident set above what it held
with model and inputs in place; on a GPU that of the allocated tensors. The gradients that both ways must make, of
hidden states and LM head, count for both. What they compute is compared. The last line is one JSON object.
"""

from __future__ import annotations

import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from machine import ROOT, describe_machine, report
from torch import Tensor, nn

from verl.models.log_probs import LOGITS_PER_CHUNK, LMHead, token_log_probs
from xbai.errors import UserError, exit_on_user_error

GIB = 2**30
WAYS = ("chunked", "plain")
# Float32 tensors of the size of the logits that the plain way holds at its peak, with and without entropies.
PLAIN_LOGITS = {True: 5, False: 3}


def plain_log_probs(
    hidden: Tensor, lm_head: nn.Linear, labels: Tensor, compute_entropy: bool
) -> tuple[Tensor, Tensor | None]:
    """Log-probs of `labels` [n] and, when asked for, entropies [n] from all logits at once."""
    log_probs = lm_head(hidden).float().log_softmax(-1)
    entropy = -(log_probs.exp() * log_probs).sum(-1) if compute_entropy else None
    return log_probs.gather(-1, labels[:, None]).squeeze(-1), entropy


@dataclass(frozen=True)
class Case:
    """What is measured."""

    tokens: int
    vocabulary: int
    hidden: int
    dtype: str
    entropy: bool
    logits_per_chunk: int
    repeats: int

    def log_probs(self, way: str, hidden: Tensor, lm_head: nn.Linear, labels: Tensor) -> tuple[Tensor, Tensor | None]:
        """Log-probs [n] and entropies [n], by the trainer's function or the plain one."""
        if way == "plain":
            return plain_log_probs(hidden, lm_head, labels, self.entropy)
        return token_log_probs(
            hidden,
            LMHead.of(lm_head),
            labels,
            compute_entropy=self.entropy,
            logits_per_chunk=self.logits_per_chunk,
        )[:2]


def measure(way: str, case: Case, file: Path) -> dict[str, Any]:
    """Run one way in this process; what it computed goes to `file`."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(0)
    with torch.device(device):
        hidden = torch.randn(case.tokens, case.hidden).to(getattr(torch, case.dtype)).requires_grad_()
        lm_head = nn.Linear(case.hidden, case.vocabulary, bias=False, dtype=hidden.dtype)
        nn.init.normal_(lm_head.weight, std=case.hidden**-0.5)
        labels = torch.randint(case.vocabulary, (case.tokens,))
        weights = torch.randn(case.tokens)

    def run(rows: int) -> dict[str, Tensor]:
        hidden.grad = lm_head.weight.grad = None
        log_probs, entropy = case.log_probs(way, hidden[:rows], lm_head, labels[:rows])
        loss = (log_probs * weights[:rows]).sum()
        values = {"log_probs": log_probs.detach()}
        if entropy is not None:
            loss = loss + 0.01 * entropy.sum()
            values["entropy"] = entropy.detach()
        loss.backward()
        return values

    run(min(case.tokens, 16))
    hidden.grad = lm_head.weight.grad = None
    before = _held(device)
    seconds = []
    for _ in range(case.repeats):
        started = _now(device)
        values = run(case.tokens)
        seconds.append(_now(device) - started)
    peak = _peak(device) - before
    # A sample of rows of the LM head's gradient: all of them would be a gigabyte.
    gradients = {"hidden_grad": hidden.grad, "weight_grad": lm_head.weight.grad[::199].clone()}
    torch.save(values | gradients, file)
    return {"peak_gib": round(peak / GIB, 3), "seconds": round(statistics.median(seconds), 3)}


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def _held(device: torch.device) -> int:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()
    pages = int(Path("/proc/self/statm").read_text(encoding="utf-8").split()[1])
    return pages * resource.getpagesize()


def _peak(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _in_own_process(way: str, case: Case, file: Path) -> dict[str, Any]:
    values = asdict(case)
    command = [sys.executable, __file__, "--way", way, "--file", str(file)]
    command.append("--entropy" if values.pop("entropy") else "--no-entropy")
    command += [text for name, value in values.items() for text in (f"--{name.replace('_', '-')}", str(value))]
    # What is freed leaves the resident set at once, whatever its size.
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": str(2**20)}
    process = subprocess.run(command, stdout=subprocess.PIPE, text=True, env=environment)
    if process.returncode:
        raise UserError(f"the {way} way ended with status {process.returncode} (-9: out of memory; use fewer --tokens)")
    return json.loads(process.stdout.splitlines()[-1])


def _differences(files: dict[str, Path]) -> dict[str, float]:
    """The largest difference of each result, relative to the largest value of the plain one."""
    chunked, plain = (torch.load(files[way], map_location="cpu") for way in WAYS)
    return {
        name: float((chunked[name].double() - plain[name].double()).abs().max() / plain[name].double().abs().max())
        for name in plain
    }


def _refuse_what_cannot_fit(case: Case) -> None:
    if torch.cuda.is_available():
        free, where = torch.cuda.mem_get_info()[0], "the GPU"
    else:
        lines = Path("/proc/meminfo").read_text(encoding="utf-8").splitlines()
        free = next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable")) * 1024
        where = "this machine"
    needed = PLAIN_LOGITS[case.entropy] * case.tokens * case.vocabulary * 4
    if needed > free:
        raise UserError(
            f"--tokens {case.tokens}: the plain way needs about {needed / GIB:.0f} GiB and {where} has "
            f"{free / GIB:.0f} free; use fewer, --no-entropy or --only chunked"
        )


@exit_on_user_error
def main(
    tokens: Annotated[int, typer.Option(min=1)] = 8192,
    vocabulary: Annotated[int, typer.Option(min=2)] = 151936,
    hidden: Annotated[int, typer.Option(min=1, help="width of the hidden states")] = 1536,
    dtype: Annotated[str, typer.Option(help="of hidden states and LM head: float32 or bfloat16")] = "float32",
    entropy: Annotated[bool, typer.Option(help="also entropies, with their gradient")] = True,
    logits_per_chunk: Annotated[int, typer.Option(min=1, help="of the chunked way")] = LOGITS_PER_CHUNK,
    repeats: Annotated[int, typer.Option(min=1, help="the time is their median")] = 3,
    only: Annotated[str | None, typer.Option(help="chunked or plain; both without it")] = None,
    out: Annotated[Path, typer.Option(help="JSON file")] = ROOT / "bench/results/log_prob_memory.json",
    way: Annotated[str | None, typer.Option(hidden=True)] = None,
    file: Annotated[Path | None, typer.Option(hidden=True)] = None,
) -> None:
    """Measure both ways and compare them."""
    if dtype not in ("float32", "bfloat16"):
        raise UserError(f"--dtype {dtype} is unknown, use float32 or bfloat16")
    if only is not None and only not in WAYS:
        raise UserError(f"--only {only} is unknown, use one of {', '.join(WAYS)}")
    case = Case(tokens, vocabulary, hidden, dtype, entropy, logits_per_chunk, repeats)
    if way is not None:
        sys.stdout.write(json.dumps(measure(way, case, file)) + "\n")
        return
    if only != "chunked":
        _refuse_what_cannot_fit(case)
    result: dict[str, Any] = {"benchmark": "log_prob_memory", **asdict(case)}
    with tempfile.TemporaryDirectory() as folder:
        files = {name: Path(folder) / f"{name}.pt" for name in WAYS if only in (None, name)}
        for name, target in files.items():
            result[name] = _in_own_process(name, case, target)
        if only is None:
            result["max_relative_difference"] = _differences(files)
            result["plain_over_chunked_memory"] = round(result["plain"]["peak_gib"] / result["chunked"]["peak_gib"], 2)
    gradients = (tokens + vocabulary) * hidden * getattr(torch, dtype).itemsize
    report(result | {"gradients_gib": round(gradients / GIB, 3), "machine": describe_machine()}, out)


if __name__ == "__main__":
    typer.run(main)
