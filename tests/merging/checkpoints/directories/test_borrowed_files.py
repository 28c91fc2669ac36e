"""Whose tokenizer, chat template and generation settings a merge has, as transformers reads them from its directory."""

import json

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import AutoTokenizer, GenerationConfig, PreTrainedTokenizerFast

from merging.checkpoints.checkpoint import Checkpoint
from merging.checkpoints.directories.borrowed_files import borrowed_files, notes_on_files
from merging.checkpoints.directories.writer import lay_out, new_checkpoint
from merging.errors import PoolError

OUTLINES = [("x", torch.float32, (1,))]
WORDS = {"[UNK]": 0, "a": 1, "b": 2}


@pytest.fixture
def make(tmp_path):
    def write(name, words=WORDS, template=None, kept="jinja", eos=None, config=None):
        path = tmp_path / name
        path.mkdir()
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel(words, "[UNK]")), unk_token="[UNK]")
        tokenizer.chat_template = template
        tokenizer.save_pretrained(path)
        if kept == "config" and template is not None:
            (path / "chat_template.jinja").unlink()
            place = path / "tokenizer_config.json"
            place.write_text(json.dumps(json.loads(place.read_text()) | {"chat_template": template}))
        if eos is not None:
            GenerationConfig(eos_token_id=eos).save_pretrained(path)
        settings = {"model_type": "llama", "vocab_size": 4} | (config or {})
        (path / "config.json").write_text(json.dumps(settings))
        return Checkpoint(str(path), settings, {}, {})

    return write


def written(base, tmp_path, **whose):
    out = tmp_path / "out"
    new = new_checkpoint(str(out), lay_out(OUTLINES), like=base, extra=borrowed_files(base, **whose))
    with new as files, files.open(files.shards[0]) as put:
        put(files.shards[0].tensors["x"].start, torch.zeros(1))
    return AutoTokenizer.from_pretrained(out)


@pytest.mark.parametrize("kept", ["jinja", "config"])
@pytest.mark.parametrize("base_kept", ["jinja", "config", None])
def test_the_chat_template_is_a_member_s(make, tmp_path, kept, base_kept):
    base = make("base", template=base_kept and "base {{ messages }}", kept=base_kept)
    member = make("member", {"[UNK]": 0, "b": 1, "a": 2}, template="member {{ messages }}", kept=kept)
    tokenizer = written(base, tmp_path, chat_template=member)
    assert tokenizer.chat_template == "member {{ messages }}"
    assert tokenizer.get_vocab() == WORDS, "all else is the base's"


def test_the_tokenizer_is_a_member_s_with_its_template_unless_another_is_named(make, tmp_path):
    base = make("base", template="base {{ messages }}")
    member = make("member", {**WORDS, "c": 3}, template="member {{ messages }}", kept="config")
    tokenizer = written(base, tmp_path, tokenizer=member)
    assert (tokenizer.get_vocab(), tokenizer.chat_template) == ({**WORDS, "c": 3}, "member {{ messages }}")
    tokenizer = written(base, tmp_path, tokenizer=member, chat_template=base)
    assert (tokenizer.get_vocab(), tokenizer.chat_template) == ({**WORDS, "c": 3}, "base {{ messages }}")


def test_a_tokenizer_that_means_other_rows_is_refused(make):
    base = make("base")
    with pytest.raises(PoolError, match="token 'b' has number 1, and 2 in the base"):
        borrowed_files(base, tokenizer=make("swapped", {"[UNK]": 0, "b": 1, "a": 2}))
    with pytest.raises(PoolError, match="token 'd' of .* has number 4, and the base's embeddings have 4 rows"):
        borrowed_files(base, tokenizer=make("longer", {**WORDS, "c": 3, "d": 4}))


def test_generation_settings_are_a_member_s(make, tmp_path):
    base, member = make("base", eos=1), make("member", eos=2)
    written(base, tmp_path)
    assert GenerationConfig.from_pretrained(tmp_path / "out").eos_token_id == 1
    written(base, tmp_path, generation_config=member)
    assert GenerationConfig.from_pretrained(tmp_path / "out").eos_token_id == 2
    with pytest.raises(PoolError, match="holds no generation_config.json"):
        borrowed_files(base, generation_config=make("bare"))
    with pytest.raises(PoolError, match="holds no chat template"):
        borrowed_files(base, chat_template=member)


def test_notes_say_where_members_differ(make):
    base = make("base", template="base", eos=1, config={"eos_token_id": 1})
    same = make("same", template="base", kept="config", eos=1, config={"eos_token_id": 1})
    other = make("other", template="other", eos=2, config={"eos_token_id": 3})
    assert notes_on_files(base, {"same": same}) == []
    chat, config, generation = notes_on_files(base, {"same": same, "other": other})
    assert chat.startswith("chat templates of other differ from the base's")
    assert config.startswith("eos_token_id in config.json: other has 3, the base 1")
    assert generation.startswith("eos_token_id in generation_config.json: other has 2, the base 1")
    (chat,) = notes_on_files(make("bare", eos=1, config={"eos_token_id": 1}), {"same": same})
    assert "are there, and the base has none" in chat
