"""An engine of texts for tests that need no vLLM."""

import torch

from merging.tasks.language.text_engine import TextEngine


class Transformers(TextEngine):
    """An engine that is a live model, one sequence at a time."""

    def __init__(self, model):
        self._model = model

    @torch.no_grad()
    def load(self, weights):
        parameters = dict(self._model.named_parameters())
        for name, value in weights:
            parameters[name].copy_(value)

    def log_likelihoods(self, sequences):
        return [likelihoods for likelihoods, _ in self.greedy_likelihoods(sequences)]

    @torch.no_grad()
    def greedy_likelihoods(self, sequences):
        answers = []
        for ids in sequences:
            logits = self._model(input_ids=torch.tensor([ids])).logits[0, :-1]
            wanted = torch.tensor(ids[1:])
            likelihoods = logits.log_softmax(-1).gather(-1, wanted[:, None])[:, 0]
            answers.append((likelihoods.double().numpy(), (logits.argmax(-1) == wanted).numpy()))
        return answers

    def complete(self, prompts, most, generation):
        answers = []
        for ids in prompts:
            whole = self._model.generate(
                input_ids=torch.tensor([ids]), generation_config=generation, max_new_tokens=most, do_sample=False
            )
            answers.append(whole[0, len(ids) :].tolist())
        return answers
