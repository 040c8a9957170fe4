"""Saved models: Hugging Face checkpoints, nemotron-nas folders for vLLM, GGUF files for llama.cpp.

May import `config`, `models`, `runtime`, `storage`, `files` and `errors`.
"""
