"""Tasks of lm-evaluation-harness, judged by its own metrics."""

import json
import math
import os
import time
from collections.abc import Callable, Collection, Sequence
from functools import cached_property
from types import SimpleNamespace
from typing import Any, ClassVar, Literal

import numpy as np
import numpy.typing as npt
import torch
from pydantic import Field, PrivateAttr, model_validator
from torch import nn

from merging.checkpoints.models.parameter_names import Loading
from merging.errors import EngineError, TaskError
from merging.io import hashing
from merging.io.addresses import in_words
from merging.registry import did_you_mean
from merging.tasks.harness.documents import Documents, find_task, quiet_harness, read_documents
from merging.tasks.head import blank_model, generation_config, load_model, load_tokenizer
from merging.tasks.language.text_engine import EngineNeeds, NeedsRecorder, TextEngine
from merging.tasks.predictions import Floats, Predictions
from merging.tasks.task import Score, Split, Task, TaskSettings, register, score_of

RESAMPLES = 50
"""Of the bootstrap of metrics of all documents together, each of which costs a pass over them."""
Judged = Literal["validation", "test"]
PER_TOKEN = ("word_perplexity", "byte_perplexity", "bits_per_byte")
"""Metrics whose items are a log-likelihood and what it counts for."""


SHARES = ("acc", "acc_norm", "acc_mutual_info", "acc_bytes", "acc_all", "exact_match", "em", "f1", "mcc")
"""Metrics of the harness that lie between 0 and 1 (mcc between −1 and 1), and are read as per cent."""


class HarnessSettings(TaskSettings):
    """A task of lm-evaluation-harness by its name, or by a YAML file of yours, with the harness's own metric.

    Test is the split that the harness evaluates. Validation is the validation split of the task's data set where it has both;
    of a task with one of them alone, half of the documents are for validation and the other half for test. Statistics come
    from members' `calibration`.
    """

    kind: Literal["lm_eval"] = Field("lm_eval", description="lm_eval: a task of lm-evaluation-harness.")
    task: str = Field(min_length=1, description="Its name in the harness.")
    include_path: str | None = Field(None, description="Directory with further tasks as YAML files.")
    splits: dict[Judged, str] = Field(
        default_factory=dict,
        description="Split (validation, test) → split of the task's data set, where not the usual one.",
    )
    metric: str | None = Field(
        None, description="One of the task's metrics; by default the first. All are made to grow."
    )
    filter: str | None = Field(None, description="Which of the task's filters of answers counts; by default the first.")
    num_fewshot: int | None = Field(None, ge=0, description="Examples before each question; by default the task's own.")
    limit: int | None = Field(
        None, ge=1, description="Only the first so many documents of each split, as `--limit` has it."
    )
    chat: bool = Field(False, description="Put the checkpoint's chat template around questions.")
    system_instruction: str | None = Field(None, description="Put before every question.")
    fewshot_as_multiturn: bool = Field(True, description="With `chat`, whether examples are turns of the conversation.")
    generation: dict[str, Any] = Field(
        default_factory=dict,
        description="Arguments of generation (`max_gen_toks`, `until`) that replace the task's own.",
    )
    batch_size: int = Field(16, ge=1, description="Sequences per step of evaluation.")
    max_length: int | None = Field(None, ge=2, description="Tokens that the model reads; by default what it can.")
    model_class: Literal["AutoModelForCausalLM", "AutoModelForSeq2SeqLM"] = Field(
        "AutoModelForCausalLM", description="Class in `transformers` that loads the checkpoint."
    )
    _directory: str = PrivateAttr(default_factory=os.getcwd)  # travels to the workers, which may have another

    @property
    def is_percent(self) -> bool:
        """Whether the file names a metric that is a share; see `TaskSettings.is_percent`."""
        return self.metric in SHARES

    @property
    def judged_by(self) -> str:
        """The metric's name; where the file leaves it to the harness, that."""
        return self.metric or "the harness's metric"

    @model_validator(mode="after")
    def _is_greedy(self) -> "HarnessSettings":
        if self.generation.get("do_sample") or self.generation.get("temperature"):
            raise ValueError("`generation` draws tokens by chance: candidates could not be compared; leave it greedy")
        return self


