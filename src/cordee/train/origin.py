"""Where the weights of a run come from: a checkpoint, a model in any format, or neither, and then they are drawn.

Owns what --load means, and finding out before anything starts whether what it names can be read. No torch is needed to
choose; only what is no checkpoint brings it when it is opened.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from cordee.checkpoint import assets, directory
from cordee.checkpoint.storage import Place, place_of, reached, same
from cordee.config.schema import TrainConfig
from cordee.convert import formats
from cordee.errors import Problem, ProblemError
from cordee.families.registry import spec_from_directory, spec_named
from cordee.train import resume
from cordee.train.run_plan import Checkpoint, Origin


def opened(config: TrainConfig, origin: Origin) -> Origin:
    """`origin` with its weights ready to be read, after names, shapes and sizes of their files are checked.

    ProblemError with all that is wrong with them.
    """
    if origin.weights is None:
        return origin
    from cordee.weights.megatron.source import Reading

    reading = Reading(spec=spec_named(config.model) if config.model else None)
    source = formats.read(origin.weights, reading)
    return replace(origin, source=source, spec=source.spec, companions=source.companions)


def described(origin: Origin) -> Origin | None:
    """`origin` with what a config.json says of weights that cannot be read, so that other problems are found too."""
    if origin.weights is None or not (origin.weights / "config.json").is_file():
        return None
    return replace(origin, spec=spec_from_directory(origin.weights), companions=origin.weights)


def choose(config: TrainConfig, avoid: Mapping[int, str] | None, notes: list[str]) -> Origin:
    """What --load names, but for checkpoints known to be damaged (`avoid`). ProblemError if that is nothing."""
    if config.load is None:
        return Origin()
    with reached("--load", config.load):
        return _choose(config, place_of(config.load), avoid, notes)


def _choose(config: TrainConfig, path: Place, avoid: Mapping[int, str] | None, notes: list[str]) -> Origin:
    form = formats.find(path) if path.exists() else None
    if form is not None and form.name != "cordee" and isinstance(path, Path):
        return Origin(weights=path)
    if (path / directory.MANIFEST).is_file():
        return _of_checkpoint(_checkpoint(config, path))
    if directory.is_root(path):
        return _of_checkpoint(_checkpoint(config, directory.folder_of(path, _iteration(config, path, avoid, notes))))
    is_own = config.save is not None and same(place_of(config.save, "--save"), path)
    if path.is_file() or (path.is_dir() and any(path.iterdir()) and not is_own):
        fix = "give a directory that --save has written, one with config.json and weights, or a file of GGUF"
        raise ProblemError([Problem("--load", path, "it holds neither a checkpoint nor a model", fix)])
    if config.exit_on_missing_checkpoint or not is_own:
        fix = "check the path; only the directory of --save may be empty, for a command that starts and resumes a run"
        raise ProblemError([Problem("--load", path, "there is no checkpoint", fix)])
    notes.append(f"--load {path}: nothing is there yet; the run starts from initial weights")
    return Origin()


def _of_checkpoint(checkpoint: Checkpoint) -> Origin:
    return Origin(checkpoint, companions=assets.beside(checkpoint.path))


def _iteration(config: TrainConfig, root: Place, avoid: Mapping[int, str] | None, notes: list[str]) -> int:
    """The checkpoint to load: that of --ckpt-step, else the newest whole one."""
    if config.ckpt_step is not None:
        return config.ckpt_step
    iteration, skipped = directory.latest(root, avoid)
    notes += skipped
    if iteration is None:
        why = f"none of its checkpoints is whole: {'; '.join(skipped)}"
        raise ProblemError([Problem("--load", root, why, "restore one, or start anew with another --save")])
    return iteration


def _checkpoint(config: TrainConfig, path: Place) -> Checkpoint:
    try:
        if (why := directory.damage(path)) is not None:
            raise ValueError(why)
        return Checkpoint(path, directory.read_manifest(path, resume.form(config)), resume=not config.finetune)
    except ValueError as error:
        have = ", ".join(str(iteration) for iteration in directory.iterations(path.parent)) or "none"
        fix = f"choose another by --ckpt-step; there are: {have}"
        raise ProblemError([Problem("--load", path, str(error), fix)]) from error
