"""The `cordee` command: from arguments to a job and its exit code.

Owns the table of commands, their help, and how a run ends: problems as text with exit code 2 (75 where other ranks are
lost), Ctrl-C with 130. Imports a job's module only when the job runs, so that help and errors answer at once."""

import os
import signal
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import cordee
from cordee import launch, log, supervisor
from cordee.config import render
from cordee.config.argv import Teaching
from cordee.config.load import Loaded, load_as_far_as_possible
from cordee.config.spelling import nearest
from cordee.errors import OUTSIDE, Problem, ProblemError, problem_of, raise_all

INFERENCE_GRACE = 10.0  # seconds: processes that write or score have nothing to save


@dataclass(frozen=True, kw_only=True)
class Command:
    """One command: `options` names its schema, `job` a module that has `run(config) -> exit code`, which checks first,
    and `check_run`, the check alone, unless `check` names another.

    `start` replaces running the job where there is more to do."""

    about: str
    example: str
    options: str
    job: str = ""
    check: str = ""
    start: "Callable[[Command, Loaded[Any], Sequence[str]], int] | None" = None

    @property
    def schema(self) -> type:
        return _load(self.options)


def main(argv: Sequence[str] | None = None) -> int:
    """Run `cordee argv...` and return its exit code."""
    supervisor.follow_launcher()
    try:
        code = _dispatch(list(sys.argv[1:] if argv is None else argv))
        sys.stdout.flush()
        return code
    except BrokenPipeError:  # the reader of the output, such as `head`, has closed it: drop the rest
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE
    except ProblemError as error:
        return _report(error)
    except OUTSIDE as error:
        return _report(ProblemError([problem_of(error)]))
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130


def _report(error: ProblemError) -> int:
    """Show problems, unless another rank does, and return the exit code that they mean."""
    if not (error.everywhere and launch.rank_0_speaks()):
        print(f"{log.counted(len(error.problems), 'problem')}:\n{error}", file=sys.stderr)
    return error.exit_code


def _dispatch(argv: list[str]) -> int:
    words = 2 if " ".join(argv[:2]) in COMMANDS else 1
    name, rest = " ".join(argv[:words]) or "--help", argv[words:]
    if name in ("-h", "--help", "help"):
        print(_overview())
        return 0
    if name == "--version":
        print(f"cordee {cordee.__version__}")
        return 0
    if name == "models":
        return _models(rest)
    if name not in COMMANDS:
        names = nearest(name, [*COMMANDS, "models"])
        fix = f"did you mean {' or '.join(names)}?" if names else "`cordee --help` lists the commands"
        raise ProblemError.of("cordee", name, "no such command", fix, "unknown")
    command = COMMANDS[name]
    try:
        teaching = Teaching(f"cordee {name}", command.about, command.example)
        loaded = load_as_far_as_possible(command.schema, rest, teaching=teaching)
    except SystemExit as shown:  # by --help
        return int(shown.code or 0)
    if loaded.notes and launch.rank_info().rank == 0 and launch.rank_info().launcher != launch.CORDEE:
        print(*(f"note: {note}" for note in loaded.notes), sep="\n", file=sys.stderr, flush=True)
    if loaded.problems:
        raise ProblemError([*loaded.problems, *further(command, loaded)])
    if loaded.print_config:
        print(render.to_yaml(loaded), end="")
        return 0
    if command.start is not None:
        return command.start(command, loaded, argv)
    log.setup()
    return _do(command, loaded)


def problems(command: Command, loaded: Loaded[Any]) -> list[Problem]:
    """All problems of the job as a whole."""
    return _load(command.check or f"{command.job}:check_run")(loaded.config)


