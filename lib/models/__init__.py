"""Causal language models as stacks of decoder layers: loading, offloading, linears, code saved with pruned models.

Imports `config`, `runtime`, `storage` and `errors`.
"""
