"""Members with other tokens than the base: rows are matched by token, added ones dropped or kept."""

import copy
import json

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer

from merging.checkpoints.checkpoint import SINGLE
from merging.checkpoints.pool import Pool
from merging.errors import PoolError
from merging.mergers.disk import merge_to_disk
from merging.mergers.material import Material
from merging.mergers.resident import ResidentMerger
from merging.methods import METHODS
from merging.recipe import Recipe

EMBED, HEAD = "model.embed_tokens.weight", "lm_head.weight"
SPECIALS = ("<pad>", "<s>", "</s>", "<unk>")
WORDS = [*SPECIALS, *(f"w{number}" for number in range(12))]


def llama(*, tie=False, rows=16):
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24}
    config = transformers.LlamaConfig(vocab_size=rows, initializer_range=0.2, tie_word_embeddings=tie, **sizes)
    return transformers.LlamaForCausalLM(config).eval()


def moved(model, seed, rows=None):
    torch.manual_seed(seed)
    new = copy.deepcopy(model)
    if rows is not None:
        new.resize_token_embeddings(rows, mean_resizing=False)
    with torch.no_grad():
        for value in new.parameters():
            value.add_(0.05 * torch.randn_like(value))
    return new


def save(model, path, words=WORDS, added=()):
    """Writes a model with a tokenizer of these words, to which tokens are added."""
    model.save_pretrained(path)
    if words is not None:
        made = Tokenizer(models.WordLevel({word: row for row, word in enumerate(words)}, unk_token="<unk>"))
        made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
        tokenizer = transformers.PreTrainedTokenizerFast(
            tokenizer_object=made, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
        )
        tokenizer.add_tokens(list(added))
        tokenizer.save_pretrained(path)
    return load_file(path / SINGLE)


def merge(tmp_path, vocabulary="base", method="average", members="ab", **factors):
    pool = Pool.open(str(tmp_path / "base"), {name: str(tmp_path / name) for name in members}, (), vocabulary)
    recipe = METHODS[method].complete(Recipe(method, factors or dict.fromkeys(members, 1.0)))
    merge_to_disk(Material(pool), recipe, str(tmp_path / "out"), max_bytes=10_000)
    written = load_file(tmp_path / "out" / SINGLE)
    out = {name: torch.empty(info.shape) for name, info in pool.weights.items()}
    ResidentMerger(Material(pool), out).merge(recipe)
    for name, value in out.items():
        torch.testing.assert_close(written[name], value, rtol=1e-6, atol=1e-6)
    return pool, written


@pytest.mark.parametrize("tokenizers", [True, False])
def test_the_bases_vocabulary_drops_what_members_added(tmp_path, tokenizers):
    base = llama()
    save(base, tmp_path / "base", WORDS if tokenizers else None)
    a = save(moved(base, 1, 18), tmp_path / "a", WORDS if tokenizers else None, ["<x>", "<y>"])
    b = save(moved(base, 2), tmp_path / "b", WORDS if tokenizers else None)
    pool, written = merge(tmp_path)
    for name in (EMBED, HEAD):
        torch.testing.assert_close(written[name], (a[name][:16] + b[name]) / 2)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["vocab_size"] == 16
    expected = "<x>" if tokenizers else "rows 16 to 17"
    assert any(expected in note for note in pool.notes)


def test_tokens_in_rows_that_the_base_has_without_a_name(tmp_path):
    base = llama(rows=18)
    save(base, tmp_path / "base")
    a = save(moved(base, 1), tmp_path / "a", added=["<x>"])
    b = save(moved(base, 2), tmp_path / "b")
    pool, written = merge(tmp_path)
    torch.testing.assert_close(written[EMBED], (a[EMBED] + b[EMBED]) / 2)
    assert any("a: 1 tokens that the base lacks are not in the merge" in note for note in pool.notes)


def test_a_head_alone_with_more_rows(tmp_path):
    base = llama()
    save(base, tmp_path / "base", None)
    a, b = (save(moved(base, seed), tmp_path / name, None) for seed, name in ((1, "a"), (2, "b")))
    longer = torch.cat([a[HEAD], torch.zeros(2, 16)])
    save_file(a | {HEAD: longer}, tmp_path / "a" / SINGLE, {"format": "pt"})
    pool, written = merge(tmp_path)
    torch.testing.assert_close(written[HEAD], (a[HEAD] + b[HEAD]) / 2)
    assert any(f"rows 16 to 17 of '{HEAD}'" in note for note in pool.notes)


@pytest.mark.parametrize("tie", [True, False])
@pytest.mark.parametrize("method", ["average", "task_arithmetic"])
def test_the_union_keeps_added_tokens(tmp_path, tie, method):
    """One token of one member, one of both in other rows, one of the other."""
    base = llama(tie=tie)
    origin = save(base, tmp_path / "base")
    a = save(moved(base, 1, 18), tmp_path / "a", added=["<x>", "<both>"])
    b = save(moved(base, 2, 18), tmp_path / "b", added=["<both>", "<y>"])
    factors = {"a": 0.5, "b": 0.5}
    pool, written = merge(tmp_path, "union", method, **factors)
    for name in (EMBED,) if tie else (EMBED, HEAD):
        common = (
            (a[name][:16] + b[name][:16]) / 2
            if method == "average"
            else origin[name] + 0.5 * (a[name][:16] - origin[name]) + 0.5 * (b[name][:16] - origin[name])
        )
        torch.testing.assert_close(written[name][:16], common)
        added = torch.stack([a[name][16], (a[name][17] + b[name][16]) / 2, b[name][17]])
        torch.testing.assert_close(written[name][16:], added)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer.convert_tokens_to_ids(["w3", "<x>", "<both>", "<y>"]) == [7, 16, 17, 18]
    assert tokenizer("w1 <y>")["input_ids"][-2:] == [5, 18]
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert model.config.vocab_size == 19 == len(model.model.embed_tokens.weight)
    assert len(model(torch.tensor([[16, 17, 18]])).logits[0, 0]) == 19
    assert any("3 tokens are added" in note for note in pool.notes)


