"""Blends: the file, the sources, the mix, and the rollouts that come out of it."""

import json
import struct
import subprocess
import sys
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastkd.batch import pack
from fastkd.blends import foreign
from fastkd.blends.blend_file import read_blend
from fastkd.blends.indexed import IndexedSource, Pieces
from fastkd.blends.mixing import Mixture, Order
from fastkd.blends.named import NAMED, find_named, variant_of
from fastkd.blends.places import run_length
from fastkd.blends.records import Renderer
from fastkd.blends.sources import open_source
from fastkd.blends.stream import open_blend
from fastkd.blends.text_files import JsonlSource
from fastkd.checks.blends import blend as blend_check
from fastkd.config.blend import Blend
from fastkd.errors import DataError, ModelError, RecipeError

CODES = {np.uint8: 1, np.int32: 4, np.int64: 5, np.uint16: 8}


def config(**keys):
    return Blend(**({"shuffle": True, "seed": 42} | keys))


def write_jsonl(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def write_indexed(prefix, documents, dtype=np.uint16):
    """A .bin/.idx pair as Megatron writes it; a document is a list of sequences."""
    sequences = [sequence for document in documents for sequence in document]
    lengths = np.array([len(sequence) for sequence in sequences], np.int32)
    size = np.dtype(dtype).itemsize
    pointers = np.concatenate([[0], np.cumsum(lengths[:-1].astype(np.int64) * size)])[: len(sequences)]
    marks = np.cumsum([0] + [len(document) for document in documents])
    with open(f"{prefix}.bin", "wb") as file:
        for sequence in sequences:
            file.write(np.array(sequence, dtype).tobytes())
    with open(f"{prefix}.idx", "wb") as file:
        file.write(b"MMIDIDX\x00\x00" + struct.pack("<QBQQ", 1, CODES[dtype], len(sequences), len(marks)))
        for array, kind in ((lengths, np.int32), (pointers, np.int64), (marks, np.int64)):
            file.write(np.asarray(array, kind).tobytes())
    return prefix


@pytest.fixture(scope="module")
def tokenizer(arithmetic):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(arithmetic / "tokenizer")


@pytest.fixture
def three(tmp_path):
    """Three sources of different kinds and sizes, weighted .5, .3 and .2."""
    pytest.importorskip("pyarrow")
    import pyarrow
    import pyarrow.parquet

    write_jsonl(tmp_path / "a.jsonl", [{"text": f"a {i}"} for i in range(700)])
    texts = pyarrow.table({"text": [f"b {i}" for i in range(300)], "other": list(range(300))})
    pyarrow.parquet.write_table(texts, tmp_path / "b.parquet")
    write_indexed(tmp_path / "c_text_document", [[[3, 4, i % 400]] for i in range(50)])
    blend = {"train": [0.5, "a.jsonl", 0.3, "b.parquet", 0.2, "c_text_document"], "valid": [1, "a.jsonl"]}
    path = tmp_path / "blend.json"
    path.write_text(json.dumps(blend))
    return path


def stream_of(path, tokenizer, batch=8, limit=64, split="train", **keys):
    keys = {"check_tokenizer": False} | keys
    return open_blend(config(path=str(path), **keys), tokenizer, batch=batch, limit=limit, split=split)


# --- the mix ------------------------------------------------------------------------------------------------------


def test_a_blend_draws_its_weights(three, tokenizer):
    stream = stream_of(three, tokenizer)
    sources = np.array([source for source, _ in stream.origins(0, 10_000)])
    shares = [float((sources == source).mean()) for source in range(3)]
    assert shares == pytest.approx([0.5, 0.3, 0.2], abs=0.01)
    assert stream.mixture.counts(10_000) == [5000, 3000, 2000]
    names = [stream.names[source] for source, _ in stream.origins(0, 8)]
    assert stream.names == ["a", "b", "c_text_document"] and [one.prompt.source for one in stream.next()] == names


def test_files_of_one_name_are_told_apart(tmp_path, tokenizer):
    for place, folder in enumerate(("x", "y", "z")):
        (tmp_path / folder).mkdir()
        write_jsonl(tmp_path / folder / ("texts.jsonl" if place < 2 else "more.jsonl"), [{"text": "a"}])
    path = tmp_path / "blend.json"
    path.write_text(json.dumps({"train": [1, "x/texts.jsonl", 1, "y/texts.jsonl", 1, "z/more.jsonl"]}))
    assert stream_of(path, tokenizer).names == ["texts_0", "texts_1", "more"]


@given(
    st.lists(st.floats(0, 100, allow_nan=False), min_size=1, max_size=6).filter(lambda weights: sum(weights) > 1e-3),
    st.integers(1, 3000),
)
@settings(max_examples=60, deadline=None)
def test_counts_never_stray_from_the_weights(weights, samples):
    mixture = Mixture(weights)
    mixture.BLOCK = 256
    counts = mixture.counts(samples)
    assert sum(counts) == samples
    for count, share in zip(counts, mixture.shares, strict=True):
        assert -1 - 1e-6 < share * samples - count < max(len(weights) - 1, 1) + 1e-6


def test_the_rule_is_megatrons():
    weights = [0.5, 0.3, 0.2]
    given_so_far, expected = [0, 0, 0], []
    for n in range(200):
        errors = [weight * max(n, 1.0) - count for weight, count in zip(weights, given_so_far, strict=True)]
        chosen = max(range(3), key=lambda source: errors[source])
        expected.append((chosen, given_so_far[chosen]))
        given_so_far[chosen] += 1
    assert Mixture(weights).draws(0, 200) == expected


@given(st.integers(0, 500), st.integers(1, 40))
@settings(max_examples=40, deadline=None)
def test_any_place_can_be_asked_for_alone(start, count):
    mixture = Mixture([3, 2, 1])
    mixture.BLOCK = 16
    whole = Mixture([3, 2, 1])
    whole.BLOCK = 1024
    assert mixture.draws(start, count) == whole.draws(0, start + count)[start:]
    assert mixture.counts(start) == whole.counts(start)


def test_a_source_is_read_once_per_epoch_in_an_order_of_its_own():
    order = Order(50, 42, "train", 0, shuffle=True)
    first, second = ([order.document(turn) for turn in range(epoch * 50, epoch * 50 + 50)] for epoch in (0, 1))
    assert sorted(first) == sorted(second) == list(range(50)) and first != second
    assert [Order(50, 42, "train", 1, shuffle=True).document(turn) for turn in range(50)] != first
    assert [Order(50, 7, "train", 0, shuffle=True).document(turn) for turn in range(50)] != first
    assert [Order(50, 42, "train", 0, shuffle=False).document(turn) for turn in range(51)] == [*range(50), 0]


def test_a_stream_resumes_at_any_sample(three, tokenizer):
    whole = stream_of(three, tokenizer, batch=7)
    batches = [whole.next() for _ in range(60)]
    for done in (1, 23, 59):
        resumed = stream_of(three, tokenizer, batch=7)
        resumed.consumed = done * 7
        assert [resumed.next() for _ in range(60 - done)] == batches[done:]
    skipping = stream_of(three, tokenizer, batch=7)
    skipping.skip(5)
    assert skipping.next() == batches[5] and skipping.consumed == 42
    assert stream_of(three, tokenizer, batch=7, seed=1).next() != batches[0]


def test_epochs_per_source_are_told(three, tokenizer):
    shares = stream_of(three, tokenizer).shares(1000)
    assert [share.samples for share in shares] == [500, 300, 200]
    assert [share.epochs for share in shares] == pytest.approx([500 / 700, 1, 4])
    assert str(shares[2]).split() == ["20.0%", "200", "of", "50", "documents,", "4.00", "epochs:", shares[2].path]


# --- the file -----------------------------------------------------------------------------------------------------


def blend_error(tmp_path, content):
    path = tmp_path / "x.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    with pytest.raises(DataError) as caught:
        read_blend(path)
    assert str(path) in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "not a JSON file"),
        ([1, "a"], "must hold one object"),
        ({"training": [1, "a"]}, "Write train"),
        ({"valid": [1, "a"]}, "nothing to train on"),
        ({"train": []}, "nothing to train on"),
        ({"train": {"a": 1}}, "must be a list"),
        ({"train": [0.5, "a", -0.5, "b"]}, "source 2: the weight is -0.5, must be at least 0"),
        ({"train": [float("nan"), "a"]}, "the weight is nan"),
        ({"train": [float("inf"), "a"]}, "the weight is inf"),
        ({"train": [0, "a", 0, "b"]}, "all weights are 0"),
        ({"train": [0.5, "a", 0.5]}, "lacks its other"),
        ({"train": ["x", "a", 0.5, "b"]}, "'x' is not a number"),
        ({"train": [True, "a"]}, "True is not a number"),
        ({"train": [1, 2]}, "2 is not a source"),
        ({"train": [1, " "]}, "is not a source"),
    ],
)
def test_mistakes_in_a_blend_file(tmp_path, content, message):
    assert message in blend_error(tmp_path, content)


