"""Weight pruning: pruners, layer-wise allocation, the loop over layers, quantization, the run of `alp_prune.py`.

May import `config`, `data`, `engine`, `evaluation`, `export`, `models`, `reporting`, `runs`, `runtime`,
`sensitivity`, `storage`, `files` and `errors`.
"""