def test_padded_rows_are_filled_first(tmp_path):
    base = llama(rows=20)
    save(base, tmp_path / "base")
    a = save(moved(base, 1), tmp_path / "a", added=["<x>"])
    b = save(moved(base, 2), tmp_path / "b")
    _, written = merge(tmp_path, "union")
    torch.testing.assert_close(written[EMBED][16], a[EMBED][16])
    torch.testing.assert_close(written[EMBED][17:], (a[EMBED][17:] + b[EMBED][17:]) / 2)
    assert len(written[EMBED]) == 20


def test_tokens_in_another_order_are_matched(tmp_path):
    base = llama()
    save(base, tmp_path / "base")
    swapped = [WORDS[0], WORDS[2], WORDS[1], *WORDS[3:]]
    a, b = save(moved(base, 1), tmp_path / "a", swapped), save(moved(base, 2), tmp_path / "b")
    order = [0, 2, 1, *range(3, 16)]
    pool, written = merge(tmp_path)
    for name in (EMBED, HEAD):
        torch.testing.assert_close(written[name], (a[name][order] + b[name]) / 2)
    assert any("matched by token" in note for note in pool.notes)


def test_a_token_that_was_renamed_keeps_its_place(tmp_path):
    base = llama()
    save(base, tmp_path / "base")
    a, b = save(moved(base, 1), tmp_path / "a", [*WORDS[:-1], "<tool>"]), save(moved(base, 2), tmp_path / "b")
    _, written = merge(tmp_path)
    torch.testing.assert_close(written[EMBED], (a[EMBED] + b[EMBED]) / 2)
    _, grown = merge(tmp_path, "union")
    torch.testing.assert_close(grown[EMBED][16], a[EMBED][15])


def test_a_smaller_member_has_the_bases_rows(tmp_path):
    base = llama()
    origin = save(base, tmp_path / "base")
    a, b = save(moved(base, 1, 14), tmp_path / "a", WORDS[:14]), save(moved(base, 2), tmp_path / "b")
    _, written = merge(tmp_path)
    torch.testing.assert_close(written[EMBED][:14], (a[EMBED] + b[EMBED][:14]) / 2)
    torch.testing.assert_close(written[EMBED][14:], (origin[EMBED][14:] + b[EMBED][14:]) / 2)


def test_what_cannot_be_joined_is_refused(tmp_path):
    base = llama()
    save(base, tmp_path / "base", None)
    save(moved(base, 1, 18), tmp_path / "a", None)
    save(moved(base, 2), tmp_path / "b", None)
    with pytest.raises(PoolError, match=r"`vocabulary: union` adds tokens by name.*tokenizer.json"):
        merge(tmp_path, "union")
    for name, tokens in (("base", {"a": 0, "b": 1}), ("a", {"a": 0, "b": 1, "c": 2})):
        Tokenizer(models.BPE(tokens, [])).save(str(tmp_path / name / "tokenizer.json"))
    with pytest.raises(PoolError, match=r"a's token 'c' is part of its BPE model"):
        merge(tmp_path, "union")


@pytest.mark.parametrize("vocabulary", ["base", "union"])
def test_every_tensor_that_counts_tokens(tmp_path, vocabulary):
    """BART has a row for each token in its shared embedding, and a column in a buffer."""
    torch.manual_seed(0)
    sizes = {"encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2, "decoder_attention_heads": 2}
    config = transformers.BartConfig(
        vocab_size=16, d_model=16, encoder_ffn_dim=16, decoder_ffn_dim=16, max_position_embeddings=16, **sizes
    )
    base = transformers.BartForConditionalGeneration(config).eval()
    save(base, tmp_path / "base")
    a = save(moved(base, 1, 18), tmp_path / "a", added=["<x>", "<y>"])
    b = save(moved(base, 2), tmp_path / "b")
    merge(tmp_path, vocabulary)
    result = transformers.BartForConditionalGeneration.from_pretrained(tmp_path / "out")
    rows = 16 if vocabulary == "base" else 18
    shared = result.model.shared.weight
    assert (len(shared), result.final_logits_bias.shape[1], result.config.vocab_size) == (rows, rows, rows)
    name = "model.shared.weight"
    torch.testing.assert_close(shared[:16], (a[name][:16] + b[name]) / 2)
    torch.testing.assert_close(shared[16:], a[name][16:rows])
    ids = torch.tensor([[rows - 1, 3]])
    assert result(input_ids=ids, decoder_input_ids=ids).logits.shape[-1] == rows