def test_what_megatron_takes_is_taken(tmp_path):
    path = tmp_path / "x.json"
    for content, expected in (
        ({"train": [30, "a", 70, "b"], "valid": None, "test": None}, [("a", 30.0), ("b", 70.0)]),
        ({"train": ["30", "a", "70.5", " b "]}, [("a", 30.0), ("b", 70.5)]),
        ({"train": ["a"]}, [("a", None)]),
        ({"train": ["a", "b"]}, [("a", None), ("b", None)]),
        ({"train": ["a", "b", "c"]}, [("a", None), ("b", None), ("c", None)]),
        ({"train": "0.5 a 0.5 b"}, [("a", 0.5), ("b", 0.5)]),
    ):
        path.write_text(json.dumps(content))
        assert [(entry.path, entry.weight) for entry in read_blend(path).splits["train"]] == expected
    with pytest.raises(DataError, match="cannot be read"):
        read_blend(tmp_path / "none.json")


def test_without_weights_the_sizes_count(tmp_path, tokenizer):
    write_jsonl(tmp_path / "a.jsonl", [{"text": "a"}] * 30)
    write_jsonl(tmp_path / "b.jsonl", [{"text": "b"}] * 10)
    write_jsonl(tmp_path / "c.jsonl", [{"text": "c"}])
    (tmp_path / "x.json").write_text(json.dumps({"train": ["a.jsonl", "b.jsonl"]}))
    assert stream_of(tmp_path / "x.json", tokenizer).mixture.shares == [0.75, 0.25]
    # A weight of 0 leaves its source out, and so does a split that the file lacks.
    (tmp_path / "x.json").write_text(json.dumps({"train": [0, "nowhere", 1, "c.jsonl"]}))
    stream = stream_of(tmp_path / "x.json", tokenizer)
    assert [share.path for share in stream.shares(1)] == [str(tmp_path / "c.jsonl")]
    assert stream_of(tmp_path / "x.json", tokenizer, split="valid") is None


