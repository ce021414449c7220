"""Evaluation on held-out samples: accuracy and loss, and for instructions exact match and ROUGE of the answers."""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from statistics import fmean
from typing import Any

import torch
from torch import Tensor, nn

import plora_kernels as pk
from fed import interruption
from fed.data.federated_data import FederatedData
from fed.data.tables import DenseTable, InstructionTable, Split, TextTable
from fed.training.memory import is_out_of_memory
from fed.training.token_losses import find_structure, token_losses

# Characters that are not seen: direction marks, soft hyphens, word joiners, byte order marks, selectors between forms
# of a character, and the zero-width non-joiner at a word's end. Inside a word it may tell it from another.
_UNSEEN = re.compile(
    r"[\u00ad\u061c\u180b-\u180d\u180f\u200e\u200f\u202a-\u202e\u2060\u2066-\u2069\ufe00-\ufe0f\ufeff"
    r"\U000e0100-\U000e01ef]|\u200c(?!\w)"
)
_JOINERS = "\u180e\u200c\u200d"
_ZERO_WIDTH_SPACE = "\u200b"

# What is measured on generated answers.
GENERATED = ("accuracy", "rouge_1", "rouge_l")
# A callback that is called with what is done, how much of it, and how much there is to do.
WorkProgress = Callable[[str, int, int], object]

MOST_ROWS, MOST_TOKENS = 256, 16_384  # limits of one evaluation batch


def evaluate_held_out(
    model: nn.Module,
    data: FederatedData,
    right: Tensor | None = None,
    *,
    generate: bool = True,
    progress: WorkProgress | None = None,
) -> dict[str, float]:
    """Return the metrics on the test set and, if there is a validation set, those on it under `validation_…`.

    The other arguments are those of `evaluate`; `right` is of the test set.
    """
    metrics = evaluate(model, data.test, right, generate=generate, progress=progress)
    if data.validation is not None:
        found = evaluate(model, data.validation, generate=generate, progress=progress)
        metrics |= {f"validation_{name}": value for name, value in found.items()}
    return metrics


def evaluate(
    model: nn.Module,
    split: Split,
    right: Tensor | None = None,
    *,
    generate: bool = True,
    progress: WorkProgress | None = None,
) -> dict[str, float]:
    """Put the model in evaluation mode and return its `accuracy`, `loss` and, for instructions, ROUGE on `split`.

    Classification: accuracy (0 … 1) and mean cross-entropy in nats over all samples. Instructions: `loss` is the mean
    cross-entropy over all answer tokens with equal weights; `accuracy` is the share of generated answers that are
    exactly right; `rouge_1` and `rouge_l` are means over the generated answers. Where a prompt has several right
    answers, each measure takes the one that scores highest. Sums are fp64.
    `right`, (n,) bool on the rows' device, is set to whether each row is classified correctly; for instructions it is
    not written. Without `generate` no answers are generated, and their measures (`GENERATED`) are not in the result.
    `progress` is called after each batch of answers.
    """
    model.eval()
    if isinstance(split.table, InstructionTable):
        answered = _answering(model, split, split.table, progress) if generate else {}
        return answered | {"loss": _token_loss(model, split)}
    return _classification(model, split, right)


def _classification(model: nn.Module, split: Split, right: Tensor | None) -> dict[str, float]:
    device = split.table.device
    right = torch.zeros(len(split), dtype=torch.bool, device=device) if right is None else right
    loss = torch.zeros((), dtype=torch.float64, device=device)
    with torch.no_grad():
        for rows in split.batches(MOST_ROWS, MOST_TOKENS):
            interruption.check()
            batch = split.batch(rows)
            labels: Tensor = batch.pop("labels")  # (b,)
            logits: Tensor = model(**batch).logits.double()  # (b, classes)
            right[rows.to(device, non_blocking=True)] = logits.argmax(-1) == labels
            loss += torch.nn.functional.cross_entropy(logits, labels, reduction="sum")
    return {"accuracy": right.sum().item() / len(split), "loss": loss.item() / len(split)}


