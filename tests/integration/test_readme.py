"""Every command of the READMEs runs here as it is written, in a fresh copy, on the files of a miniature quickstart."""

from __future__ import annotations

import json
import re
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import pytest
from PIL import Image

REPOSITORY = Path(__file__).parents[2]
README, README_ZH = REPOSITORY / "README.md", REPOSITORY / "README_zh.md"
DOCS = sorted((REPOSITORY / "docs").glob("*.md"))
QUICKSTART = "bash scripts/quickstart.sh"
OUT = "outputs/quickstart"
STAGES = ("setup", "data", "sft", "rl", "merge", "evaluate_base", "evaluate_rl", "metrics", "report")

MINIATURE = {
    "PROBLEMS": "4",
    "RANKS": "1",
    "SFT_ARGS": "trainer.total_training_steps=4 data.train_batch_size=8 data.micro_batch_size_per_gpu=8",
    "RL_ARGS": "trainer.total_training_steps=2 trainer.val_before_train=false trainer.test_freq=2 "
    "data.train_batch_size=4 actor_rollout_ref.actor.ppo_mini_batch_size=4 actor_rollout_ref.rollout.n=2 "
    "actor_rollout_ref.rollout.val_kwargs.n=1 data.max_response_length=32",
}


def blocks(readme: Path) -> list[list[str]]:
    """The command lines of each fenced bash block."""
    return [
        block.strip().split("\n")
        for block in re.findall(r"```bash\n(.*?)```", readme.read_text(encoding="utf-8"), re.S)
    ]


def commands(readme: Path) -> list[str]:
    """Every command; each can be pasted into one terminal after the others."""
    found = [line for block in blocks(readme) for line in block]
    assert not [line for line in found if line.startswith("cd ")], "a `cd` leaves the reader there"
    return found


@dataclass(frozen=True)
class Outcome:
    """How a command ends here, and what its output and its files are.

    Status 2 is an error of ours, one line; another project's tool ends with 1.
    """

    status: int = 0
    says: str = ""
    wrote: str | None = None
    variables: dict[str, str] = field(default_factory=dict)
    needs_services: bool = False
    is_long: bool = False


