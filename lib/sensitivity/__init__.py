"""ALP's connection sensitivity: gradients layer by layer, the file that keeps them, the run of `save_gradient.py`.

Imports any room but `evaluation`, `depth` and `sparsity`.
"""
