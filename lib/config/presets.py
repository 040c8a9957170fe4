"""Settings of whole tables: `--preset NAME` gives these values to flags that are not given. Imports no torch."""

from lib.config.methods import DENSE, DEPTH_METHODS, METHODS
from lib.config.tasks import ZERO_SHOT_TASKS

_ALP_PAPER = {  # the paper's settings, with gradients as in the released code
    "seqlen": 2048,
    "nsamples": 128,
    "calibration_dataset": ["c4"],
    "dataset": ["wikitext2"],
    "grad_nsamples": 10,
    "grad_type": "l2_hundred_total",
    "sparsity_ratio": [0.7],
}
_LLAMA_1_7B = "Enoch/llama-7b-hf"

ALP_PRESETS = {
    "alp-table2": {
        **_ALP_PAPER,
        "model": [
            _LLAMA_1_7B,
            "huggyllama/llama-13b",
            "meta-llama/Llama-2-7b-hf",
            "meta-llama/Llama-2-13b-hf",
            "meta-llama/Meta-Llama-3-8B",
            "facebook/opt-6.7b",
            "facebook/opt-13b",
        ],
        "prune_method": [
            DENSE,
            *(
                f"{pruner}{allocator}"
                for pruner in ("sparsegpt", "wanda", "ria")
                for allocator in ("", "_alp", "_owl", "_dlp", "_atp")
                if pruner != "ria" or allocator in ("", "_alp")
            ),
        ],
    },
    "alp-table4": {
        **_ALP_PAPER,
        "model": [_LLAMA_1_7B],
        "prune_method": [DENSE, "wanda", "wanda_alp", "sparsegpt", "sparsegpt_alp", "ria", "ria_alp"],
        "tasks": ZERO_SHOT_TASKS,
    },
    "demo": {
        "model": ["demo"],
        "nsamples": 32,
        "prune_method": [name for name in METHODS if name != DENSE],
        "sparsity_ratio": [0.5, 0.6, 0.7],
    },
}

_OF_BLOCKS = [name for name, method in DEPTH_METHODS.items() if method.removes != "experts"]

DEPTH_PRESETS = {
    "ppllms-25": {
        "model_name": ["meta-llama/Llama-2-7b-hf", "meta-llama/Llama-2-13b-hf"],
        "method": _OF_BLOCKS,
        "prune_rate": [0.2, 0.22, 0.25],
        "seqlen": 2048,
        "nsamples": 128,
        "dataset": ["c4"],
        "eval_datasets": ["wikitext2", "c4"],
    },
    "demo": {
        "model_name": ["demo"],
        "nsamples": 32,
        "method": _OF_BLOCKS,
        "prune_rate": [0.15, 0.25, 0.35],
        "compensate": "all",
    },
}
