"""Saved models: Hugging Face checkpoints, vLLM's nemotron-nas, GGUF files for llama.cpp.

Imports `models`, `storage`, `config` and `errors`.
"""
