"""The harness on an engine beside the harness on a model of transformers."""

import numpy as np
import pytest

from merging.errors import EngineError, EngineLostError, TaskError
from merging.evaluation.engines.engine_models import longest_sequence
from tests.live_engine import Transformers

pytest.importorskip("lm_eval", reason="lm-evaluation-harness is not installed (mergequest[lm-eval])")

LONG = {"generation_kwargs": {"until": ["cat", "dog ran"], "max_gen_toks": 40, "do_sample": False}}
SPECIAL = {"generation_kwargs": {"until": ["<user>", "<system>"], "max_gen_toks": 40}}


class Counted(Transformers):
    """Notes down the longest sequence, and how many tokens were generated."""

    def __init__(self, model):
        super().__init__(model)
        self.longest, self.generated = 0, 0

    def greedy_likelihoods(self, sequences):
        self.longest = max([self.longest, *map(len, sequences)])
        return super().greedy_likelihoods(sequences)

    def complete(self, prompts, most, generation):
        answers = super().complete(prompts, most, generation)
        self.longest = max([self.longest, *(len(ids) + most for ids in prompts)])
        self.generated += sum(map(len, answers))
        return answers


@pytest.mark.parametrize(
    ("kind", "written", "settings"),
    [
        ("quiz", {}, {"metric": "brier_score"}),
        ("quiz", {}, {"metric": "acc", "chat": True, "num_fewshot": 2, "system_instruction": "answer"}),
        ("quiz", {}, {"metric": "brier_score", "num_fewshot": 3, "max_length": 12}),
        ("quiz", {"doc_to_text": ""}, {"metric": "brier_score"}),
        ("cloze", {}, {"metric": "perplexity"}),
        ("cloze", {"doc_to_target": " {{text.split()[0]}}"}, {"metric": "acc"}),
        ("prose", {}, {}),
        ("prose", {"test": 3, "doc_to_target": "{{text}} {{text}}"}, {"max_length": 5}),
        ("sums", {}, {"metric": "bleu", "num_fewshot": 1}),
        ("sums", {}, {"metric": "bleu", "max_length": 9}),
        ("sums", LONG, {"metric": "bleu"}),
        ("sums", SPECIAL, {"metric": "bleu", "batch_size": 1}),
        ("sums", {}, {"metric": "bleu", "generation": {"max_gen_toks": 20, "repetition_penalty": 1.3}}),
    ],
)
def test_an_engine_gets_the_requests_that_a_model_gets(make, kind, written, settings):
    task = make(kind, {"validation": 4, **written}, **settings)
    model = task.load_model()
    engine = Counted(model)
    for split in ("validation", "test"):
        places = np.arange(task.size(split))
        expected, answered = (task.predict(judge, split, places) for judge in (model, engine))
        assert answered.values == pytest.approx(expected.values, rel=1e-5, abs=1e-6)
        assert task.score(answered).value == pytest.approx(task.score(expected).value, rel=1e-5, abs=1e-6)
    assert engine.longest <= longest_sequence([task]) <= engine.longest + 40


def test_an_engine_stops_soon_after_a_stop_text(make):
    """And what stands behind it does not count, though it has been generated."""
    task = make("sums", {"generation_kwargs": {"until": ["the"], "max_gen_toks": 100}}, metric="bleu")
    model = task.load_model()
    engine = Counted(model)
    model.lm_head.weight.data[task._tokenizer.convert_tokens_to_ids("the")] *= 5
    model.config.use_cache = True
    places = np.arange(task.size("test"))
    assert task.predict(engine, "test", places).values == pytest.approx(task.predict(model, "test", places).values)
    assert engine.generated < 100 * len(places)


@pytest.mark.parametrize(
    ("kind", "written", "settings", "error", "message"),
    [
        ("sums", {}, {"generation": {"num_beams": 3}}, EngineError, "num_beams: 3"),
        ("sums", {}, {"generation": {"no_repeat_ngram_size": 2}}, EngineError, "no_repeat_ngram_size: 2"),
        ("sums", {}, {"generation": {"sead": 1}}, TaskError, "has no `sead`"),
        ("sums", {}, {"generation": {"max_length": 30}}, TaskError, "say `max_gen_toks`"),
        ("sums", {"doc_to_text": ""}, {}, TaskError, "a prompt has no token"),
        ("sums", {}, {"max_length": 4}, TaskError, "max tokens to generate"),
        ("quiz", {}, {"max_length": 1}, ValueError, "max_length"),
        ("cloze", {"doc_to_target": " {{text}} {{text}}"}, {"max_length": 2}, TaskError, "a continuation has"),
        ("quiz", {}, {"model_class": "AutoModelForSeq2SeqLM"}, EngineError, "model_class: AutoModelForSeq2SeqLM"),
    ],
)
def test_what_no_engine_answers_is_refused_before_it_starts(make, kind, written, settings, error, message):
    with pytest.raises(error, match=message):
        longest_sequence([make(kind, written, **settings)])


def test_an_engine_that_dies_is_no_error_of_the_task(make):
    class Dead(Transformers):
        def greedy_likelihoods(self, sequences):
            raise EngineLostError("the engine has died")

    task = make("quiz")
    with pytest.raises(EngineLostError):
        task.evaluate(Dead(None), "test")
    model = task.load_model()
    model.model.norm.weight.data.fill_(float("nan"))
    with pytest.raises(TaskError, match="NaN or Inf"):
        task.evaluate(Transformers(model), "test")
