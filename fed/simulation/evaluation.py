"""What a model reaches on held-out samples: accuracy and loss, or exact match and ROUGE of generated answers."""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Sequence
from statistics import fmean
from typing import Any

import torch
from torch import Tensor, nn

from fed.data.federated_data import FederatedData
from fed.data.tables import IGNORED, DenseTable, InstructionTable, Split, TextTable

_WORD = re.compile(r"[^\W_]+")

MOST_ROWS, MOST_TOKENS = 256, 16_384  # of one batch


def evaluate_held_out(model: nn.Module, data: FederatedData, right: Tensor | None = None) -> dict[str, float]:
    """Return the metrics of the test set, and those of the validation set, if there is one, as `validation_…`.

    `right` is filled as by `evaluate` over the test set.
    """
    metrics = evaluate(model, data.test, right)
    if data.validation is not None:
        metrics |= {f"validation_{name}": value for name, value in evaluate(model, data.validation).items()}
    return metrics


def evaluate(model: nn.Module, split: Split, right: Tensor | None = None) -> dict[str, float]:
    """Return what a model reaches on `split`, in evaluation mode: `accuracy`, `loss` and, for instructions, ROUGE.

    Classification: accuracy (0 … 1) and mean cross-entropy in nats over every sample. Instructions: `loss` is the
    mean cross-entropy of the answers' tokens, each token alike; `accuracy` the share of generated answers that are
    exactly right, `rouge_1` and `rouge_l` their mean ROUGE, each with the right answer it is nearest to. Sums are fp64.
    `right`, (n,) bool on the rows' device, is filled with which rows are classified rightly; instructions leave it.
    """
    model.eval()
    if isinstance(split.table, InstructionTable):
        return _answering(model, split, split.table) | {"loss": _token_loss(model, split)}
    return _classification(model, split, right)


def _classification(model: nn.Module, split: Split, right: Tensor | None) -> dict[str, float]:
    device = split.table.device
    right = torch.zeros(len(split), dtype=torch.bool, device=device) if right is None else right
    loss = torch.zeros((), dtype=torch.float64, device=device)
    with torch.no_grad():
        for rows in split.batches(MOST_ROWS, MOST_TOKENS):
            batch = split.batch(rows)
            labels: Tensor = batch.pop("labels")  # (b,)
            logits: Tensor = model(**batch).logits.double()  # (b, classes)
            right[rows.to(device, non_blocking=True)] = logits.argmax(-1) == labels
            loss += torch.nn.functional.cross_entropy(logits, labels, reduction="sum")
    return {"accuracy": right.sum().item() / len(split), "loss": loss.item() / len(split)}


def _token_loss(model: nn.Module, split: Split) -> float:
    """Mean cross-entropy in nats over every token of the answers and their ends."""
    loss = torch.zeros((), dtype=torch.float64, device=split.table.device)
    count = torch.zeros((), dtype=torch.int64, device=split.table.device)
    with torch.no_grad():
        for rows in split.batches(MOST_ROWS, MOST_TOKENS):
            batch = split.batch(rows)
            labels = batch.pop("labels")[:, 1:]  # (b, L - 1): the token each position is followed by
            answered = labels != IGNORED
            # The vocabulary is wide: only the rows of logits that count leave the working dtype.
            logits: Tensor = model(**batch).logits[:, :-1][answered].float()  # (tokens, vocabulary)
            losses = torch.nn.functional.cross_entropy(logits, labels[answered], reduction="none")
            loss += losses.sum(dtype=torch.float64)
            count += answered.sum()
    return loss.item() / count.item()


def _answering(model: nn.Module, split: Split, table: InstructionTable) -> dict[str, float]:
    """Exact match and ROUGE over rows at even distances, `most_generated` of them."""
    most = table.most_generated or len(split)
    chosen = torch.arange(min(most, len(split))) * len(split) // min(most, len(split))
    part = Split(table, split.rows[chosen])
    measures = {"accuracy": is_exact, "rouge_1": rouge_1, "rouge_l": rouge_l}
    found: dict[str, list[float]] = {name: [] for name in measures}
    for rows in part.batches(MOST_ROWS, MOST_TOKENS):
        numbers = part.rows[rows]
        for text, row in zip(answer(model, table, numbers), numbers.tolist(), strict=True):
            for name, measure in measures.items():
                found[name].append(max(float(measure(text, right)) for right in table.answers[row]))
    return {name: fmean(values) for name, values in found.items()}


