"""Weight pruning: pruners, layer-wise densities, the loop over layers, quantization, the run of `alp_prune.py`.

Imports any room but `depth`.
"""
