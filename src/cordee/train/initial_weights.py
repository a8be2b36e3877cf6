"""Where the weights of a run come from: a checkpoint, a model in any format, or neither, and then they are drawn.

Owns what --load means, and finding out before anything starts whether what it names can be read. No torch is needed to
choose; only what is no checkpoint brings it when it is opened."""

from collections.abc import Mapping
from dataclasses import replace

from cordee.checkpoint import assets, directory, formats
from cordee.checkpoint.storage import Location, location_of, reached
from cordee.errors import Findings, ProblemError, raise_all, requires
from cordee.families.registry import spec_from_directory, spec_named
from cordee.tokenizer import Tokenizer, holds_tokenizer, load_tokenizer
from cordee.tokenizer.options import TokenizerOptions
from cordee.train import resume
from cordee.train.options import TrainConfig
from cordee.train.run_plan import Checkpoint, InitialWeights


def opened(config: TrainConfig, initial: InitialWeights, found: Findings) -> InitialWeights | None:
    """`initial` with its weights ready to be read, after names, shapes and sizes of their files are checked.

    Where weights cannot be read, `initial` has what their config.json says, so that other problems are found too; None
    without one."""
    if (path := initial.weights) is None:
        return initial
    from cordee.weights.megatron.source import Reading

    spec = spec_named(config.model) if config.model else None
    step = config.ckpt_step if initial.checkpoint is None else None
    source = found.attempt(lambda: formats.read(path, Reading(spec=spec, iteration=step)))
    if source is None:
        spec = found.attempt(lambda: spec_from_directory(str(path))) if (path / "config.json").is_file() else None
        return spec and replace(initial, spec=spec, assets=path.local)
    initial = replace(initial, source=source, spec=source.spec, assets=initial.assets or source.assets)
    has_adapters = config.lora_target_modules or config.num_prefix_tokens or initial.peft or initial.checkpoint
    return found.attempt(lambda: _with_adapter(config, initial)) if has_adapters else initial


def _with_adapter(config: TrainConfig, initial: InitialWeights) -> InitialWeights:
    """The base of adapters, and those that are loaded. ProblemError if it is the base of others."""
    from cordee.checkpoint import adapter
    from cordee.weights import peft, peft_parameters
    from cordee.weights.adapter import Given, fingerprint

    base = initial.source
    assert base is not None and initial.weights is not None
    initial = replace(initial, base={"path": str(initial.weights.resolve()), "fingerprint": fingerprint(base)})
    if (checkpoint := initial.checkpoint) is not None:
        raise_all(adapter.check_base(base, checkpoint.manifest, checkpoint.path, option_of(config)))
    if initial.peft is None:
        return initial
    loaded = peft_parameters.from_peft(peft.read(Given(path=initial.peft), base.spec), base)
    return replace(initial, source=loaded, spec=loaded.spec)


def tokenizer_of(config: TrainConfig, initial: InitialWeights) -> Tokenizer | None:
    """The tokenizer of the options, else that beside the weights; None if there is neither."""
    names = TokenizerOptions.__dataclass_fields__.keys() - {"vocab_size", "tokenizer_use_fast"}
    given = any(getattr(config, name) for name in names)
    beside = str(initial.assets) if initial.assets and holds_tokenizer(initial.assets) else None
    return load_tokenizer(config, beside) if given or beside else None


def option_of(config: TrainConfig) -> str:
    """The option that names what a run resumes from."""
    return "--load" if not config.lora_load else "--lora-load"


