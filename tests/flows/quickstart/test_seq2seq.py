import pandas as pd
import pytest
import torch
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

from flows.quickstart.seq2seq import (
    Pair,
    corrections,
    inflections,
    parts,
    phrases,
    pronunciations,
    save_blank,
    split,
)


def test_pronunciations():
    raw = "'cause K AH0 Z\nread R EH1 D # past tense\nread(2) R IY1 D\nof AH1 V\n"
    assert pronunciations(raw) == [Pair("read", "say: read", "r eh d")]


def test_corrections_have_one_answer():
    raw = "recieve->receive\nths->the, this,\n2st->2nd\nalot->a lot\nclera->clear, disabled for it\nreceve->receive\n"
    assert corrections(raw) == [
        Pair("receive", "correct: recieve", "receive"),
        Pair("receive", "correct: receve", "receive"),
    ]


def test_inflections():
    raw = (
        "box,noun,boxes/box\nrun,verb,ran,run,running,runs\nwalk,verb,walked,,walking,walks\n"
        "blue,adj,bluer,bluest\nAbbas,noun,Abbas\n"
    )
    assert [(pair.source, pair.target) for pair in inflections(raw)] == [
        ("plural: box", "boxes"),
        ("past: run", "ran"),
        ("participle: run", "run"),
        ("gerund: run", "running"),
        ("present: run", "runs"),
        ("past: walk", "walked"),
        ("gerund: walk", "walking"),
        ("present: walk", "walks"),
    ]


def test_phrases():
    tagged = {
        "ca01": "The/at Old/jj-tl man/nn saw/vbd it/ppo ./.\n``/`` Yes/uh ,/, he/pps said/vbd\n",
        "ca02": "He/pps did/dod not/* go/vb home/nr ./.\n",
    }
    assert phrases(tagged) == [
        Pair("ca01", "tag: the old man saw", "det adj noun verb"),
        Pair("ca02", "tag: he did not go", "pron aux part verb"),
    ]


@pytest.fixture
def pairs() -> list[Pair]:
    """30 groups of four, of which one source is in all."""
    return [Pair(str(n), f"do: {n * (k > 0)} {k}", f"{n} {k}") for n in range(30) for k in range(4)]


def test_splits_share_no_group_and_no_source(pairs):
    result = split(pairs, {"train": 60, "validation": 6, "test": 12})
    assert [len(part) for part in result.values()] == [60, 6, 12]
    groups = [{pair.group for pair in part} for part in result.values()]
    assert len(set.union(*groups)) == sum(map(len, groups))
    sources = [pair.source for part in result.values() for pair in part]
    assert len(set(sources)) == len(sources)


def test_base_and_members_have_examples_of_their_own(pairs):
    frames, base = parts(pairs, {"train": 20, "validation": 6, "test": 12}, 30)
    assert [len(frame) for frame in frames.values()] == [20, 6, 12]
    assert len(base) == 30
    assert pd.concat([base, *frames.values()])["source"].is_unique


def test_blank_base(tmp_path):
    config = {"vocab_size": 384, "d_model": 16, "d_ff": 24, "d_kv": 8, "num_layers": 1, "num_heads": 2}
    before = torch.get_rng_state()
    for name in ("one", "two"):
        save_blank(tmp_path / name, {**config, "decoder_start_token_id": 0})
    assert torch.get_rng_state().equal(before)
    one, two = (AutoModelForSeq2SeqLM.from_pretrained(tmp_path / name).state_dict() for name in ("one", "two"))
    assert all(value.equal(two[name]) for name, value in one.items())
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "one")
    assert tokenizer("ab")["input_ids"] == [97 + 3, 98 + 3, 1]
    assert tokenizer.decode([100, 101, 1], skip_special_tokens=True) == "ab"