def further(command: Command, loaded: Loaded[Any]) -> list[Problem]:
    """Problems besides those of single options, without those that may follow from them."""
    if getattr(loaded.config, "world_size", None):
        loaded = _with_processes(loaded)
    config = loaded.config
    if command.start in (_train, _check) and not config.nproc_per_node and not launch.rank_info().launcher:
        fewest = _load("cordee.parallel.degrees:fewest_processes")(config)  # without torch, which counts devices
        loaded = loaded.derive(nproc_per_node=fewest)
    doubtful = frozenset[str]().union(*(problem.names for problem in loaded.problems))
    found = [problem for problem in problems(command, loaded) if not problem.names & doubtful]
    return render.with_origins(found, loaded)


def _do(command: Command, loaded: Loaded[Any]) -> int:
    try:
        return _load(f"{command.job}:run")(loaded.config)
    except ProblemError as error:
        error.problems = render.with_origins(error.problems, loaded)
        raise


def _train(command: Command, loaded: Loaded[Any], argv: Sequence[str]) -> int:
    """Check, then join the rendezvous of a launcher, or start one process per local device."""
    here = launch.rank_info()
    if here.launcher != launch.CORDEE:  # else the parent process has checked
        loaded = _with_processes(loaded)
        _raise_all(problems(command, loaded), loaded)
    processes = loaded.config.nproc_per_node
    if here.launcher or processes == 1:
        return _load(f"{command.job}:run")(loaded.config)
    return supervisor.spawn_local(argv, processes, grace_seconds=loaded.config.exit_grace_seconds)


def _infer(command: Command, loaded: Loaded[Any], argv: Sequence[str]) -> int:
    """Check and start a process for every shard of the model, or run as one of a launcher's, each of which checks."""
    config = loaded.config
    processes = getattr(config, "nproc_per_node", None) or _load("cordee.parallel.degrees:model_processes")(config)
    if processes == 1 or launch.rank_info().launcher:
        return _do(command, loaded)
    _raise_all(problems(command, loaded), loaded)
    return supervisor.spawn_local(argv, processes, grace_seconds=INFERENCE_GRACE)


def _check(command: Command, loaded: Loaded[Any], argv: Sequence[str]) -> int:
    """Show what `train` would do, as far as it is known; then the problems that it would have, at its start too."""
    loaded = _with_processes(loaded)
    described, found = _load("cordee.train.check:examine")(loaded.config)
    print(f"{described}\n\n# options that are not at their default\n{render.changes(loaded)}", flush=True)
    _raise_all(found, loaded)
    print("\nok")
    return 0


def _with_processes(loaded: Loaded[Any]) -> Loaded[Any]:
    """One process per local device, if neither a launcher nor the user sets the number."""
    if (planned := getattr(loaded.config, "world_size", None)) is not None:
        return loaded.derive(nproc_per_node=planned)
    if launch.rank_info().launcher or loaded.config.nproc_per_node:
        return loaded
    return loaded.derive(nproc_per_node=_load("cordee.device:count")())


def _models(argv: Sequence[str]) -> int:
    """`cordee models` and `cordee models show NAME`."""
    if not argv:
        rows = _load("cordee.families.catalogue:describe")()
        print(f"{'preset':<20} {'family':<10} {'parameters':>10} {'context':>8}  licence of the weights")
        for row in rows:
            size = log.shortened(row.parameters)
            print(f"{row.preset:<20} {row.family:<10} {size:>10} {row.context:>8}  {row.licence}")
    elif len(argv) == 2 and argv[0] == "show":
        for label, value in _load("cordee.families.catalogue:show")(argv[1]):
            print(f"{label:<34} {value}")
    elif argv[0] in ("-h", "--help"):
        print("usage: cordee models              list the presets\n       cordee models show NAME    show one of them")
    else:
        raise ProblemError.of("cordee models", " ".join(argv), "no such form", "`cordee models show NAME`")
    return 0


def _raise_all(problems: Sequence[Problem], loaded: Loaded[Any]) -> None:
    raise_all(render.with_origins(problems, loaded))


def _load(name: str) -> Any:
    """The function or class that `module:name` names."""
    module, _, member = name.partition(":")
    return getattr(import_module(module), member)


