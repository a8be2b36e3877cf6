"""Several adapters over one base: each prompt is answered by its own, as peft answers it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from cordee.config.load import config_from_dict
from cordee.errors import ProblemError
from cordee.generate import job
from cordee.generate.options import GenerateConfig
from cordee.tokenizer import load_tokenizer
from cordee.tokenizer.options import TokenizerOptions
from tests.problems import facts

PROMPTS = ("Once upon", "She loved")


@pytest.fixture(scope="module")
def given(llama, tmp_path_factory) -> tuple[list[str], dict[str, dict[str, list[int]]]]:
    """--lora-load of two adapters, and what transformers and peft write: tokens by adapter and prompt."""
    transformers, peft = pytest.importorskip("transformers"), pytest.importorskip("peft")
    folder, flags = tmp_path_factory.mktemp("several"), []
    tokenizer = load_tokenizer(TokenizerOptions(), str(llama.directory))

    def written(model: Any) -> dict[str, list[int]]:
        found = {}
        for prompt in PROMPTS:
            ids = tokenizer.encode(prompt)
            options = {"max_new_tokens": 6, "do_sample": False, "suppress_tokens": [*range(300, 320)]}
            out = model.generate(input_ids=torch.tensor([ids]), eos_token_id=1, pad_token_id=319, **options)
            found[prompt] = out[0, len(ids) :].tolist()
        return found

    def base() -> Any:
        return transformers.AutoModelForCausalLM.from_pretrained(llama.directory)

    expected = {"base": written(base())}
    for seed, (name, targets) in enumerate({"a": ["q_proj", "down_proj"], "b": ["v_proj", "up_proj"]}.items()):
        torch.manual_seed(seed)
        config = peft.LoraConfig(r=2 + seed, target_modules=targets, init_lora_weights=False, task_type="CAUSAL_LM")
        model = peft.get_peft_model(base(), config).eval()
        for key, value in model.named_parameters():
            if "lora_" in key:
                value.data.normal_()
        model.save_pretrained(folder / name)
        flags.append(f"{name}={folder / name}")
        expected[name] = written(model)
    assert expected["a"] != expected["b"] != expected["base"] != expected["a"]
    return flags, expected


def generate(folder, output: Path, **options: Any) -> list[dict[str, Any]]:
    job.run(
        config_from_dict(GenerateConfig, {"load": folder.directory, "max_new_tokens": 6, **options, "output": output})
    )
    return [json.loads(line) for line in output.read_text(encoding="utf-8").splitlines()]


@pytest.mark.parametrize(
    ("chosen", "answers"),
    [
        ([], [("a", 0), ("a", 1), ("b", 0), ("b", 1)]),
        (["b"], [("b", 0), ("b", 1)]),
        (["b", "a"], [("b", 0), ("a", 1)]),
        (["base", "a"], [("base", 0), ("a", 1)]),
    ],
)
def test_each_prompt_by_its_adapter(llama, given, tmp_path: Path, capsys, chosen, answers):
    flags, expected = given
    records = generate(llama, tmp_path / "out", prompt=PROMPTS, lora_load=flags, adapter=chosen)
    assert [(record["adapter"], record["prompt"]) for record in records] == [(n, PROMPTS[i]) for n, i in answers]
    for record in records:
        assert record["tokens"] == expected[record["adapter"]][record["prompt"]]
    shown = capsys.readouterr().out
    assert len({name for name, _ in answers}) == 1 or all(f"({name})" in shown for name, _ in answers)


def test_what_is_drawn_depends_on_no_other_adapter(llama, given, tmp_path: Path):
    flags, _ = given
    drawn = {"prompt": PROMPTS[:1] * 2, "lora_load": flags, "do_sample": True, "seed": 1, "num_return_sequences": 2}
    alone = generate(llama, tmp_path / "alone", **drawn, adapter=["a"])
    beside = generate(llama, tmp_path / "beside", **drawn, adapter=["b", "a"])
    assert beside[2:] == alone[2:] and alone[0]["tokens"] != alone[2]["tokens"]


@pytest.mark.slow
def test_over_tensor_parallel_ranks(llama, given, tmp_path: Path):
    flags, expected = given
    command = [sys.executable, "-m", "cordee", "generate", "--load", llama.directory, "--prompt", *PROMPTS]
    more = ["--lora-load", *flags, "--adapter", "b", "a", "--max-new-tokens", "6", "--output", tmp_path / "out"]
    subprocess.run([*command, *more, "--tensor-model-parallel-size", "2"], check=True, capture_output=True, timeout=120)
    records = [json.loads(line) for line in (tmp_path / "out").read_text(encoding="utf-8").splitlines()]
    wanted = [("b", expected["b"][PROMPTS[0]]), ("a", expected["a"][PROMPTS[1]])]
    assert [(record["adapter"], record["tokens"]) for record in records] == wanted


def test_what_does_not_fit(llama, given, tmp_path: Path):
    flags, _ = given
    bare = [flag.partition("=")[2] for flag in flags]
    for options, expected in [
        ({"adapter": ["c"]}, ("--adapter", "c", "unknown")),
        ({"adapter": ["a", "b", "a"]}, ("--adapter", "a b a", "invalid")),
        ({"lora_load": bare}, ("--lora-load", " ".join(bare), "names")),
        ({"lora_load": [f"base={bare[0]}"]}, ("--lora-load", f"base={bare[0]}", "names")),
        ({"lora_load": [flags[0], flags[0]]}, ("--lora-load", f"{flags[0]} {flags[0]}", "names")),
    ]:
        with pytest.raises(ProblemError) as caught:
            generate(llama, tmp_path / "out", **{"prompt": PROMPTS, "lora_load": flags, **options})
        assert facts(caught) == [expected]
    config = config_from_dict(GenerateConfig, {"load": llama.directory, "prompt": PROMPTS, "lora_load": flags})
    with pytest.raises(ProblemError) as caught:
        config.only_adapter()
    assert facts(caught) == [("--lora-load", " ".join(flags), "at most")]