# --- sources ------------------------------------------------------------------------------------------------------


@given(
    st.lists(st.lists(st.lists(st.integers(0, 255), max_size=5), max_size=3), max_size=6), st.sampled_from(list(CODES))
)
@settings(max_examples=60, deadline=None)
def test_an_indexed_dataset_comes_back(tmp_path_factory, documents, dtype):
    prefix = write_indexed(tmp_path_factory.mktemp("x") / "d", documents, dtype)
    source = IndexedSource(prefix)
    assert len(source) == len(documents)
    flat = [[token for sequence in document for token in sequence] for document in documents]
    assert [source.tokens(document) for document in range(len(source))] == flat


@given(st.lists(st.lists(st.integers(0, 255), max_size=12), min_size=1, max_size=5), st.integers(2, 9))
@settings(max_examples=60, deadline=None)
def test_pieces_predict_every_token_once(tmp_path_factory, documents, limit):
    source = IndexedSource(write_indexed(tmp_path_factory.mktemp("x") / "d", [[document] for document in documents]))
    pieces = Pieces(source, limit)
    found = [pieces.tokens(piece) for piece in range(len(pieces))]
    assert all(len(piece) <= limit for piece in found)
    pairs = [pair for document in documents for pair in pairwise(document)]
    assert [pair for piece in found for pair in pairwise(piece)] == pairs
    assert [pieces.where(piece) for piece in range(len(pieces))][-1] == source.where(len(documents) - 1)


def test_a_long_document_becomes_several_samples(tmp_path, tokenizer):
    write_indexed(tmp_path / "d", [[list(range(30))], [[1, 2]]])
    (tmp_path / "x.json").write_text('{"train": [1, "d"]}')
    keys = {"shuffle": False, "limit": 12}
    assert [len(one.response) for one in stream_of(tmp_path / "x.json", tokenizer, **keys).next(2)] == [11, 1]
    split = stream_of(tmp_path / "x.json", tokenizer, overlong="split", **keys)
    assert [len(one.response) for one in split.next(4)] == [11, 11, 7, 1]
    assert split.shares(4)[0].documents == 4


