from tests.generate.conftest import gpt2, llama  # noqa: F401 (fixtures)