SERVICE = Outcome(needs_services=True)
THESE_TESTS = Outcome()
"""What continuous integration runs (see `test_continuous_integration_runs_the_tests`)."""
NO_MODEL = r"config\.json: no such file; give a local"
PUBLISHED = r"models/MetaStone-S1-1\.5B"
NO_HUB = Outcome(1, "Cannot reach .*offline mode is enabled")
OUTCOMES = {
    # The fixture `quickstart` has run it in small; it then finds everything done.
    QUICKSTART: Outcome(says=rf"(?s)(/{len(STAGES)} [^\n]*: finished earlier.*){{{len(STAGES)}}}", variables=MINIATURE),
    "bash scripts/run_tests.sh": THESE_TESTS,
    "bash scripts/setup.sh": Outcome(says="is up to date"),
    # test_language.py runs it, for minutes; without an index it lacks the model.
    "bash scripts/language.sh": Outcome(2, "error: the wheels of scripts/language_requirements.txt cannot be had here"),
    # Also where there is a GPU it rehearses here.
    "bash scripts/check_gpu.sh --quick": Outcome(
        says=r"(?s)REHEARSAL ON THE CPU.* 0 failed.*rehearsed",
        wrote="outputs/check_gpu.json",
        variables={"DEVICE": "cpu"},
        is_long=True,
    ),
    # In dry runs (see conftest.py): continuous integration starts with a real installation by setup.sh.
    "pip install -e verl": Outcome(says="Would install xbai-verl"),
    "pip install -r requirements.txt": Outcome(says="Would install xbai"),
    "python data/prepare.py make10": Outcome(wrote="data/make10_train.parquet"),
    'pip install -e ".[data]"': Outcome(says="Would install xbai"),
    "python data/prepare.py deepscaler aime24": Outcome(2, r"error: cannot download agentica-org/DeepScaleR.*Hub"),
    "python data/prepare.py aime24": Outcome(2, r"error: cannot download HuggingFaceH4/aime_2024: .*Hub"),
    "python data/prepare.py aime25": Outcome(2, r"error: cannot download math-ai/aime25: .*Hub"),
    "hf download agentica-org/DeepScaleR-1.5B-Preview": NO_HUB,
    "hf download MetaStoneTec/MetaStone-S1-1.5B": NO_HUB,
    # Machines with 8 GPUs lack the model.
    "bash ./scripts/run_single_node.sh": Outcome(2, rf"error: .*(needs 8 GPUs.*quickstart.sh|{NO_MODEL})"),
    "bash ./scripts/run_single_node.sh trainer.device=cpu": Outcome(
        # A stage of the quickstart is the same script in small.
        wrote="outputs/two_steps/global_step_2/actor",
        says="finished 2 steps",
        is_long=True,
    ),
    # As the runs would, they end for lack of the models, after the report.
    "bash ./scripts/run_single_node.sh --dry-run": Outcome(
        2, rf"(?s)n_gpus_per_node: 8.*It fits GPUs with: 24 GB.*error: actor_rollout_ref.model.path: .*{NO_MODEL}"
    ),
    "bash ./scripts/run_multi_node.sh --dry-run": Outcome(
        2, rf"(?s)nnodes: 16.*It fits GPUs with: 80 GB.*error: actor_rollout_ref.model.path: .*{NO_MODEL}"
    ),
    "bash ./verl/examples/ray/run_worker_n.sh host1 host2": Outcome(2, "error: .*host1 host2.*"),
    "NNODES=4 bash ./scripts/run_multi_node.sh": Outcome(2, rf"error: actor_rollout_ref.model.path: .*{NO_MODEL}"),
    "(cd ./verl/scripts && bash model_merger.sh": Outcome(wrote="outputs/merged/score_module.pt"),
    "python test/score_model_queue.py": SERVICE,
    "python test/policy_model_queue.py": SERVICE,
    "xbai serve": SERVICE,
    "curl": Outcome(says=r'"finish_reason": ?"(stop|length)"', needs_services=True),
    "python examples/ask.py": Outcome(says=r"\d+ tokens for it", needs_services=True),
    "python test/inference.py": Outcome(wrote="outputs/make10.jsonl", needs_services=True),
    "python test/inference.py --task make10 --input_file outputs/quickstart/data/make10_test.jsonl "
    "--output_file outputs/beam.jsonl": Outcome(wrote="outputs/beam.jsonl", needs_services=True),
    "python test/inference.py --task make10 --input_file outputs/quickstart/data/make10_test.jsonl "
    "--output_file outputs/pruned.jsonl": Outcome(wrote="outputs/pruned.jsonl", needs_services=True),
    "xbai replay": Outcome(wrote="outputs/budget.png", says="To reach Best-of-8"),
    "xbai metric": Outcome(wrote="outputs/metrics.png", says="Best-of-N"),
    "python test/compute_metric.py": Outcome(says="Best-of-N", needs_services=True),
    # Without the Hub there is no published model.
    "python test/policy_model_queue.py --model_path models/MetaStone-S1-1.5B": Outcome(
        2, rf"error: {PUBLISHED}.*{NO_MODEL}"
    ),
    "python test/inference.py --task aime24": Outcome(2, rf"error: {PUBLISHED}: no tokenizer"),
    "python test/compute_metric.py --task aime24": Outcome(2, r"error: .*outputs/aime24\.jsonl"),
}


def expected(command: str) -> Outcome:
    """The entry with the longest beginning of `command`."""
    known = [beginning for beginning in OUTCOMES if f"{command} ".startswith(f"{beginning} ")]
    assert known, f"the README has a new command, say in OUTCOMES how it ends here: {command}"
    return OUTCOMES[max(known, key=len)]


# What the text promises


def test_both_languages_hold_the_same_commands():
    assert blocks(README) == blocks(README_ZH)
    used = {id(expected(command)) for page in (README, *DOCS) for command in commands(page)}
    assert used == {id(outcome) for outcome in OUTCOMES.values()}, "OUTCOMES has commands that stand nowhere"


def test_continuous_integration_runs_the_tests():
    (command,) = [command for command in commands(README) if expected(command) is THESE_TESTS]
    assert (REPOSITORY / ".ci/run").read_text(encoding="utf-8").splitlines()[-1] == command


def test_both_languages_hold_the_same_sections_and_figures():
    def outline(readme: Path) -> list[str]:
        return re.findall(r"^#+ ", readme.read_text(encoding="utf-8"), re.M)

    def images(readme: Path) -> list[str]:
        return re.findall(r"!\[.*?\]\((.*?)\)", readme.read_text(encoding="utf-8"))

    assert outline(README) == outline(README_ZH)
    assert images(README) == images(README_ZH)