def test_damaged_indexes_are_found_out(tmp_path):
    prefix = write_indexed(tmp_path / "d", [[[1, 2, 3]], [[4, 5], [6]]])
    index, tokens = (tmp_path / "d.idx").read_bytes(), (tmp_path / "d.bin").read_bytes()
    for content, message in (
        (b"", "does not begin"),
        (b"TNTIDX\x00\x00" + index[8:], "does not begin"),
        (index[:9] + struct.pack("<Q", 2) + index[17:], "version 2"),
        (index[:17] + b"\x07" + index[18:], "number format 7"),
        (index[:-1], "its header promises"),
        (index[:-8] + struct.pack("<q", 9), "do not cover"),
        (index[:34] + struct.pack("<i", 999) + index[38:], "points to byte"),
        (index[:34] + struct.pack("<i", -1) + index[38:], "negative length"),
    ):
        (tmp_path / "d.idx").write_bytes(content)
        with pytest.raises(DataError, match=message):
            IndexedSource(prefix)
    (tmp_path / "d.idx").write_bytes(index)
    (tmp_path / "d.bin").write_bytes(tokens[:-2])
    with pytest.raises(DataError, match=r"points to byte 12, but d\.bin has 10"):
        IndexedSource(prefix)
    (tmp_path / "d.bin").unlink()
    with pytest.raises(DataError, match=r"d\.bin is missing"):
        open_source(str(prefix), [], [])


def test_what_is_not_there_or_empty(tmp_path):
    (tmp_path / "empty.jsonl").write_text("\n \n\n")
    write_indexed(tmp_path / "none", [])
    (tmp_path / "x.tar").write_text("x")
    write_jsonl(tmp_path / "y.jsonl", [{"text": "y"}])
    for name, message in (
        ("nowhere.jsonl", "there is no source nowhere.jsonl"),
        (str(tmp_path / "y"), r"Did you mean .*y\.jsonl\?"),
        ("empty.jsonl", r"empty\.jsonl is empty"),
        ("none", "none is empty"),
        ("x.tar", "of an unknown kind"),
    ):
        with pytest.raises(DataError, match=message):
            open_source(name, [tmp_path], [])


