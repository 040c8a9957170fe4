"""Saved models: Hugging Face checkpoints, vLLM's nemotron-nas, GGUF files for llama.cpp.

May import `config`, `models`, `storage` and `errors`.
"""