def first_table(script: str) -> list[str]:
    """The rows below the header of the first table that a script of `bench/` prints, each without its title."""
    command = [sys.executable, REPOSITORY / "bench" / script]
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    table = re.search(r"^\|.*(?:\n\|.*)*", printed, re.M)[0]
    return [row.split("|", 2)[2].strip() for row in table.splitlines()[2:]]


@pytest.mark.parametrize(("script", "rows"), [("quickstart_table.py", 2), ("language_table.py", 8)])
def test_both_languages_hold_the_numbers_of_the_committed_results(script: str, rows: int):
    numbers = first_table(script)
    assert len(numbers) == rows
    for readme in (README, README_ZH):
        for row in numbers:
            assert row in readme.read_text(encoding="utf-8"), f"{readme.name} lacks the row | {row}"


def estimates(readme: Path) -> list[tuple[str, str, str, str]]:
    """GPUs, the smallest that fits, recipe, and what is added to it: the rows of the table of estimates."""
    row = r"^\| [\d.]+B \| (\d+) \| (\d+ GB) \| (single|multi)(?:[:：] ?`(.*)`)? \|$"
    return re.findall(row, readme.read_text(encoding="utf-8"), re.M)


def test_both_languages_hold_the_same_estimates():
    assert estimates(README) == estimates(README_ZH)
    assert len(estimates(README)) == 8


@pytest.mark.long
@pytest.mark.parametrize(("gpus", "smallest", "recipe", "added"), estimates(README))
def test_estimates_are_those_of_the_dry_run(checkout, gpus: str, smallest: str, recipe: str, added: str):
    status, output = checkout.run(f"bash scripts/run_{recipe}_node.sh --dry-run {added}")
    assert status == 2 and re.search(NO_MODEL, output.splitlines()[-1]), output
    nodes, processes = map(int, re.search(r"^Dry run: (\d+) x (\d+) GPUs", output).groups())
    assert nodes * processes == int(gpus)
    assert re.search(r"It fits GPUs with: (\d+ GB)", output)[1] == smallest


# What the commands do


@dataclass(frozen=True)
class Miniature:
    """The quickstart in small, interrupted once: the outputs of its two runs, and its folder."""

    outputs: list[str]
    folder: Path


@pytest.fixture(scope="module")
def quickstart(checkout) -> Miniature:
    out = checkout.root / OUT
    process = checkout.start(QUICKSTART, **MINIATURE)
    service_log = out / "logs/policy_base.log"
    checkout.wait_until(lambda: service_log.exists() or process.poll() is not None, 900, "the services start")
    process.terminate()  # the script alone: it has to end its services
    assert process.wait(240) != 0
    # vLLM looks at model classes in a child of its own, which no signal reaches while it imports.
    checkout.wait_until(lambda: not checkout.processes(), 240, "the processes of an interrupted quickstart end")
    interrupted = checkout.logs[-1].read_text(encoding="utf-8")
    assert finished_stages(out) == {"setup", "data", "sft", "rl", "merge"}

    status, output = checkout.run(QUICKSTART, **MINIATURE)
    assert status == 0, output[-5000:]
    return Miniature([interrupted, output], out)


def finished_stages(out: Path) -> set[str]:
    return {path.name for path in (out / "stages").iterdir()} - {".", ".."}


@pytest.fixture(scope="module")
def services(checkout, quickstart) -> Iterator[None]:
    """The README's services, on its ports."""
    lines = [command for command in commands(README) if expected(command) is SERVICE]
    ports = [int(re.search(r"--port (\d+)", line)[1]) for line in lines]
    for port in ports:
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                pytest.skip(f"port {port} of the README is in use on this machine")
    started = [checkout.start(f"exec {line}") for line in lines]
    logs = checkout.logs[-len(lines) :]
    try:
        for process, port, log in zip(started, ports, logs, strict=True):

            def answers(process=process, port=port, log=log) -> bool:
                assert process.poll() is None, log.read_text(encoding="utf-8")[-3000:]
                try:
                    return httpx.get(f"http://127.0.0.1:{port}/ready").is_success
                except httpx.TransportError:
                    return False

            checkout.wait_until(answers, 240, f"the service on port {port} is ready")
        yield
    finally:
        for process in started:
            process.terminate()
        for process in started:
            process.wait(240)


