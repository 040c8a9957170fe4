"""The parts of a key that both kinds of runs have: what a result depends on. Imports no torch."""

from collections.abc import Sequence

from lib.config.sources import ModelSource, stamp


def key_of_source(source: ModelSource) -> dict:
    """The model, and the dtype it is loaded in."""
    return {"model": stamp(source.name), "dtype": source.dtype}


def key_of_evaluation(texts: Sequence[str], seqlen: int | None, stride: int | None) -> dict:
    """The evaluation texts, and how they are cut into windows."""
    return {"eval": [stamp(text) for text in texts], "seqlen": seqlen, "eval_stride": stride}
