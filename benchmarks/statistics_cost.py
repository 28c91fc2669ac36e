"""What statistics cost beside the plain passes that they need: `python benchmarks/statistics_cost.py --help`.

A random BERT in the shape that is asked for (default: MiniLM's), random examples, one after another: forward passes;
forward and C backward passes; a loop of single examples; exact Fisher; Gram. Prints seconds and ratios.
"""

import argparse
import time
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn
from transformers import BertConfig, BertForSequenceClassification

from merging.statistics import Fisher, Gram, LikelihoodSettings, StatisticSettings
from merging.tasks.task import Batch, Score, Task, TaskSettings


class RandomTask(Task):
    """A random model and random examples, padded or not."""

    kind = "random"

    def __init__(self, options: argparse.Namespace) -> None:
        super().__init__("random", TaskSettings(), "")
        torch.manual_seed(0)
        self.options = options
        config = BertConfig(
            vocab_size=options.vocabulary,
            hidden_size=options.hidden,
            num_hidden_layers=options.layers,
            num_attention_heads=max(1, options.hidden // 32),
            intermediate_size=4 * options.hidden,
            num_labels=options.classes,
        )
        self.model = BertForSequenceClassification(config).eval().to(options.device)
        self.ids = torch.randint(4, options.vocabulary, (options.examples, options.length))
        lengths = torch.randint(int(options.length * options.filled), options.length + 1, (options.examples, 1))
        self.mask = (torch.arange(options.length) < lengths).long()

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
            ids, mask = self.ids[first : first + batch_size], self.mask[first : first + batch_size]
            labels = torch.zeros(len(ids), dtype=torch.int64)
            yield Batch(
                {"input_ids": ids, "attention_mask": mask},
                labels,
                torch.arange(first, first + len(ids)),
                mask,
            )

    def logits(self, model: nn.Module, batch: Batch) -> Tensor:
        """Class logits [N, C]."""
        result: Tensor = model(**batch.inputs).logits
        return result


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, default in (
        ("hidden", 384),
        ("layers", 6),
        ("vocabulary", 30522),
        ("classes", 3),
        ("examples", 64),
    ):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--length", type=int, default=64)
    parser.add_argument("--filled", type=float, default=1.0, help="shortest example, as a share of the longest")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--singles", type=int, default=8, help="examples of the loop; its time is scaled up")
    parser.add_argument("--repeats", type=int, default=3, help="the fastest of so many runs counts")
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    task = RandomTask(options)
    model = task.model
    parameters = list(model.parameters())

    def batches(size: int = options.batch_size, examples: int = options.examples) -> Iterator[Batch]:
        return (batch.to(torch.device(options.device)) for batch in task.batches("train", 0, examples, size))

    def forward() -> None:
        with torch.no_grad():
            for batch in batches():
                task.logits(model, batch)

    def backward(size: int = options.batch_size, examples: int = options.examples) -> list[Tensor]:
        sums = [torch.zeros_like(parameter) for parameter in parameters]
        for batch in batches(size, examples):
            logs = task.logits(model, batch).log_softmax(-1)
            for k in range(options.classes):
                weighted = (logs[:, k] * (logs[:, k].detach() / 2).exp()).sum()
                found = torch.autograd.grad(weighted, parameters, retain_graph=k + 1 < options.classes)
                if size == 1:
                    for total, gradient in zip(sums, found, strict=True):
                        total.addcmul_(gradient, gradient)
        return sums

    settings = {"examples": options.examples, "batch_size": options.batch_size}
    fisher = Fisher(LikelihoodSettings(**settings))
    gram = Gram(StatisticSettings(**settings))
    seconds = {
        "forward": best(forward, options),
        f"forward + {options.classes} backward": best(backward, options),
        "loop of single examples": best(lambda: backward(1, options.singles), options)
        * (options.examples / options.singles),
        "exact fisher": best(lambda: fisher.measure(model, task, batches()), options),
        "gram": best(lambda: gram.measure(model, task, batches()), options),
    }
    for name, value in seconds.items():
        print(f"{name:28s} {value:8.3f} s {1000 * value / options.examples:9.3f} ms an example")
    plain, loop = seconds[f"forward + {options.classes} backward"], seconds["loop of single examples"]
    print(f"exact fisher: {seconds['exact fisher'] / plain:.2f} × forward + {options.classes} backward passes")
    print(f"exact fisher: {loop / seconds['exact fisher']:.2f} × faster than the loop of single examples")
    print(f"gram: {seconds['gram'] / seconds['forward']:.2f} × a forward pass")


def best(run: Callable[[], object], options: argparse.Namespace) -> float:
    """Seconds of the fastest of several runs: the processor's, so that its other users do not count; wall on a GPU."""
    times = []
    for _ in range(options.repeats):
        start = now(options)
        run()
        times.append(now(options) - start)
    return min(times)


def now(options: argparse.Namespace) -> float:
    """The clock that `best` reads."""
    if options.device == "cpu":
        return time.process_time()
    torch.cuda.synchronize()
    return time.perf_counter()


if __name__ == "__main__":
    main()
