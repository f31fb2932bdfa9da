# SPDX-License-Identifier: Apache-2.0
"""A loaded model as lm-evaluation-harness wants it, and its scores on tasks. Needs lm-eval."""

import contextlib
import io
import logging
import math
import os
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass

import lm_eval
import torch
from lm_eval.models.huggingface import HFLM

from unipool.data.tokenizer import SEPARATOR, unused_ids, used_ids
from unipool.errors import InputError
from unipool.evaluation.tasks import VERSION
from unipool.models.loading import check_vocabulary

_BOOTSTRAP = 1000  # resamples for the standard error of a perplexity: good to about 2 %
_CONFIG = (
    "dataset_path",
    "dataset_name",
    "output_type",
    "num_fewshot",
    "doc_to_text",
    "doc_to_target",
    "doc_to_choice",
    "process_docs",
    "target_delimiter",
    "metric_list",
)


@dataclass(frozen=True)
class Metric:
    """stderr: None where the harness gives none, as for a single document."""

    value: float
    stderr: float | None


@dataclass(frozen=True)
class TaskScore:
    """A task's result. metrics: by the harness's names, such as acc, acc_norm or perplexity.

    docs: how many were evaluated, of docs_available. cut: how many of the requests (prompt and
    answer) did not fit, and lost their beginning. config: the harness's options of the task.
    """

    task: str
    version: str | float | None
    docs: int
    docs_available: int
    requests: int
    cut: int
    metrics: dict[str, Metric]
    config: dict


@dataclass(frozen=True)
class Average:
    """Unweighted mean of the tasks' accuracies; stderr: of that mean, for independent tasks."""

    value: float
    stderr: float | None
    tasks: list[str]


@dataclass(frozen=True)
class Scores:
    """averages: "acc" over every task that has one; "acc_norm" the same, with the accuracy by
    log-likelihood a character in its place for the tasks that have one."""

    lm_eval: str
    tasks: list[TaskScore]
    averages: dict[str, Average]

    def to_dict(self) -> dict:
        return asdict(self)


