"""What statistics cost beside the plain passes that they need: `python benchmarks/statistics_cost.py --help`.

A random model of a kind (by default of MiniLM's shape) and random examples, in turns: forward passes; forward and backward
passes, as many of these as the Fisher has (C of a classifier's C − 1 by sums, one of a language model's drawn tokens); a loop
of single examples; Fisher; Gram. Prints seconds of the processor, ratios, and how much memory each needed beside the model.
"""

import argparse
import resource
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    BertForTokenClassification,
    LlamaConfig,
    LlamaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
    ViTConfig,
    ViTForImageClassification,
)

from merging.statistics import Fisher, Gram, LikelihoodSettings, StatisticSettings
from merging.tasks.task import IGNORED, Batch, Score, Task, TaskSettings

SHAPES = {
    "classification": {"hidden": 384, "layers": 6, "vocabulary": 30522, "length": 64, "batch_size": 16},
    "tagging": {"hidden": 384, "layers": 6, "vocabulary": 30522, "length": 32, "batch_size": 16},
    "images": {"hidden": 384, "layers": 6, "vocabulary": 0, "length": 64, "batch_size": 8},
    "causal_lm": {"hidden": 576, "layers": 6, "vocabulary": 49152, "length": 40, "batch_size": 16},
    "seq2seq": {"hidden": 512, "layers": 4, "vocabulary": 32128, "length": 24, "batch_size": 16},
}
"""Kind → MiniLM's shape, a small ViT's, SmolLM2's with a fifth of its layers, T5 small's with two thirds of them."""


class RandomTask(Task):
    """A random model and random examples, padded or not."""

    kind = "random"

    def __init__(self, options: argparse.Namespace) -> None:
        super().__init__("random", TaskSettings(), "")
        torch.manual_seed(0)
        self.options = options
        self.one_label = options.kind in ("classification", "images")
        self.model: Any = MODELS[options.kind](options).eval().to(options.device)
        self.ids = torch.randint(4, max(5, options.vocabulary), (options.examples, options.length))
        self.labels = torch.randint(4, max(5, options.vocabulary), (options.examples, options.targets))
        side = 16 * round(options.length**0.5)
        self.pixels = torch.randn(options.examples, 3, side, side) if options.kind == "images" else None
        lengths = torch.randint(int(options.length * options.filled), options.length + 1, (options.examples, 1))
        self.mask = (torch.arange(options.length) < lengths).long()
        if options.kind == "causal_lm":
            self.mask = self.mask.flip(1)

    def check(self) -> list[str]:
        """Nothing to check."""
        return []

    def load_model(self) -> nn.Module:
        """The model itself."""
        return self.model

    def size(self, split: str) -> int:
        """Number of examples."""
        return self.options.examples

    def data_fingerprint(self, split: str) -> str:
        """None."""
        return ""

    def evaluate(self, model: nn.Module, split: str, **options: object) -> Score:
        """Nothing to score."""
        return Score(0.0, 0.0, 0, "none")

    def batches(self, split: str, start: int, stop: int, batch_size: int) -> Iterator[Batch]:
        """Examples [start, stop)."""
        for first in range(start, stop, batch_size):
            rows = slice(first, min(stop, first + batch_size))
            ids, mask, labels = self.ids[rows], self.mask[rows], self.labels[rows]
            places, inputs = torch.arange(first, first + len(ids)), {"input_ids": ids, "attention_mask": mask}
            if self.pixels is not None:
                yield Batch({"pixel_values": self.pixels[rows]}, labels[:, 0] * 0, places)
            elif self.options.kind == "seq2seq":
                yield Batch({**inputs, "decoder_input_ids": labels}, labels, places, mask.bool())
            elif self.options.kind == "tagging":
                yield Batch(inputs, torch.where(mask.bool(), 0, IGNORED), places, mask.bool())
            else:
                yield Batch(
                    inputs, labels if self.options.kind == "causal_lm" else labels[:, 0] * 0, places, mask.bool()
                )

    def logits(self, model: nn.Module, batch: Batch) -> Tensor:
        """Logits of classes, or of tokens where there are labels."""
        inputs: dict[str, Any] = dict(batch.inputs)
        if self.options.kind == "causal_lm":
            positions = (inputs["attention_mask"].cumsum(1) - 1).clamp(min=0)
            inputs |= {"position_ids": positions, "logits_to_keep": batch.labels.shape[1], "use_cache": False}
        result: Tensor = model(**inputs).logits
        return result