def _token_loss(model: nn.Module, split: Split) -> float:
    """Return the mean cross-entropy in nats over all answer tokens, each answer's end token included."""
    loss, count = torch.zeros((), dtype=torch.float64, device=split.table.device), 0
    with torch.no_grad():
        for rows in split.batches(MOST_ROWS, MOST_TOKENS):
            interruption.check()
            batch, counted = split.batch(rows), split.counted(rows)
            assert counted is not None  # because the rows are instructions
            labels = batch.pop("labels")
            find_structure(model, {name: values[:1] for name, values in batch.items()})  # tried on one row, once
            loss += token_losses(model, batch, labels, counted).sum(dtype=torch.float64)
            count += len(counted)
    return loss.item() / count


def _answering(
    model: nn.Module, split: Split, table: InstructionTable, progress: WorkProgress | None
) -> dict[str, float]:
    """Return exact match and ROUGE over at most `table.most_generated` rows (0: all), evenly spaced in the split.

    A batch holds prompts of similar lengths, so that little of it is padding.
    """
    most = table.most_generated or len(split)
    chosen = torch.arange(min(most, len(split))) * len(split) // min(most, len(split))
    part = Split(table, split.rows[chosen])
    measures = dict(zip(GENERATED, (is_exact, rouge_1, rouge_l), strict=True))
    found: dict[str, list[float]] = {name: [] for name in measures}
    written = table.prompt_lengths[part.rows] + table.max_new_tokens
    done = 0
    with folded_adapters(model):
        for rows in part.batches(MOST_ROWS, MOST_TOKENS, written):
            interruption.check()
            numbers = part.rows[rows]
            for text, row in zip(answer(model, table, numbers), numbers.tolist(), strict=True):
                for name, measure in measures.items():
                    found[name].append(max(float(measure(text, right)) for right in table.answers[row]))
            done += len(rows)
            if progress is not None:
                progress("answers", done, len(part))
    return {name: fmean(values) for name, values in found.items()}


@contextmanager
def folded_adapters(model: nn.Module) -> Iterator[None]:
    """Within the context the adapters are folded into the weights, for a step of generation is short.

    The original of each folded weight is kept meanwhile. A layer whose weight cannot be folded into, as one that is
    tied or quantised, keeps its adapter beside it, and so does one in which modules are selected or for whose original
    there is no memory. So do weights in half precision: adapters change a weight by about its rounding, and of 30 steps
    at 1e-4 a fold in bfloat16 kept 73 % (SmolLM2-135M). At the end weights and adapters are as before, bit for bit.
    """
    folded: list[pk.FusedPLoRALinear] = []
    try:
        for module in model.modules():
            if isinstance(module, pk.FusedPLoRALinear) and module.selected is None:
                if module.weight.dtype.itemsize < 4:
                    continue
                try:
                    module.check_selectable("folded")
                    module.select([], unselected="folded")
                except pk.PLoRAError:
                    continue
                except (RuntimeError, MemoryError) as error:
                    if not is_out_of_memory(error):
                        raise
                    break
                folded.append(module)
        yield
    finally:
        for module in folded:
            module.unfold()


def answer(model: Any, table: InstructionTable, rows: Tensor) -> list[str]:
    """Return the model's answers to the prompts of `rows` (b,), in the same order.

    Decoding is greedy; an answer ends before the first end token, or after `max_new_tokens` tokens.
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
    """Return the tokenizer's end token and the end tokens in the model's generation config."""
    configured = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    ends = configured if isinstance(configured, list) else [configured]
    return sorted({end for end in [*ends, tokenizer.eos_token_id] if end is not None})


def _text(tokenizer: Any, tokens: list[int], ends: list[int]) -> str:
    first = next((index for index, token in enumerate(tokens) if token in ends), len(tokens))
    text: str = tokenizer.decode(tokens[:first], skip_special_tokens=True)
    return text.strip()


def labels_of(split: Split) -> Tensor | None:
    """Return the class labels of a split's rows, (n,) int64 on the CPU, or None if the task is not classification."""
    if not isinstance(split.table, DenseTable | TextTable):
        return None
    return split.table.labels[split.rows.to(split.table.device)].cpu()