def answer(model: Any, table: InstructionTable, rows: Tensor) -> list[str]:
    """Return the model's answers to the prompts of `rows` (b,), in their order.

    Every token is the likeliest; an answer ends before its end token, or after `max_new_tokens` tokens.
    """
    from transformers import GenerationConfig

    prompts = table.prompts(rows)
    ends = _end_tokens(model, table.tokenizer)
    greedy = GenerationConfig(
        do_sample=False,
        max_new_tokens=table.max_new_tokens,
        pad_token_id=table.tokenizer.pad_token_id,
        eos_token_id=ends,
        use_cache=True,
    )
    with torch.no_grad():
        tokens = model.generate(**prompts, generation_config=greedy)
    return [_text(table.tokenizer, row, ends) for row in tokens[:, prompts["input_ids"].shape[1] :].tolist()]


def _end_tokens(model: Any, tokenizer: Any) -> list[int]:
    """The tokenizer's end token, and those the checkpoint says end what it generates."""
    configured = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    ends = configured if isinstance(configured, list) else [configured]
    return sorted({end for end in [*ends, tokenizer.eos_token_id] if end is not None})


def _text(tokenizer: Any, tokens: list[int], ends: list[int]) -> str:
    first = next((index for index, token in enumerate(tokens) if token in ends), len(tokens))
    text: str = tokenizer.decode(tokens[:first], skip_special_tokens=True)
    return text.strip()


def labels_of(split: Split) -> Tensor | None:
    """Return the labels of a split's rows, (n,) int64 on the CPU; None where rows are not classified."""
    if not isinstance(split.table, DenseTable | TextTable):
        return None
    return split.table.labels[split.rows.to(split.table.device)].cpu()


def accuracy_for(client_labels: Tensor, right: Tensor, test_labels: Tensor) -> float:
    """Return Σ_l share_l · accuracy_l, share_l being label l's share of the client's samples.

    `right` (n,) says which test rows, of `test_labels` (n,), are right. Clients have no test set of their own; their
    mix of labels is what tells one from another. Labels the test set lacks are left out and the rest renormalised.
    """
    total, weight = 0.0, 0
    for label, count in zip(*client_labels.unique(return_counts=True), strict=True):
        of_label = test_labels == label
        if of_label.any():
            total += int(count) * right[of_label].double().mean().item()
            weight += int(count)
    return total / weight if weight else right.double().mean().item()


def rouge_1(answer: str, right: str) -> float:
    """Return ROUGE-1's F measure, 0 … 1: as `rouge_l`, with the number of words in common in whatever order.

    >>> rouge_1("the cat sat", "the cat ran")  # two words of three
    0.6666666666666666
    """
    words, wanted = _words(answer), _words(right)
    return _f_measure((Counter(words) & Counter(wanted)).total(), words, wanted)


def rouge_l(answer: str, right: str) -> float:
    """Return ROUGE-L's F measure, 0 … 1: 2PR / (P + R), P and R being lcs / words of the answer, and of the right one.

    lcs is the length of the longest common subsequence of words: runs of letters and digits in lower case, not
    stemmed. Source: Lin, "ROUGE: A Package for Automatic Evaluation of Summaries", 2004.

    >>> rouge_l("a b c d", "a c b d")  # "a b d" is the longest common subsequence
    0.75
    """
    words, wanted = _words(answer), _words(right)
    return _f_measure(longest_common_subsequence(words, wanted), words, wanted)


def longest_common_subsequence(first: Sequence[str], second: Sequence[str]) -> int:
    """Return how many elements of `first` are found in `second` in the same order, at most."""
    row = [0] * (len(second) + 1)  # row[j]: of what of `first` was seen, and second[:j]
    for element in first:
        diagonal = 0
        for column, other in enumerate(second, start=1):
            diagonal, row[column] = (
                row[column],
                diagonal + 1 if element == other else max(row[column], row[column - 1]),
            )
    return row[-1]


def is_exact(answer: str, right: str) -> bool:
    """Say whether two answers are the same, case, punctuation and white space apart.

    >>> is_exact("Yes.", "yes")
    True
    """
    return _plain(answer) == _plain(right)


def _f_measure(common: int, words: Sequence[str], wanted: Sequence[str]) -> float:
    return 2 * common / (len(words) + len(wanted)) if common else 0.0


def _words(text: str) -> list[str]:
    return _WORD.findall(text.lower())


def _plain(text: str) -> str:
    """Lower case, white space as single blanks, without punctuation, unless there is nothing else."""
    lower = " ".join(text.lower().split())
    bare = "".join(letter for letter in lower if not unicodedata.category(letter).startswith("P"))
    return " ".join(bare.split()) or lower