COMMANDS = {
    "quickstart": Command(
        about="Every step on this machine: tokenizer, preprocess, pretrain, export, generate, evaluate, report.",
        example="cordee quickstart --input my-texts/",
        options="cordee.quickstart.options:QuickstartConfig",
        job="cordee.quickstart.job",
    ),
    "check": Command(
        about="Show what `cordee train` would do with the same options, and all problems; starts nothing.",
        example="cordee check --config run.yaml --world-size 64",
        options="cordee.train.options:CheckConfig",
        check="cordee.train.check:check_with_contents",
        start=_check,
    ),
    "plan": Command(
        about="Simulate pipeline schedules: bubble, peak activation memory, timeline; needs no devices.",
        example="cordee plan --schedule 1f1b interleaved zbv --num-micro-batches 16 --output schedules.svg",
        options="cordee.plan.options:PlanConfig",
        job="cordee.plan.job",
    ),
    "preprocess": Command(
        about="Tokenize text or dialogues into the .bin/.idx files that training reads.",
        example="cordee preprocess --input texts.jsonl --output-prefix data/texts --append-eod \\\n"
        "    --tokenizer-type PretrainedFromHF --tokenizer-name-or-path models/llama2",
        options="cordee.data.options:PreprocessConfig",
        job="cordee.data.preprocess",
    ),
    "data show": Command(
        about="Show what is in a .bin/.idx pair: counts, lengths, the first sequences as text.",
        example="cordee data show data/texts_text_document --num 5 --tokenizer-name-or-path models/llama2",
        options="cordee.data.options:ShowDataConfig",
        job="cordee.data.show",
    ),
    "inspect": Command(
        about="Show samples for tuning as training sees them, trained tokens highlighted, and what is wrong with them.",
        example="cordee inspect dialogues.jsonl --prompt-type qwen --tokenizer-name-or-path models/qwen2",
        options="cordee.data.options:InspectConfig",
        job="cordee.data.inspect",
    ),
    "convert": Command(
        about="Convert weights from any format and layout to another, merge LoRA adapters.",
        example="cordee convert --load-dir checkpoints --save-dir models/mine --save-model-type hf",
        options="cordee.convert.options:ConvertConfig",
        job="cordee.convert.job",
    ),
    "train": Command(
        about="Train a model on all local devices, or as a rank of torchrun, Slurm or MPI.",
        example="cordee train --config run.yaml --nproc-per-node 2 --lr 3e-4",
        options="cordee.train.options:TrainConfig",
        job="cordee.train.job",
        check="cordee.train.plan:check_run",
        start=_train,
    ),
    "generate": Command(
        about="Generate text from prompts.",
        example='cordee generate --load models/mine --prompt "Once upon a time" --max-new-tokens 64',
        options="cordee.generate.options:GenerateConfig",
        job="cordee.generate.job",
        start=_infer,
    ),
    "evaluate": Command(
        about="Evaluate a model on benchmark tasks.",
        example="cordee evaluate --load models/mine --task perplexity --task-data-path held-out.txt",
        options="cordee.evaluate.options:EvaluateConfig",
        job="cordee.evaluate.job",
        start=_infer,
    ),
    "bench": Command(
        about="Measure speed and memory against peers, interleaved in one run.",
        example="cordee bench train --threads 2",
        options="cordee.bench.options:BenchConfig",
        job="cordee.bench.job",
    ),
}


def _overview() -> str:
    commands = {name: command.about for name, command in COMMANDS.items()} | {"models": "List the presets for --model."}
    return "\n".join(
        [
            "usage: cordee COMMAND [--config run.yaml] [options]",
            "",
            "Trains large language models end to end.",
            "",
            "commands:",
            *(f"  {name:<12} {about}" for name, about in commands.items()),
            "",
            "Every option is a flag, --seq-length 256, and a line of a YAML file, seq_length: 256.",
            "`cordee COMMAND --help` explains them; `cordee --version` prints the version.",
        ]
    )