@pytest.mark.slow
class TestCommands:
    def test_an_interrupted_quickstart_goes_on_from_the_last_finished_stage(self, quickstart: Miniature):
        again = [output.count("finished earlier") for output in quickstart.outputs]
        assert again == [0, 5]
        assert finished_stages(quickstart.folder) == set(STAGES)

    def test_the_quickstart_says_how_far_it_is_and_where_its_output_lies(self, quickstart: Miniature):
        whole = quickstart.outputs[-1]
        for number in range(1, len(STAGES) + 1):
            assert f"{number}/{len(STAGES)} " in whole
        assert f"Table: {OUT}/summary.json; figures: {OUT}/training.png, {OUT}/accuracy.png" in whole

    def test_stages_made_with_other_settings_are_not_taken_for_finished(self, checkout, quickstart: Miniature):
        status, output = checkout.run(QUICKSTART, **MINIATURE | {"PROBLEMS": "5"})
        assert (status, output.count("\n")) == (2, 1)
        assert output.startswith(f"error: {OUT} was begun with SEED=0 PROBLEMS=4 ")

    def test_summary_is_complete(self, quickstart: Miniature):
        summary = json.loads((quickstart.folder / "summary.json").read_text(encoding="utf-8"))
        assert (summary["problems"], summary["samples"]) == (4, 32)
        assert summary["seconds_total"] == sum(
            int((quickstart.folder / "stages" / stage).read_text(encoding="utf-8"))
            for stage in STAGES
            if stage != "report"
        )
        assert 0 < summary["temperature"] <= 1
        assert set(summary["pass_at_1"]) == {"base", "rl"}
        for model in (summary, summary["base_model"]):
            assert {"auc", "within_prompt_auc"} <= set(model)
            for strategy in ("best_of_n", "majority", "oracle", "random"):
                assert set(model[strategy]) == {"2", "8", "32"}
                assert all(0 <= accuracy <= 1 for accuracy in model[strategy].values())

    @pytest.mark.parametrize("name", ["training.png", "accuracy.png"])
    def test_figures_are_images(self, quickstart: Miniature, name: str):
        with Image.open(quickstart.folder / name) as image:
            assert min(image.size) > 300
            assert len(image.convert("L").getcolors()) > 10

    @pytest.mark.parametrize(
        "command",
        [
            pytest.param(each, marks=pytest.mark.long) if expected(each).is_long else each
            for page in (README, *DOCS)
            for each in commands(page)
        ],
        ids=lambda command: command[:60],
    )
    def test_command_runs_as_written(self, command: str, checkout, quickstart: Miniature, request):
        outcome = expected(command)
        if outcome.needs_services:
            request.getfixturevalue("services")
        if outcome is SERVICE or outcome is THESE_TESTS:
            return
        if command.startswith("curl ") and shutil.which("curl") is None:
            pytest.skip("curl is not installed")
        before = set(checkout.processes())
        status, output = checkout.run(command, **outcome.variables)
        assert status == outcome.status, output[-5000:]
        assert re.search(outcome.says, output), output
        if status == 2:
            # One line, or one for each mistake of a configuration.
            lines = output.splitlines()
            wrong = [line for line in lines if line.startswith("error: ")]
            assert wrong and wrong == lines[-len(wrong) :]
            assert "Traceback" not in output
        if outcome.wrote:
            assert (checkout.root / outcome.wrote).exists()
        checkout.wait_until(lambda: set(checkout.processes()) <= before, 120, "nothing is left running")

    def test_no_cluster_is_one_line(self, checkout, quickstart: Miniature):
        # While it is bound, nothing that a test beside this one starts can listen there.
        with socket.socket() as reserved:
            reserved.bind(("", 0))
            address = f"127.0.0.1:{reserved.getsockname()[1]}"
            status, output = checkout.run(
                "bash ./scripts/run_multi_node.sh data.max_prompt_length=32 data.max_response_length=64"
                " actor_rollout_ref.actor.ulysses_sequence_parallel_size=1"
                " actor_rollout_ref.rollout.tensor_model_parallel_size=1",
                RAY_ADDRESS=address,
                MODEL=f"{quickstart.folder}/base",
                TRAIN_FILES=f"{quickstart.folder}/data/make10_train.parquet",
                VAL_FILES=f"{quickstart.folder}/data/make10_val.parquet",
            )
        assert status == 2, output
        assert output.splitlines()[-1].startswith(f"error: RAY_ADDRESS={address}: no Ray cluster answers")
        assert "Traceback" not in output
