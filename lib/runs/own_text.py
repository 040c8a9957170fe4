"""Calibration windows that the model itself makes: sampled once for a model and seed, and kept with the state."""

from collections.abc import Sequence

import torch

from lib.data.inspection import describe_own_text
from lib.data.sampling import unsampled
from lib.engine.own_text import sample_windows
from lib.models.sealed_tensors import Sealed, save_sealed
from lib.reporting.console import Report
from lib.runs.single import Workspace

_FILE = "own_text.safetensors"  # in the folder of the state


def fill_in(report: Report, workspace: Workspace, seed: int, parts: Sequence[torch.Tensor]) -> None:
    """Puts the model's own text of a seed, in place, into the windows (N, T) of `parts` that are `unsampled`.

    To be called while the model is dense. A resumed run takes what is kept, since another device, or another number of
    threads, may sample other text. Raises `InputError` and `RunError` as `sample_windows` does.
    """
    first = max((windows[unsampled(windows), 0] for windows in parts), key=len, default=torch.zeros(0))
    own, state = workspace.own_text.get(seed), workspace.state
    if own is None and len(first) == 0:
        return
    path, ranks = state.folder / _FILE, workspace.batcher.ranks
    if ranks.agree(path.exists):
        own = Sealed(path, state.key).tensor("windows")
    else:
        if own is None:
            with report.timed("sample"), report.progress(len(first), "own text") as progress:
                own = sample_windows(workspace.decoder, first, workspace.seqlen, seed, ranks, progress)
        if ranks.is_first:
            save_sealed(path, {"windows": own}, state.key)
    if seed not in workspace.own_text:
        report.print(describe_own_text(own, workspace.tokenizer, "calibration"))
    workspace.own_text[seed] = own
    for windows in parts:
        rows = unsampled(windows)
        windows[rows] = own[: int(rows.sum())]