class HarnessTask(Task):
    """A task of lm-evaluation-harness; see `Task`."""

    kind: ClassVar[str] = "lm_eval"
    has_logits: ClassVar[bool] = False
    has_predictions: ClassVar[bool] = True
    has_surrogates: ClassVar[bool] = False
    settings: HarnessSettings

    def __init__(self, name: str, settings: HarnessSettings, head: str) -> None:
        super().__init__(name, settings, head)
        self._documents: dict[str, Documents] = {}

    def check(self) -> list[str]:
        """Loads the harness's task, and makes all requests; see `Task.check`."""
        self.blank_model()
        for split in ("validation", "test"):
            self.size(split)
        _ = self._judge
        return [f"task '{self.name}' is judged by lm-evaluation-harness: no statistics can be computed for it"]

    def load_model(self) -> nn.Module:
        """The head's checkpoint as `settings.model_class`; see `Task.load_model`."""
        return self.load_skeleton(())

    def load_skeleton(self, merged: Collection[str], dtype: torch.dtype = torch.float32) -> nn.Module:
        """See `Task.load_skeleton`."""
        model = load_model(self.head, self.settings.model_class, base=self.base, hollow=merged, dtype=dtype)
        config: Any = model.config
        config.use_cache = False
        return model

    def blank_model(self) -> tuple[nn.Module, Loading]:
        """See `Task.blank_model`."""
        try:
            return blank_model(self.head, self.settings.model_class, self.base)
        except TaskError as error:
            raise self.error(str(error)) from error

    def size(self, split: Split) -> int:
        """See `Task.size`; there are no training examples."""
        return 0 if split == "train" else len(self._places(split))

    @property
    def judged_by(self) -> str:
        """The metric's name, as the harness has it."""
        return self._judge.name

    @property
    def is_below_zero(self) -> bool:
        """Of metrics that are better when they are less; see `Task.is_below_zero`."""
        return self._judge.sign < 0

    def data_fingerprint(self, split: Split) -> str:
        """Content hash of documents, requests and how they are judged, and of the harness's version."""
        import lm_eval

        documents, places = self._read(self._split_names[split]), self._places(split)
        shown = [
            [
                json.dumps(documents.docs[place], sort_keys=True, default=str),
                [r.args for r in documents.requests[place]],
            ]
            for place in places
        ]
        judge = self._judge
        return hashing.fingerprint([lm_eval.__version__, json.dumps(shown, default=str), judge.metric, judge.filter])

    def predict(
        self,
        model: nn.Module | TextEngine,
        split: Split,
        positions: npt.NDArray[np.int64],
        *,
        precision: str = "float32",
    ) -> Predictions:
        """See `Task.predict`."""
        started = time.perf_counter()
        documents, places = self._read(self._split_names[split]), self._places(split)[positions]
        requests_of = documents.requests_of(places)
        kind = "cpu" if isinstance(model, TextEngine) else next(model.parameters()).device.type
        try:
            with torch.inference_mode(), torch.autocast(kind, torch.bfloat16, enabled=precision == "bfloat16"):
                self._answer(model, [request for requests in requests_of for request in requests])
            predictions = self._judge.judged([documents.docs[place] for place in places], requests_of)
        except EngineError:
            raise
        except TaskError as error:
            raise self.error(str(error)) from error
        except Exception as error:  # the harness and the code of its tasks raise all kinds
            raise self.error(f"the harness failed on {split} examples: {in_words(error)}") from error
        return Predictions(**(vars(predictions) | {"seconds": time.perf_counter() - started}))

    def score(self, predictions: Predictions) -> Score:
        """What the harness's aggregation makes of the documents' results; see `Task.score`."""
        return self._judge.score(predictions)

    def influences(self, predictions: Predictions) -> Floats | None:
        """See `Task.influences`."""
        return predictions.values if self._judge.is_mean else None

    def engine_needs(self) -> EngineNeeds:
        """What an engine must be able to do for this task: all of its requests are gone through, without a model.

        Raises:
            EngineError: It is judged on an encoder–decoder.
            TaskError: Some request cannot be made.
        """
        if self.settings.model_class != "AutoModelForCausalLM":
            raise EngineError(
                f"`engine: vllm` holds causal language models, and task '{self.name}' has `model_class: "
                f"{self.settings.model_class}`: leave out the engine"
            )
        if "max_length" in (self._task.config.generation_kwargs or {}):
            raise self.error("the task's `max_length` of generation counts a batch's padding: say `max_gen_toks`")
        recorder = NeedsRecorder()
        for name in sorted(set(self._split_names.values())):
            documents = self._read(name)
            requests = [request for own in documents.requests_of(np.arange(len(documents.docs))) for request in own]
            try:
                self._answer(recorder, requests)
            except TaskError as error:
                raise self.error(str(error)) from error
            except Exception as error:  # the harness and the code of its tasks raise all kinds
                raise self.error(f"the harness cannot ask for its split '{name}': {in_words(error)}") from error
        return recorder.needs

    def error(self, message: str) -> TaskError:
        """An error of this task."""
        return TaskError(f"task '{self.name}': {message}")

    @cached_property
    def _task(self) -> Any:
        settings = self.settings
        try:
            task = find_task(settings.task, settings.include_path, settings._directory)
        except TaskError as error:
            raise self.error(str(error)) from error
        # as the harness's own `simple_evaluate` has it: 0 in a task's file stays
        if settings.num_fewshot is not None and task.config.num_fewshot != 0:
            task.set_config("num_fewshot", settings.num_fewshot)
        elif task.config.num_fewshot is None:
            task.set_config("num_fewshot", 0)
        if task.OUTPUT_TYPE == "generate_until":
            task.set_config("generation_kwargs", dict(settings.generation), update=True)
            given = task.config.generation_kwargs
            if given.get("do_sample") or given.get("temperature"):
                raise self.error(
                    f"the harness's task '{settings.task}' draws tokens by chance, so that candidates could not be compared: "
                    "say `generation: {do_sample: false, temperature: 0}`"
                )
        elif settings.generation:
            raise self.error(f"`generation`: the harness's task '{settings.task}' generates nothing")
        return task

    @cached_property
    def _judge(self) -> "Judge":
        try:
            return Judge(self._task, self.settings.metric, self.settings.filter)
        except TaskError as error:
            raise self.error(str(error)) from error

    @cached_property
    def _tokenizer(self) -> Any:
        tokenizer = load_tokenizer(self.head, self.base)
        if self.settings.chat and not tokenizer.chat_template:
            raise self.error(f"`chat`: the tokenizer of {self.head} has no chat template")
        return tokenizer

    @cached_property
    def _split_names(self) -> dict[str, str]:
        """Split → split of the data set."""
        config = self._task.config
        test = config.test_split or config.validation_split
        validation = config.validation_split or config.test_split
        if test is None:
            raise self.error(f"the harness's task '{self.settings.task}' has neither a test nor a validation split")
        return {"validation": validation, "test": test} | {str(key): name for key, name in self.settings.splits.items()}

    def _places(self, split: Split) -> npt.NDArray[np.int64]:
        """Places of a split's documents, in the fixed order that `limit` counts in [N]."""
        names = self._split_names
        order = np.random.default_rng(0).permutation(len(self._read(names[split]).docs))
        if names["validation"] != names["test"]:
            return order
        half = len(order) // 2
        return order[:half] if split == "validation" else order[half:]

    def _read(self, name: str) -> Documents:
        """A split of the data set, read once."""
        if name not in self._documents:
            settings = self.settings
            chat: dict[str, Any] = {
                "system_instruction": settings.system_instruction,
                "apply_chat_template": settings.chat,
                "fewshot_as_multiturn": settings.fewshot_as_multiturn,
                "chat_template": self._chat_template if settings.chat else None,
            }
            try:
                self._documents[name] = read_documents(self._task, name, settings.limit, chat)
            except TaskError as error:
                raise self.error(str(error)) from error
        return self._documents[name]

    def _chat_template(self, history: Sequence[Any], add_generation_prompt: bool = True) -> str:
        """A conversation as the model reads it."""
        from lm_eval.models.huggingface import HFLM

        engine: Any = SimpleNamespace(tokenizer=self._tokenizer, chat_template_args={})
        return str(HFLM.apply_chat_template(engine, history, add_generation_prompt))

    @cached_property
    def _config(self) -> tuple[Any, Any]:
        """The head's configuration and `GenerationConfig` in transformers."""
        model: Any = self.blank_model()[0]
        return model.config, generation_config(self.head, self.base, model)

    def _lm(self, model: nn.Module | TextEngine) -> Any:
        """What the harness calls a model."""
        limit = self.settings.max_length
        if isinstance(model, TextEngine):
            from merging.tasks.harness.engine_lm import EngineLM

            return EngineLM(model, *self._config, self._tokenizer, limit)
        from lm_eval.models.huggingface import HFLM

        size = self.settings.batch_size
        return HFLM(pretrained=model, tokenizer=self._tokenizer, batch_size=size, max_length=limit)

    def _answer(self, model: nn.Module | TextEngine, requests: Sequence[Any]) -> None:
        """Has the harness run the model, and puts answers into the requests.

        Raises:
            TaskError: A log-likelihood is not finite.
        """
        with quiet_harness():
            engine = self._lm(model)
            for kind in sorted({request.request_type for request in requests}):
                repeated = [r for r in requests if r.request_type == kind for _ in range(r.repeats or 1)]
                for request, answer in zip(repeated, getattr(engine, kind)(repeated, disable_tqdm=True), strict=True):
                    request.resps.append(answer)
                    likelihood = answer[0] if isinstance(answer, tuple) else answer
                    if isinstance(likelihood, float) and not math.isfinite(likelihood):
                        raise TaskError("the model gave NaN or Inf for some examples")


