"""log.tsv, the table that `--save_log` appends to: one row per run and evaluation text. Does not import torch."""

import fcntl
import os
import re
import time
from collections.abc import Sequence
from pathlib import Path

from lib.errors import InputError

FILE = "log.tsv"
COLUMNS = (
    *("method", "actual_sparsity", "ppl_test"),  # the columns of the reference code
    *("dataset", "ppl_dense", "ppl_quantized", "model", "sparsity_ratio", "sparsity_type", "alpha"),
    *("accuracy_dense", "accuracy_pruned", "accuracy_quantized", "flips"),
    *(
        "grad_type",
        "grad_nsamples",
        "nsamples",
        "seqlen",
        "seed",
        "quantization",
        "prune_seconds",
        "output_dir",
        "time",
    ),
)


def check(folder: Path) -> None:
    """Raises `InputError` when the folder's log has other columns, or cannot be written."""
    path = folder / FILE
    if path.is_symlink():
        raise InputError(f"--save: {path} is a link, which is not written through; name another folder")
    if not path.exists():
        return
    try:
        with path.open("a+b") as file:
            file.seek(0)
            _check_header(path, file.readline())
    except OSError as error:
        raise InputError(f"--save: {path} is no log that can be appended to ({error}); name another folder") from error


def rows(result: dict, output_dir: Path) -> list[str]:
    """The lines for the content of a result.json, stamped with the current time."""
    return [_line([row[column] for column in COLUMNS]) for row in _rows(result, output_dir)]


def append(folder: Path, lines: Sequence[str]) -> Path:
    """Appends the lines that the log lacks, after a header if the file is new. Safe with several runs at once.

    Returns the path of the log. Raises `InputError` when it has other columns.
    """
    path = folder / FILE
    folder.mkdir(parents=True, exist_ok=True)
    new = [line.encode() for line in lines]
    with path.open("a+b") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        file.seek(0)
        there = file.read().splitlines(keepends=True)
        if there and not there[-1].endswith(b"\n"):
            if any(line.startswith(there[-1]) for line in (_HEADER, *new)):  # cut off by a full disk: comes again
                file.truncate(file.tell() - len(there.pop()))
            else:
                there.append(b"\n")
                file.write(there[-1])
        if there:
            _check_header(path, there[0])
        file.write(b"".join(line for line in (_HEADER, *new) if line not in there))
        file.flush()
        os.fsync(file.fileno())
    return path


def _rows(result: dict, output_dir: Path) -> list[dict]:
    means = result.get("tasks", {}).get("mean", {})
    flips = means.get("pruned", {}).get("flips")
    shared = {
        "method": result["prune_method"],
        "actual_sparsity": f"{result['sparsity']:.6f}",
        **{
            f"accuracy_{stage}": f"{means[stage]['accuracy']:.2f}" if stage in means else ""
            for stage in ("dense", "pruned", "quantized")
        },
        "flips": "" if flips is None else f"{flips:.2f}",
        "model": result["model_name"],
        "alpha": "" if result["alpha"] is None else result["alpha"],
        "grad_type": result["grad_type"] or "",
        "grad_nsamples": result["grad_nsamples"] or "",
        "quantization": result.get("quantization", ""),
        "prune_seconds": result["seconds"]["prune"],
        "output_dir": output_dir,
        "time": time.strftime("%Y-%m-%d %H:%M:%S"),
        **{name: result[name] for name in ("sparsity_ratio", "sparsity_type", "nsamples", "seqlen", "seed")},
    }
    return [
        {
            **shared,
            "dataset": dataset,
            "ppl_test": f"{perplexity['pruned']:.4f}",
            "ppl_dense": f"{perplexity['dense']:.4f}",
            "ppl_quantized": f"{perplexity['quantized']:.4f}" if "quantized" in perplexity else "",
        }
        for dataset, perplexity in result["perplexity"].items()
    ]


def _line(cells) -> str:
    return "\t".join(re.sub(r"[\t\r\n]+", " ", str(cell)) for cell in cells) + "\n"


_HEADER = _line(COLUMNS).encode()


def _check_header(path: Path, header: bytes) -> None:
    if not _HEADER.startswith(header):
        raise InputError(f"--save: {path} has other columns than this version writes; move it, or name another folder")
