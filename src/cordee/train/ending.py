"""What is said at the end of a run: where its checkpoint is, and the commands that take it further.

Owns these lines, of which every command works as it stands. Knows no torch."""

import shlex
from collections.abc import Iterator

from cordee.checkpoint import directory
from cordee.checkpoint.storage import location_of, reached
from cordee.log import counted
from cordee.train.run_plan import RunPlan

TOKENS = 64  # that are generated, and half the context at most: a prompt needs the rest
COLUMNS = 80  # of a terminal
DOCUMENTS = 100  # that are evaluated: an answer within minutes, of data of any size


def describe_end(plan: RunPlan, iteration: int) -> Iterator[str]:
    """The lines for a run that ended after `iteration`; none where that left no checkpoint under --save."""
    if (save := plan.config.save) is None:
        return
    root = location_of(save, "--save")
    with reached("--save", save):
        folder = directory.folder_of(root, iteration)
        if not folder.is_dir():
            return
    given = shlex.quote(save)
    yield f"checkpoint: {folder}"
    if iteration < plan.iterations:
        yield f"{iteration} of {counted(plan.iterations, 'iteration')} are done; to resume, add --load {given}"
    yield "what to do with the model:"
    if plan.tokenizer is not None and plan.spec.config.lm_head:
        room = min(plan.spec.config.context_length // 2, TOKENS)
        yield from _command(f"generate --load {given}", '--prompt "Once upon a time"', f"--max-new-tokens {room}")
    if (data := plan.objective.evaluated(plan.config)) is not None:
        texts = f"--task-data-path {shlex.quote(data)}"
        yield from _command(f"evaluate --load {given}", texts, f"--max-eval-samples {DOCUMENTS}")
    if (plan.spec.config.lm_head or plan.spec.family.classifier) and not plan.spec.config.num_prefix_tokens:
        yield from _command(f"convert --load-dir {given}", f"--save-dir {shlex.quote(f'{root.name}-hf')}")


def _command(first: str, *parts: str) -> Iterator[str]:
    """The lines of a command, at most 80 columns each where its parts are no longer."""
    line = f"  cordee {first}"
    for part in parts:
        if len(f"{line} {part} \\") > COLUMNS:
            yield f"{line} \\"
            line = "     "
        line = f"{line} {part}"
    yield line
