"""GGUF: the files of llama.cpp, read and written."""