def test_lines_keep_their_numbers(tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_bytes(b'{"text": "1"}\n\n  \r\n{"text": "4"}\r\n{"text": \n"6"\n{"text": "7"}')
    source = JsonlSource(path)
    assert len(source) == 5
    assert [source.record(0), source.record(1), source.record(4)] == [{"text": "1"}, {"text": "4"}, {"text": "7"}]
    assert [source.where(document) for document in range(5)] == [f"{path}:{line}" for line in (1, 4, 5, 6, 7)]
    with pytest.raises(DataError, match=r"x\.jsonl:5: is not a line of JSON"):
        source.record(2)
    with pytest.raises(DataError, match=r"x\.jsonl:6: holds a str"):
        source.record(3)
    path.write_bytes(b'{"text": "\xff"}\n')
    with pytest.raises(DataError, match=r"x\.jsonl:1: is not a line of JSON"):
        JsonlSource(path).record(0)


@given(st.lists(st.sampled_from([b"", b" ", b'{"n": 1}', b'{"m": "\\n"}']), max_size=12), st.booleans())
@settings(max_examples=60, deadline=None)
def test_every_line_that_is_not_blank_is_a_document(tmp_path_factory, lines, newline):
    path = tmp_path_factory.mktemp("x") / "x.jsonl"
    path.write_bytes(b"\n".join(lines) + (b"\n" if newline and lines else b""))
    source = JsonlSource(path)
    kept = [(number, line) for number, line in enumerate(lines, 1) if line.strip()]
    assert [source.where(i) for i in range(len(source))] == [f"{path}:{number}" for number, _ in kept]
    assert [source.record(i) for i in range(len(source))] == [json.loads(line) for _, line in kept]


def test_a_malformed_line_stops_a_run_before_it_begins(tmp_path, tokenizer):
    (tmp_path / "a.jsonl").write_text('{"text": "fine"}\n{"text": 7}\n')
    (tmp_path / "x.json").write_text('{"train": [1, "a.jsonl"]}')
    with pytest.raises(DataError, match=r"a\.jsonl:2: text is a int, must be text"):
        stream_of(tmp_path / "x.json", tokenizer)


# --- tokenizers ---------------------------------------------------------------------------------------------------


def test_a_foreign_tokenizer_is_found_out(tmp_path, arithmetic, tokenizer):
    lines = (arithmetic / "train.jsonl").read_text().splitlines()[:60]
    texts = [json.loads(line)["problem"] for line in lines]
    right = [[tokenizer(text).input_ids] for text in texts]
    shuffled = np.random.default_rng(0).permutation(len(tokenizer))
    wrong = [[shuffled[np.array(document[0])].tolist()] for document in right]
    beyond = [*right[:5], [[*right[5][0], len(tokenizer)]]]
    for name, documents in (("right", right), ("wrong", wrong), ("beyond", beyond)):
        write_indexed(tmp_path / name, documents)
        (tmp_path / f"{name}.json").write_text(json.dumps({"train": [1, name]}))
    stream = stream_of(tmp_path / "right.json", tokenizer, check_tokenizer=True)
    assert stream.next(60)
    with pytest.raises(DataError, match="another tokenizer than"):
        stream_of(tmp_path / "wrong.json", tokenizer, check_tokenizer=True)
    assert stream_of(tmp_path / "wrong.json", tokenizer, check_tokenizer=False).next(60)
    with pytest.raises(DataError, match=r"document 5: holds token id 416, and the tokenizer has ids 0 … 415"):
        stream_of(tmp_path / "beyond.json", tokenizer, check_tokenizer=True)
    with pytest.raises(DataError, match="document 5: holds token id 416"):
        stream_of(tmp_path / "beyond.json", tokenizer, check_tokenizer=False).next(6)
    assert foreign.likeness(right[0][0], tokenizer) == 1.0


# --- texts --------------------------------------------------------------------------------------------------------

CONVERSATION = {
    "messages": [{"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "4"}],
    "reasoning": "two and two",
}


def text_of(record, tokenizer, variant="plain", **keys):
    return Renderer(config(**keys), variant, tokenizer)(record, "here")


def test_the_four_variants(tokenizer):
    thought = "<think>\ntwo and two\n</think>\n\n"
    assert text_of(CONVERSATION, tokenizer) == ("", "User: 2+2?\n\nAssistant: 4")
    assert text_of(CONVERSATION, tokenizer, "cot") == ("", f"User: 2+2?\n\nAssistant: {thought}4")
    chat = tokenizer.apply_chat_template(CONVERSATION["messages"], tokenize=False)
    assert text_of(CONVERSATION, tokenizer, "chat") == ("", chat)
    assert text_of(CONVERSATION, tokenizer, "cot_chat").counted == chat.replace("4<", f"{thought}4<")


@pytest.mark.parametrize(
    "record",
    [
        {"input": "2+2?", "output": "4", "reasoning": "two and two"},
        {"input": "2+2?", "output": "<think>\ntwo and two\n</think>\n\n4"},
        {"input": [{"role": "user", "content": "2+2?"}], "output": "<think>two and two</think>4"},
        {
            "conversations": [
                {"from": "human", "value": "2+2?"},
                {"from": "gpt", "value": "<think>two and two</think>4"},
            ]
        },
        CONVERSATION | {"text": None},
    ],
)
@pytest.mark.parametrize("variant", ["plain", "cot", "chat", "cot_chat"])
def test_every_form_of_record_says_the_same(record, variant, tokenizer):
    assert text_of(record, tokenizer, variant) == text_of(CONVERSATION, tokenizer, variant)


@pytest.mark.parametrize("variant", ["plain", "cot", "chat", "cot_chat"])
def test_the_response_alone_can_count(variant, tokenizer):
    whole = text_of(CONVERSATION, tokenizer, variant).counted
    parts = text_of(CONVERSATION, tokenizer, variant, train_on="response")
    assert parts.read + parts.counted == whole
    assert "2+2?" in parts.read and "2+2?" not in parts.counted and "4" in parts.counted


@pytest.mark.parametrize(
    ("record", "keys", "error"),
    [
        ({"txt": "a"}, {}, "Set data.blend.text_key=txt"),
        ({}, {}, "needed: text, or messages"),
        ({"text": None}, {}, "text is empty, must be text"),
        ({"input": 3, "output": "4"}, {}, "input is a int"),
        ({"messages": []}, {}, "does not end with a message of the assistant"),
        ({"messages": [{"role": "user", "content": "a"}]}, {}, "does not end with a message of the assistant"),
        ({"messages": [{"role": "assistant"}]}, {}, "message 1, is no mapping"),
        ({"messages": "a"}, {}, "message 1, is no mapping"),
        ({"text": "a"}, {"train_on": "response"}, "in which no response can be told"),
    ],
)
def test_records_that_cannot_be_used(record, keys, error, tokenizer):
    with pytest.raises((DataError, RecipeError)) as caught:
        text_of(record, tokenizer, **keys)
    assert error in str(caught.value) and "here" in str(caught.value)


def test_a_chat_variant_needs_a_template(tokenizer):
    class Bare:
        chat_template = None

    with pytest.raises(ModelError, match=r"data\.blend\.variant is cot_chat"):
        Renderer(config(), "cot_chat", Bare())


def test_rollouts_carry_the_whole_text(tmp_path, tokenizer):
    write_jsonl(tmp_path / "a.jsonl", [{"text": "12+30: ones 2+0=2"}, {"text": ""}, {"text": "7" * 100}])
    (tmp_path / "x.json").write_text('{"train": [1, "a.jsonl"]}')
    short, empty, long = stream_of(tmp_path / "x.json", tokenizer, shuffle=False, limit=20).next(3)
    ids = [*tokenizer("12+30: ones 2+0=2").input_ids, tokenizer.eos_token_id]
    assert [*short.prompt.tokens, *short.response] == ids and len(short.prompt.tokens) == 1 and short.finished
    # One token predicts nothing: consumed, and without weight.
    assert empty.response == () and empty.prompt.masked and empty.packed_length == 0
    assert len(long.prompt.tokens) + len(long.response) == 20 and not long.finished
    batch = pack([short, long])
    assert batch.labels_A.tolist() == [*ids[1:], *long.response]
    dropped = stream_of(tmp_path / "x.json", tokenizer, shuffle=False, limit=20, overlong="drop").next(3)[2]
    assert dropped.response == () and dropped.prompt.masked
    bare = stream_of(tmp_path / "x.json", tokenizer, shuffle=False, append_eos=False).next(1)[0]
    assert [*bare.prompt.tokens, *bare.response] == ids[:-1]


def test_a_response_trains_as_the_same_rollout_would(tmp_path, tokenizer, arithmetic):
    (tmp_path / "x.json").write_text(json.dumps({"train": [1, str(arithmetic / "train.jsonl")]}))
    keys = {"input_key": "problem", "output_key": "solution", "train_on": "response", "variant": "chat"}
    rollout = stream_of(tmp_path / "x.json", tokenizer, shuffle=False, **keys).next(1)[0]
    row = json.loads((arithmetic / "train.jsonl").read_text().splitlines()[0])
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": row["problem"]}], tokenize=False, add_generation_prompt=True
    )
    assert list(rollout.prompt.tokens) == tokenizer(prompt, add_special_tokens=False).input_ids
    assert tokenizer.decode(rollout.response).startswith(row["solution"])
    assert tokenizer.eos_token_id in rollout.response


# --- names --------------------------------------------------------------------------------------------------------


def test_the_runbooks_names_and_sizes():
    for name, samples, variant in (
        ("nemotron_30pct", 7_500_000, "plain"),
        ("nemotron_30pct_cot_chat", 7_500_000, "cot_chat"),
        ("nemotron_stem_cot_chat", 5_000_000, "cot_chat"),
        ("nemotron_v1_math_30pct_cot_chat", 582_654, "cot_chat"),
        ("nemotron_v1_code_30pct_cot_chat", 540_472, "cot_chat"),
        ("nemotron_v2_30pct", 398_198, "plain"),
        ("nemotron_v2_cot_chat", 398_198, "cot_chat"),
        ("nemotron_v2_stem_30pct_cot_chat", 101_175, "cot_chat"),
        ("nemotron_v2_math_30pct_cot_chat", 68_248, "cot_chat"),
        ("nemotron_v2_code_30pct_cot_chat", 49_875, "cot_chat"),
        ("openscience", 299_800, "plain"),
        ("openscience_chat", 299_800, "chat"),
        ("combined_cot_chat", 8_200_000, "cot_chat"),
        ("combined_v2_cot_chat", 1_024_000, "cot_chat"),
        ("nemotron_v2", 398_198, "plain"),
        ("nemotron_v2_chat", 178_900, "plain"),
    ):
        blend, found, file = find_named(name)
        assert (blend.samples, found) == (samples, variant), name
        assert file.startswith("datablend_") and file.endswith(".json")
    assert find_named("combined_v2_cot_chat")[2] == "datablend_combined_v2_cot_chat.json"
    assert find_named("mine") is None and variant_of("datablend_mine_cot") == "cot"
    assert all(find_named(name)[0] is blend for name, blend in NAMED.items() if name not in ("combined", "combined_v2"))


def test_a_named_blend_is_looked_for_in_its_folder(tmp_path, tokenizer):
    write_jsonl(tmp_path / "a.jsonl", [CONVERSATION])
    (tmp_path / "datablend_openscience_chat.json").write_text('{"train": [1, "a.jsonl"]}')
    stream = open_blend(config(name="openscience_chat", folder=str(tmp_path)), tokenizer, batch=1, limit=99)
    assert stream.renderer.chat and not stream.renderer.cot
    with pytest.raises(DataError, match=r"there is no file .*datablend_openscience\.json"):
        open_blend(config(name="openscience", folder=str(tmp_path)), tokenizer, batch=1, limit=99)
    with pytest.raises(DataError, match="Did you mean openscience"):
        open_blend(config(name="openscienc"), tokenizer, batch=1, limit=99)
    # With a file of one's own the name is a label, and what it ends in the variant.
    path = str(tmp_path / "datablend_openscience_chat.json")
    mine = open_blend(config(name="mine_cot", path=path), tokenizer, batch=1, limit=99)
    assert mine.renderer.chat


def test_skipped_steps():
    assert [config(iterations_to_skip=2).skips(step) for step in (1, 2, 3)] == [True, True, False]
    assert [config(iterations_to_skip=[2, 5]).skips(step) for step in (1, 2, 5)] == [False, True, True]
    assert not config().skips(1)


# --- before a run -------------------------------------------------------------------------------------------------


@pytest.fixture
def loaded(tmp_path, root):
    from fastkd.recipe import load_recipe

    (tmp_path / "x.yaml").write_text(f"defaults: {root / 'recipes' / 'arithmetic_cpu.yaml'}\n")
    return lambda *overrides: load_recipe(tmp_path / "x.yaml", overrides)


def test_check_finds_what_is_missing(loaded, tmp_path):
    write_jsonl(tmp_path / "a.jsonl", [{"text": "a"}])
    (tmp_path / "x.json").write_text('{"train": [1, "a.jsonl", 0, "unused", 2, "b.jsonl"], "valid": [1, "c"]}')
    one = loaded("distillation.num_generations_per_prompt=2")
    found = [str(finding) for finding in blend_check(one, config(path="x.json"))]
    assert len(found) == 3 and "num_generations_per_prompt=2" in found[0]
    assert "no source b.jsonl" in found[1] and "no source c" in found[2]
    (tmp_path / "x.json").write_text('{"train": [1, "a.jsonl"]}')
    found = list(blend_check(loaded(), config(path="x.json")))
    assert len(found) == 1 and "has no valid split" in str(found[0])
    assert list(blend_check(loaded(), config())) == []
    assert "there is no file" in str(next(blend_check(loaded(), config(path="y.json"))))
    assert "Did you mean openscience?" in str(next(blend_check(loaded(), config(name="openscienc"))))


def test_how_long_a_run_is(loaded):
    recipe = loaded().recipe  # batches of 64, at most 250 steps
    assert run_length(recipe, config(path="x", train_samples=1000)) == (15, 960)
    assert run_length(recipe, config(path="x")) == (250, 16_000)
    assert run_length(recipe, config(name="openscience")) == (250, 16_000)
    longer = loaded("distillation.max_num_steps=100000").recipe
    assert run_length(longer, config(name="openscience")) == (4684, 4684 * 64)


def test_checks_stay_light():
    code = "import sys, fastkd.checks.blends; assert not {'torch', 'transformers', 'numpy'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