def _bert(options: argparse.Namespace, head: Any) -> nn.Module:
    config = BertConfig(
        vocab_size=options.vocabulary,
        hidden_size=options.hidden,
        num_hidden_layers=options.layers,
        num_attention_heads=max(1, options.hidden // 32),
        intermediate_size=4 * options.hidden,
        num_labels=options.classes,
    )
    model: nn.Module = head(config)
    return model


def _vit(options: argparse.Namespace) -> nn.Module:
    return ViTForImageClassification(
        ViTConfig(
            hidden_size=options.hidden,
            num_hidden_layers=options.layers,
            num_attention_heads=max(1, options.hidden // 64),
            intermediate_size=4 * options.hidden,
            image_size=16 * round(options.length**0.5),
            num_labels=options.classes,
        )
    )


def _llama(options: argparse.Namespace) -> nn.Module:
    config = LlamaConfig(
        vocab_size=options.vocabulary,
        hidden_size=options.hidden,
        num_hidden_layers=options.layers,
        num_attention_heads=max(3, options.hidden // 64),
        num_key_value_heads=max(1, options.hidden // 192),
        intermediate_size=8 * options.hidden // 3,
        tie_word_embeddings=not options.untied,
    )
    return LlamaForCausalLM(config)


def _t5(options: argparse.Namespace) -> nn.Module:
    config = T5Config(
        vocab_size=options.vocabulary,
        d_model=options.hidden,
        d_ff=4 * options.hidden,
        num_layers=options.layers,
        num_heads=options.hidden // 64,
        tie_word_embeddings=not options.untied,
        use_cache=False,
    )
    return T5ForConditionalGeneration(config)


MODELS: dict[str, Callable[[argparse.Namespace], nn.Module]] = {
    "classification": lambda options: _bert(options, BertForSequenceClassification),
    "tagging": lambda options: _bert(options, BertForTokenClassification),
    "images": _vit,
    "causal_lm": _llama,
    "seq2seq": _t5,
}


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kind", choices=sorted(SHAPES), default="classification")
    for name in ("hidden", "layers", "vocabulary", "length", "batch_size"):
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, help="by default as SHAPES has it")
    parser.add_argument("--classes", type=int, default=3)
    parser.add_argument("--targets", type=int, default=2, help="tokens of a completion")
    parser.add_argument("--examples", type=int, default=64)
    parser.add_argument("--untied", action="store_true", help="an output layer of its own, not the embedding")
    parser.add_argument("--filled", type=float, default=1.0, help="shortest example, as a share of the longest")
    parser.add_argument("--singles", type=int, default=8, help="examples of the loop; its time is scaled up")
    parser.add_argument("--repeats", type=int, default=3, help="the fastest of so many rounds counts")
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    for name, value in SHAPES[options.kind].items():
        if getattr(options, name) is None:
            setattr(options, name, value)
    task = RandomTask(options)
    model = task.model
    parameters = list(model.parameters())
    print(f"{type(model).__name__}, {sum(value.nbytes for value in parameters) / 1e6:.0f} MB")

    def batches(size: int = options.batch_size, examples: int = options.examples) -> Iterator[Batch]:
        return (batch.to(torch.device(options.device)) for batch in task.batches("train", 0, examples, size))

    def forward() -> None:
        with torch.no_grad():
            for batch in batches():
                task.logits(model, batch)

    def backward(size: int = options.batch_size, examples: int = options.examples) -> list[Tensor]:
        sums = [torch.zeros_like(parameter) for parameter in parameters] if size == 1 else []
        for batch in batches(size, examples):
            logs = task.logits(model, batch).log_softmax(-1)
            todo = [logs[..., k].sum() for k in range(options.classes)] if task.one_label else [_observed(logs, batch)]
            for k, objective in enumerate(todo, start=1):
                results = torch.autograd.grad(objective, parameters, retain_graph=k < len(todo), allow_unused=True)
                for total, gradient in zip(sums, results, strict=False):
                    if gradient is not None:
                        total.addcmul_(gradient, gradient)
        return sums

    settings = {"examples": options.examples, "batch_size": options.batch_size}
    fisher = Fisher(LikelihoodSettings(**settings, estimator="exact" if task.one_label else "sampled"))
    gram = Gram(StatisticSettings(**settings))
    passes = f"forward + {options.classes if task.one_label else 1} backward"
    runs: dict[str, Callable[[], object]] = {
        "forward": forward,
        passes: backward,
        "loop of single examples": lambda: backward(1, options.singles),
        "fisher": lambda: fisher.measure(model, task, batches()),
        "gram": lambda: gram.measure(model, task, batches()),
    }
    seconds, peaks = interleaved(runs, options)
    seconds["loop of single examples"] *= options.examples / options.singles
    for name, value in seconds.items():
        print(
            f"{name:28s} {value:8.3f} s {1000 * value / options.examples:9.3f} ms an example, "
            f"peak so far {peaks[name] / 1e3:6.0f} MB"
        )
    print(f"fisher: {seconds['fisher'] / seconds[passes]:.2f} × {passes} passes")
    print(
        f"fisher: {seconds['loop of single examples'] / seconds['fisher']:.2f} × faster than the loop of single examples"
    )
    print(f"gram: {seconds['gram'] / seconds['forward']:.2f} × a forward pass")


def _observed(logs: Tensor, batch: Batch) -> Tensor:
    """The labels' log-likelihood."""
    return logs.gather(-1, batch.labels.clamp(min=0)[..., None])[..., 0][batch.labels != IGNORED].sum()


def interleaved(
    runs: dict[str, Callable[[], object]], options: argparse.Namespace
) -> tuple[dict[str, float], dict[str, int]]:
    """Seconds of each run's fastest round, all runs in turns; and the process's peak memory in KiB after its first.

    Seconds are the processor's, so that its other users do not count; wall on a GPU.
    """
    times: dict[str, list[float]] = {name: [] for name in runs}
    peaks: dict[str, int] = {}
    for _ in range(options.repeats):
        for name, run in runs.items():
            start = now(options)
            run()
            times[name].append(now(options) - start)
            peaks.setdefault(name, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
    return {name: min(results) for name, results in times.items()}, peaks


def now(options: argparse.Namespace) -> float:
    """The clock that `interleaved` reads."""
    if options.device == "cpu":
        return time.process_time()
    torch.cuda.synchronize()
    return time.perf_counter()


if __name__ == "__main__":
    main()