def choose(config: TrainConfig, avoid: Mapping[int, str] | None, notes: list[str]) -> InitialWeights:
    """Those that --load names, with the adapters of --lora-load, but for corrupt checkpoints (`avoid`). ProblemError if
    there are none."""
    if config.load is None:
        return InitialWeights()
    with reached("--load", config.load):
        if (given := config.only_adapter()) is None:
            found = _choose(config, location_of(config.load), avoid, notes)
            if found.checkpoint and found.weights and found.weights.local and not found.weights.local.exists():
                why = f"it holds adapters of a base that is not there any more: {found.weights}"
                fix = f"give the base as --load, and {config.load} as --lora-load"
                raise ProblemError.of("--load", config.load, why, fix, "base", limit=str(found.weights))
            return found
    option, base = option_of(config), location_of(config.load)
    with reached(option, given):
        path = location_of(given, option)
        if path.local is not None and (path / "adapter_config.json").is_file():  # of PEFT
            return InitialWeights(weights=base, peft=path.local)
        found = _choose(config, path, avoid, notes)
    adapters = found.checkpoint and found.weights
    anew = config.lora_target_modules or config.num_prefix_tokens
    if not adapters and (found.weights or found.checkpoint or not anew):
        why, fix = "it holds no adapters", "give a directory of PEFT, or checkpoints of a run that trains adapters"
        raise ProblemError.of(option, given, why, fix, "unknown")
    return replace(found, weights=base)


def _choose(config: TrainConfig, path: Location, avoid: Mapping[int, str] | None, notes: list[str]) -> InitialWeights:
    form = formats.find(path)
    if form is not None and form.local:
        if form.name != "mg":
            raise_all(requires("--ckpt-step", config.ckpt_step, "--load of a run", f"{path} is a {form.title}", "load"))
        return InitialWeights(weights=path)
    if (path / directory.MANIFEST).is_file():
        raise_all(requires("--ckpt-step", config.ckpt_step, "--load of a run", f"{path} is one checkpoint", "load"))
        return _of_checkpoint(config, path)
    if directory.is_root(path):
        return _of_checkpoint(config, directory.folder_of(path, _iteration(config, path, avoid, notes)))
    is_own = config.save is not None and location_of(config.save, "--save").resolve() == path.resolve()
    if path.is_file() or (path.is_dir() and not is_own):
        fix = "give a directory that --save has written, one with config.json and weights, or a GGUF file"
        raise ProblemError.of(option_of(config), str(path), "it holds neither a checkpoint nor a model", fix, "format")
    if config.exit_on_missing_checkpoint or not is_own:
        fix = "check the path; only the directory of --save may be empty, for a command that starts and resumes a run"
        raise ProblemError.of(option_of(config), str(path), "there is no checkpoint", fix, "missing")
    notes.append(f"{option_of(config)} {path}: nothing is there yet; the run starts from initial weights")
    return InitialWeights()


def _iteration(config: TrainConfig, root: Location, avoid: Mapping[int, str] | None, notes: list[str]) -> int:
    """The checkpoint to load: that of --ckpt-step, else the last good one."""
    if config.ckpt_step is not None:
        return config.ckpt_step
    iteration, skipped = directory.latest(root, avoid)
    notes += skipped
    if iteration is None:
        why = f"all its checkpoints are corrupt: {'; '.join(skipped)}"
        fix = "restore one, or start anew with another --save"
        raise ProblemError.of(option_of(config), str(root), why, fix, "corrupt")
    return iteration


def _of_checkpoint(config: TrainConfig, path: Location) -> InitialWeights:
    try:
        if (why := directory.damage(path)) is not None:
            raise ValueError(why)
        manifest = directory.read_manifest(path, resume.form(config))
    except ValueError as error:
        present = directory.iterations(path.parent)
        fix = f"choose another by --ckpt-step; there are: {', '.join(map(str, present)) or 'none'}"
        raise ProblemError.of(option_of(config), str(path), str(error), fix, "corrupt", limit=present) from error
    base = manifest.get("base")
    if base is None and (config.lora_target_modules or config.num_prefix_tokens):  # which are trained on these weights
        return InitialWeights(weights=path)
    weights = None if base is None else location_of(base["path"])
    checkpoint = Checkpoint(path, manifest, resume=not config.finetune)
    return InitialWeights(checkpoint, weights=weights, assets=assets.beside(path))