class HarnessModel(HFLM):
    """A causal language model and its tokenizer, both already loaded.

    max_length: tokens that the model sees at a time; a longer request loses its beginning.
    special_tokens: whether requests get those that the tokenizer adds to a text, such as one at
    its beginning; `unipool train` adds none, and lets a text begin after the end-of-text token.
    Log-probabilities are float32 whatever the model's dtype. Raises InputError for a tokenizer that
    does not fit the model, or that has no end-of-text token where the model names none either.
    """

    def __init__(
        self,
        model,
        tokenizer,
        *,
        max_length: int,
        batch_size: int,
        special_tokens: bool = True,
    ):
        vocab_size = model.config.get_text_config().vocab_size
        _settle_end_token(tokenizer, model.config.eos_token_id)
        check_vocabulary(model, tokenizer)
        tokenizer.model_max_length = int(1e30)  # requests are cut to max_length, and counted
        model.generation_config.suppress_tokens = unused_ids(tokenizer, vocab_size) or None
        super().__init__(
            pretrained=model,
            tokenizer=tokenizer,
            backend="causal",
            max_length=max_length,
            batch_size=batch_size,
            softmax_dtype=torch.float32,
            add_bos_token=None if special_tokens else False,
            prefix_token_id=None if special_tokens else tokenizer.eos_token_id,
        )
        self.requests: Counter[str] = Counter()
        self.cut: Counter[str] = Counter()
        self._task_names: list[str] = []

    def loglikelihood(self, requests, disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        self._task_names = self._count(requests)
        return super().loglikelihood(requests, disable_tqdm=disable_tqdm)

    def loglikelihood_rolling(self, requests, disable_tqdm: bool = False) -> list[float]:
        self._count(requests)
        self._task_names = []  # what is scored are windows that fit, several a request
        return super().loglikelihood_rolling(requests, disable_tqdm=disable_tqdm)

    def _count(self, requests) -> list[str]:
        names = [str(request.task_name) for request in requests]
        self.requests.update(names)
        return names

    def _loglikelihood_tokens(self, requests, *args, **options) -> list[tuple[float, bool]]:
        for name, (_, context, continuation) in zip(self._task_names, requests, strict=False):
            if not 0 < len(continuation) <= self.max_length:
                raise InputError(
                    f"--max-length {self.max_length}: task {name} has an answer of "
                    f"{len(continuation)} tokens, which must be from 1 to --max-length"
                )
            self.cut[name] += len(context) + len(continuation) > self.max_length + 1
        answers = super()._loglikelihood_tokens(requests, *args, **options)
        if any(math.isnan(value) for value, _ in answers):
            raise InputError("model: its log-probabilities are not numbers; see its weights")
        return answers

    def generate_until(self, requests, disable_tqdm: bool = False) -> list[str]:
        self._count(requests)
        try:
            return super().generate_until(requests, disable_tqdm=disable_tqdm)
        except AssertionError as error:  # how the harness says that there is no room to write
            raise InputError(f"--max-length {self.max_length}: {error}") from error


def _settle_end_token(tokenizer, model_id: int | list[int] | None) -> None:
    """Give `tokenizer` the end-of-text token that the model was trained with, if it names none."""
    if tokenizer.eos_token_id is not None:
        return
    if isinstance(model_id, int) and 0 <= model_id < len(tokenizer):
        tokenizer.eos_token = tokenizer.convert_ids_to_tokens(model_id)
    elif model_id == len(tokenizer) and model_id not in used_ids(
        tokenizer
    ):  # so `unipool train` separates documents with such a tokenizer
        tokenizer.add_special_tokens({"eos_token": SEPARATOR})
    else:
        raise InputError(
            "model: its tokenizer must have an end-of-text token (eos_token), or the model's "
            f"eos_token_id be one of its tokens; got {model_id}"
        )


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keeps the harness's messages away, and its progress bars where there is no terminal."""
    loggers = [logging.getLogger(name) for name in ("lm_eval", "huggingface_hub")]
    levels, multiprocess = [it.level for it in loggers], os.environ.get("DISABLE_MULTIPROC")
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    os.environ["DISABLE_MULTIPROC"] = "1"  # a pool of processes for one chunk of resamples
    try:
        with contextlib.ExitStack() as stack:
            stack.enter_context(contextlib.redirect_stdout(io.StringIO()))
            if not sys.stderr.isatty():
                stack.enter_context(contextlib.redirect_stderr(io.StringIO()))
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
        if multiprocess is None:
            del os.environ["DISABLE_MULTIPROC"]
        else:
            os.environ["DISABLE_MULTIPROC"] = multiprocess


def score_tasks(model: HarnessModel, tasks: dict, limit: int | None = None) -> Scores:
    """The scores of `model` on `tasks` (see load_tasks), the first `limit` documents of each."""
    found = lm_eval.evaluate(
        model, {"tasks": tasks}, limit=limit, bootstrap_iters=_BOOTSTRAP, log_samples=False
    )
    scores = []
    for name in tasks:
        samples = found["n-samples"][name]
        options = found["configs"][name]
        scores.append(
            TaskScore(
                task=name,
                version=found["versions"].get(name),
                docs=samples["effective"],
                docs_available=samples["original"],
                requests=model.requests[name],
                cut=model.cut[name],
                metrics=_metrics(found["results"][name]),
                config={key: options[key] for key in _CONFIG if key in options},
            )
        )
    averages = {"acc": _average(scores, "acc"), "acc_norm": _average(scores, "acc_norm", "acc")}
    return Scores(VERSION, scores, {key: mean for key, mean in averages.items() if mean})


def _metrics(result: dict) -> dict[str, Metric]:
    """The harness writes `name,filter` and `name_stderr,filter`; the filter is mostly none."""
    metrics = {}
    for key, value in result.items():
        name, comma, kind = key.partition(",")
        if not comma or name.endswith("_stderr"):
            continue
        error = result.get(f"{name}_stderr,{kind}")
        stderr = float(error) if isinstance(error, int | float) else None
        metrics[name if kind == "none" else key] = Metric(float(value), stderr)
    return metrics


def _average(scores: list[TaskScore], *order: str) -> Average | None:
    """Of the first metric in `order` that each task has; None if no task has any."""
    chosen = {}
    for score in scores:
        names = [name for name in order if name in score.metrics]
        if names:
            chosen[score.task] = score.metrics[names[0]]
    if not chosen:
        return None
    count, errors = len(chosen), [metric.stderr for metric in chosen.values()]
    stderr = None if None in errors else math.hypot(*errors) / count
    return Average(sum(m.value for m in chosen.values()) / count, stderr, list(chosen))
