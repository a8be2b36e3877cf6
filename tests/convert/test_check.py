"""What `cordee convert` and `cordee preprocess` find wrong, together and before anything is written."""

from __future__ import annotations

from cordee.cli import main
from cordee.convert import job
from cordee.convert.options import ConvertConfig
from cordee.data import preprocess
from cordee.data.options import PreprocessConfig
from cordee.families.registry import spec_from_hf
from cordee.model.gpt import GPTModel
from cordee.weights import hf
from cordee.weights.load import save_from
from tests.weights import models


def told(text: str) -> list[str]:
    return [line.split(". ", 1)[1] for line in text.splitlines() if line[:1].isdigit() and ". " in line]


def test_conversion(tmp_path):
    spec = spec_from_hf(models.MODELS["llama"])
    with hf.write(tmp_path / "hf", spec) as sink:
        save_from(GPTModel(spec.config), sink)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "there").touch()
    given = ConvertConfig(
        load_dir=str(tmp_path / "hf"),
        save_dir=str(tmp_path / "out"),
        save_model_type="mg",
        model_type="BERT",
        lora_r=8,
        model_type_hf="mixtral",
    )
    options = [problem.option for problem in job.check_run(given)]
    assert sorted(options) == ["--lora-r", "--model-type", "--model-type-hf", "output directory"]
    fine = ConvertConfig(load_dir=str(tmp_path / "hf"), save_dir=str(tmp_path / "new"))
    assert job.check_run(fine) == [] and not (tmp_path / "new").exists()


def test_conversion_of_nothing_with_wrong_values(tmp_path, capsys):
    (tmp_path / "out").touch()
    flags = ["--load-dir", str(tmp_path / "nowhere"), "--save-dir", str(tmp_path / "out"), "--workers", "0"]
    assert main(["convert", *flags, "--save-model-type", "foo", "--model-type", "BERT"]) == 2
    options = [option.split(" = ")[0] for option in told(capsys.readouterr().err)]
    assert options == ["--workers", "--save-model-type", "--model-type", "model directory", "output directory"]


def test_preprocessing(tmp_path, capsys):
    flags = ["--input", str(tmp_path / "nowhere.jsonl"), "--output-prefix", "/proc/x", "--seq-length", "0"]
    assert main(["preprocess", *flags, "--tokenizer-type", "GPT2BPETokenizer"]) == 2
    options = [option.split(" = ")[0] for option in told(capsys.readouterr().err)]
    assert options[0] == "--seq-length" and {"--vocab-file", "--merge-file"} <= set(options)
    assert any("nowhere.jsonl" in option for option in options) or "--input" in options
    nothing = PreprocessConfig(output_prefix=str(tmp_path / "out"))
    assert [problem.option for problem in preprocess.check_run(nothing)] == ["--input"]
