"""Small tasks of lm_eval over files of ours, which need no network; and what a model answers, by its own forward."""

import json
import re
from collections.abc import Sequence
from pathlib import Path

import torch

CHOICE = """
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: choices
doc_to_target: answer
metric_list:
  - metric: acc
"""
NORMALIZED = "  - metric: acc_norm\n"
GENERATION = """
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{train: {examples}, test: {data}}}}}
test_split: test
fewshot_split: train
fewshot_config: {{sampler: first_n}}
num_fewshot: {count}
output_type: generate_until
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{answer}}}}"
generation_kwargs: {{until: ["\\n\\n"], max_gen_toks: 6, do_sample: false}}
filter_list:
  - name: first_word
    filter: [{{function: regex, regex_pattern: "(\\\\w+)"}}, {{function: take_first}}]
  - name: whole
    filter: [{{function: take_first}}]
metric_list:
  - metric: exact_match
"""
QUESTIONS = ("The layer was", "In this module, a function", "Return the", "A class of", "If the argument is not")

WORDS = ("removed", "of 31", "changed.", "layer", "the", "a list", "returned", "None")


def write_rows(path: Path, rows: Sequence[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def write_choices(folder: Path, name: str = "layers", answers=(0, 1, 0, 1, 1, 0, 0), metrics: str = "") -> Path:
    """A task of two choices, of which the caller says what is right."""
    questions = [QUESTIONS[i % len(QUESTIONS)] for i in range(len(answers))]
    choices = [[WORDS[i % 8], WORDS[(3 * i + 1) % 8]] for i in range(len(answers))]
    rows = [{"question": q, "choices": c, "answer": a} for q, c, a in zip(questions, choices, answers, strict=True)]
    data = write_rows(folder / f"{name}.jsonl", rows)
    path = folder / "tasks" / f"{name}.yaml"
    path.parent.mkdir(exist_ok=True)
    path.write_text(CHOICE.format(name=name, data=data) + metrics)
    return path


def write_generation(folder: Path, answers: Sequence[str], name: str = "goes_on", examples: Sequence[str] = ()) -> Path:
    """A task of going on from the questions with a word, after examples of this."""
    rows = [{"question": q, "answer": a} for q, a in zip(QUESTIONS, answers, strict=True)]
    shown = [{"question": f"This is {a}", "answer": a} for a in examples or ["unused"]]
    files = {"data": rows, "examples": shown}
    paths = {part: write_rows(folder / f"{name}-{part}.jsonl", content) for part, content in files.items()}
    path = folder / "tasks" / f"{name}.yaml"
    path.parent.mkdir(exist_ok=True)
    path.write_text(GENERATION.format(name=name, count=len(examples), **paths))
    return path


@torch.no_grad()
def likelier(model, tokenizer, question: str, choices: Sequence[str]) -> int:
    """The choice with the higher log-likelihood after the question."""
    sums = []
    for choice in choices:
        context, whole = tokenizer(question)["input_ids"], tokenizer(f"{question} {choice}")["input_ids"]
        logits = model(torch.tensor([whole]), use_cache=False).logits[0].log_softmax(-1)
        sums.append(sum(logits[i - 1, whole[i]].item() for i in range(len(context), len(whole))))
    return max(range(len(choices)), key=sums.__getitem__)


def right_choices(model, tokenizer, task: Path) -> str:
    """`1` for each row of a task of choices that the model answers right, else `0`."""
    rows = map(json.loads, (task.parents[1] / f"{task.stem}.jsonl").read_text().splitlines())
    return "".join(
        str(int(likelier(model, tokenizer, row["question"], row["choices"]) == row["answer"])) for row in rows
    )


@torch.no_grad()
def next_word(model, tokenizer, prompt: str) -> str:
    """The first word that a model goes on with, token by token and without a cache."""
    ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
    start = ids.shape[1]
    for _ in range(6):
        ids = torch.cat([ids, model(ids, use_cache=False).logits[:, -1:].argmax(-1)], dim=1)
    found = re.search(r"\w+", tokenizer.decode(ids[0, start:]).split("\n\n")[0])
    return found[0] if found else "[invalid]"
