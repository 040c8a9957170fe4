"""Saved models: Hugging Face checkpoints, nemotron-nas folders for vLLM, GGUF files for llama.cpp.

Imports `models`, `storage`, `config` and `errors`.
"""