def accuracy_for(client_labels: Tensor, right: Tensor, test_labels: Tensor) -> float:
    """Return Σ_l share_l · accuracy_l, where share_l is label l's share of the client's samples.

    `right` (n,) is True for test rows that are classified correctly, and `test_labels` (n,) are their labels. Clients
    have no test set of their own, so the common test set is weighted by the client's label distribution. Labels that
    the test set lacks are left out and the other shares renormalised.
    """
    total, weight = 0.0, 0
    for label, count in zip(*client_labels.unique(return_counts=True), strict=True):
        of_label = test_labels == label
        if of_label.any():
            total += int(count) * right[of_label].double().mean().item()
            weight += int(count)
    return total / weight if weight else right.double().mean().item()


def rouge_1(answer: str, right: str) -> float:
    """Return ROUGE-1's F measure, 0 … 1: as `rouge_l`, but counting common words in any order.

    >>> rouge_1("the cat sat", "the cat ran")  # two words of three
    0.6666666666666666
    """
    words, wanted = _words(answer), _words(right)
    return _f_measure((Counter(words) & Counter(wanted)).total(), words, wanted)


def rouge_l(answer: str, right: str) -> float:
    """Return ROUGE-L's F measure, 0 … 1: 2PR / (P + R), with P = lcs / words of `answer`, R = lcs / words of `right`.

    lcs is the length of the longest common subsequence of words. A word is a run of letters, with the marks that belong
    to them such as vowel signs and accents, and digits; it is not stemmed. Words are compared without regard to case
    and in Unicode's form NFC, so that it does not matter how an accent is encoded, while compatible characters such as
    2 and ² differ. A run of a script without spaces, as of Chinese or Thai, is one word. Source: Lin, "ROUGE: A Package
    for Automatic Evaluation of Summaries", 2004.

    >>> rouge_l("a b c d", "a c b d")  # "a b d" is the longest common subsequence
    0.75
    """
    words, wanted = _words(answer), _words(right)
    return _f_measure(longest_common_subsequence(words, wanted), words, wanted)


def longest_common_subsequence(first: Sequence[str], second: Sequence[str]) -> int:
    """Return the length of the longest common subsequence of `first` and `second`."""
    row = [0] * (len(second) + 1)  # row[j]: the length for the part of `first` visited so far and second[:j]
    for element in first:
        diagonal = 0
        for column, other in enumerate(second, start=1):
            longest = diagonal + 1 if element == other else max(row[column], row[column - 1])
            diagonal, row[column] = row[column], longest
    return row[-1]


def is_exact(answer: str, right: str) -> bool:
    """Return whether two answers are equal when case, punctuation, white space and encoding (NFC) are ignored.

    >>> is_exact("Yes.", "yes")
    True
    """
    return _plain(answer) == _plain(right)


def _f_measure(common: int, words: Sequence[str], wanted: Sequence[str]) -> float:
    return 2 * common / (len(words) + len(wanted)) if common else 0.0


def _words(text: str) -> list[str]:
    spaced: list[str] = []
    for letter in _folded(text):
        kind = unicodedata.category(letter)
        joins = kind in ("Mn", "Mc") or letter in _JOINERS
        in_word = kind[0] in "LN" or (joins and spaced and spaced[-1] != " ")  # a mark alone is no word
        spaced.append(letter if in_word else " ")
    return "".join(spaced).split()


def _plain(text: str) -> str:
    """Return the text folded, with single spaces and no punctuation; text of punctuation alone keeps it."""
    folded = " ".join(_folded(text).replace(_ZERO_WIDTH_SPACE, "").split())
    bare = "".join(letter for letter in folded if not unicodedata.category(letter).startswith("P"))
    return " ".join(bare.split()) or folded


def _folded(text: str) -> str:
    """Return the text in NFC, without case and without characters that are not seen.

    Unicode folds case between decomposing and composing. It folds İ, the capital of the Turkish i, to i and a dot; here
    the dot is left out, as it is over an i that was small already.
    """
    folded = unicodedata.normalize("NFC", unicodedata.normalize("NFD", text).casefold())
    return _UNSEEN.sub("", folded.replace("i\u0307", "i"))