class Judge:
    """A metric of the harness.

    Args:
        task: The harness's task.
        metric: Its metric's name; None for the first.
        filter: Its filter's name; None for the first.

    Raises:
        TaskError: It has no such metric or filter.
    """

    def __init__(self, task: Any, metric: str | None, filter: str | None) -> None:
        from lm_eval.api.metrics import mean

        aggregations: dict[str, Callable[[list[Any]], float]] = task.aggregation()
        filters = [entry.name for entry in task._filters]
        self.metric = metric or next(iter(aggregations))
        self.filter = filter or filters[0]
        if self.metric not in aggregations:
            raise TaskError(
                f"the harness's task has no metric '{metric}'. {did_you_mean(self.metric, list(aggregations))}"
            )
        if self.filter not in filters:
            raise TaskError(f"the harness's task has no filter '{filter}'. {did_you_mean(self.filter, filters)}")
        self.sign = 1.0 if task.higher_is_better().get(self.metric, True) else -1.0
        self._task, self._aggregate = task, aggregations[self.metric]
        self.is_mean = self._aggregate is mean

    @property
    def name(self) -> str:
        """What the score is called: a metric that is better when it is less is made negative."""
        return self.metric if self.sign > 0 else f"neg_{self.metric}"

    def judged(self, docs: Sequence[Any], requests_of: Sequence[Sequence[Any]]) -> Predictions:
        """Results of documents whose requests were answered.

        Raises:
            TaskError: The harness gives no such number for a document.
        """
        self._task._instances = [request for requests in requests_of for request in requests]
        with quiet_harness():
            self._task.apply_filters()
            results = [
                self._task.process_results(doc, [request.filtered_resps[self.filter] for request in requests])
                for doc, requests in zip(docs, requests_of, strict=True)
            ]
        if any(self.metric not in result for result in results):
            raise TaskError(f"the harness gives no '{self.metric}' for single documents, only {', '.join(results[0])}")
        items = [result[self.metric] for result in results]
        values = self.sign * np.array([_number(item, self.metric) for item in items], np.float64)
        if self.is_mean:
            return Predictions(values)
        kept = np.empty(len(items), object)
        for place, item in enumerate(items):
            kept[place] = item
        return Predictions(values, payload={"items": kept})

    def score(self, predictions: Predictions) -> Score:
        """The harness's aggregation; the error of one that is no mean by a bootstrap."""
        if self.is_mean:
            return score_of(predictions, self.name)
        items = list(predictions.payload["items"])
        rng = np.random.default_rng(0)
        drawn = [[items[place] for place in rng.integers(len(items), size=len(items))] for _ in range(RESAMPLES)]
        with quiet_harness():
            value, *others = [self.sign * float(self._aggregate(some)) for some in (items, *drawn)]
        if not math.isfinite(value):
            raise TaskError(f"the harness gave {value} as '{self.metric}': a score must be finite")
        return score_of(predictions, self.name, measured=(value, float(np.nanstd(others, ddof=1))))


def _number(item: Any, metric: str) -> float:
    """What one document says of a metric: its own number, or one that goes with it where only all together make it.

    Raises:
        TaskError: It is neither.
    """
    if isinstance(item, tuple | list) and len(item) == 2:
        first, second = item
        if metric in PER_TOKEN:
            return -float(first) / max(1.0, float(second))  # of metrics that are better when they are less
        if metric == "brier_score":
            return 1.0 - float(second[first])
        if metric == "likelihood":
            return float(second[first])
        return float(first == second)
    try:
        number = -float(item) if metric == "perplexity" else float(item)
    except (TypeError, ValueError) as error:
        raise TaskError(
            f"the harness gives {repr(item)[:100]} as '{metric}' of a document: a number is needed"
        ) from error
    if not math.isfinite(number):
        raise TaskError(f"the harness gives {number} as '{metric}' of a document: a number is needed")
    return number


register(HarnessTask, HarnessSettings)
