import itertools
import json
import tracemalloc

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from distiljax.errors import UserError
from distiljax.tasks.features import Pieces, choose_lengths, make_features

WORDS = [
    *(
        "un",
        "unbelievable",
        "unbelievables",
        "believing",
        "on",
        "in",
        "the",
        "river",
        "of",
        "THE",
        "River",
        "rivers,",
    ),
    *(
        "a.b",
        "(at)",
        "x-ray",
        "able",
        "s",
        "ing",
        "日本語",
        "naïve",
        "e\u0301",
        "🎬",
        "\u200b",
        "\x07",
        "[SEP]",
        "[MASK]",
    ),
    *("...", "$5.00", "İ", "ﬁ", "\r\n", "\xa0"),
]
BLANKS = (" ", "  ", "\n", "\r\n", "\t", "\xa0", "")
texts = st.lists(st.tuples(st.sampled_from(WORDS), st.sampled_from(BLANKS)), max_size=30).map(
    lambda parts: "".join(word + blank for word, blank in parts)
)
# A word that is no text, such as a line break, has no piece.
sentences = st.lists(st.sampled_from(WORDS), max_size=40)
few = settings(max_examples=60, deadline=None, derandomize=True)


@pytest.fixture(scope="session")
def bert(tokenizer):
    """The small tokenizer with BERT's special tokens around its texts, for transformers to add."""
    import tokenizers
    from transformers import PreTrainedTokenizerFast

    backend = tokenizers.Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    backend.post_processor = tokenizers.processors.BertProcessing(
        ("[SEP]", tokenizer.sep_token_id), ("[CLS]", tokenizer.cls_token_id)
    )
    names = {f"{name}_token": f"[{name.upper()}]" for name in ("pad", "unk", "cls", "sep", "mask")}
    made = PreTrainedTokenizerFast(tokenizer_object=backend, **names)
    made.model_input_names = ["input_ids", "token_type_ids", "attention_mask"]
    return made


def rows(features):
    return [features.tokens[a:b].tolist() for a, b in itertools.pairwise(features.starts)]


def types(features):
    pairs = zip(features.lengths, features.second, strict=True)
    return [[0] * int(second) + [1] * int(length - second) for length, second in pairs]


@few
@given(st.lists(st.tuples(texts, texts), min_size=1, max_size=4), st.integers(8, 40), st.booleans())
def test_sequences_are_those_of_transformers(bert, examples, max_length, pair):
    first, second = (list(column) for column in zip(*examples, strict=True))
    dataset = {"text": first, "text_pair": second} if pair else {"text": first}
    features = make_features("sequence_classification", dataset, bert, max_length=max_length, labelled=False)
    arguments = (first, second) if pair else (first,)
    wanted = bert(*arguments, truncation="longest_first", max_length=max_length)
    assert rows(features) == wanted["input_ids"]
    assert types(features) == wanted["token_type_ids"]
    whole = bert(*arguments)["input_ids"]
    assert features.truncated == sum(len(row) > max_length for row in whole)
    assert features.examples.tolist() == list(range(len(first)))


@few
@given(st.lists(st.tuples(texts, texts), min_size=1, max_size=4), st.integers(24, 48), st.integers(0, 8))
def test_windows_of_contexts_are_those_of_transformers(bert, examples, max_length, stride):
    questions, contexts = (list(column) for column in zip(*examples, strict=True))
    questions = [" ".join(question.split()[:3]) + " x" for question in questions]
    longest = max(len(row) for row in bert(questions, add_special_tokens=False)["input_ids"])
    assume(max_length - 3 - longest > stride)
    dataset = {"question": [f" {question}" for question in questions], "context": contexts}
    features = make_features(
        "question_answering", dataset, bert, max_length=max_length, stride=stride, labelled=False
    )
    wanted = bert(
        questions,
        contexts,
        truncation="only_second",
        max_length=max_length,
        stride=stride,
        return_overflowing_tokens=True,
        return_offsets_mapping=True,
    )
    assert rows(features) == wanted["input_ids"]
    assert types(features) == wanted["token_type_ids"]
    assert features.examples.tolist() == wanted["overflow_to_sample_mapping"]
    for row, (begin, end) in enumerate(itertools.pairwise(features.starts)):
        sequence = wanted.sequence_ids(row)
        offsets = [
            offset if sequence[place] == 1 else (-1, -1)
            for place, offset in enumerate(wanted["offset_mapping"][row])
        ]
        assert features.offsets[begin:end].tolist() == [list(offset) for offset in offsets]


@few
@given(st.lists(sentences, min_size=1, max_size=4), st.integers(10, 30), st.integers(0, 7))
def test_windows_of_words_are_those_of_transformers(bert, examples, max_length, stride):
    tags = [list(range(len(words))) for words in examples]
    features = make_features(
        "token_classification",
        {"tokens": examples, "tags": tags},
        bert,
        max_length=max_length,
        stride=stride,
    )
    wanted = bert(
        examples,
        is_split_into_words=True,
        truncation=True,
        max_length=max_length,
        stride=stride,
        return_overflowing_tokens=True,
    )
    assert rows(features) == wanted["input_ids"]
    assert features.examples.tolist() == wanted["overflow_to_sample_mapping"]
    assert np.array_equal(features.second, features.lengths)
    scored = []
    for row, (begin, end) in enumerate(itertools.pairwise(features.starts)):
        words = wanted.word_ids(row)
        for place, word in enumerate(features.words[begin:end]):
            assert features.labels[begin + place] == (word if word >= 0 else -100)
            if word >= 0:
                assert words[place] == word
                # Its first piece, also where the window begins in the middle of a word.
                assert place == 1 or words[place - 1] != word
                scored.append((int(features.examples[row]), int(word)))
    # Every word that has a piece is scored exactly once.
    whole = bert(examples, is_split_into_words=True)
    spoken = {
        (number, word)
        for number in range(len(examples))
        for word in whole.word_ids(number)
        if word is not None
    }
    assert sorted(scored) == sorted(spoken)


@few
@given(st.integers(12, 120), st.integers(10, 24), st.integers(0, 7))
def test_a_word_is_scored_where_it_is_farthest_from_a_cut(tokenizer, count, max_length, stride):
    dataset = {"tokens": [["river"] * count]}
    features = make_features(
        "token_classification", dataset, tokenizer, max_length=max_length, stride=stride, labelled=False
    )
    room, step = max_length - 2, max_length - 2 - stride
    begins = [row * step for row in range(len(features))]
    for row, (begin, end) in enumerate(itertools.pairwise(features.starts)):
        for word in features.words[begin:end]:
            if word < 0:
                continue

            def distance(window, word=word):
                left = np.inf if window == 0 else word - begins[window]
                right = np.inf if window == len(begins) - 1 else begins[window] + room - 1 - word
                return min(left, right)

            holding = [w for w, start in enumerate(begins) if start <= word < start + room]
            assert distance(row) == max(map(distance, holding))


def word_windows(count, max_length, stride):
    """First token and size of each window over so many tokens."""
    room = max_length - 2
    windows = 1 + -(-max(count - room, 0) // (room - stride))
    begins = np.arange(windows) * (room - stride)
    return begins, np.minimum(room, count - begins)


@few
@given(st.lists(sentences, min_size=1, max_size=4), st.integers(8, 24), st.data())
def test_the_farthest_window_is_that_of_a_look_at_all_windows(bert, examples, max_length, data):
    stride = data.draw(st.integers(0, max_length - 3))
    features = make_features(
        "token_classification",
        {"tokens": examples},
        bert,
        max_length=max_length,
        stride=stride,
        labelled=False,
    )
    wanted, row = np.full(len(features.tokens), -1), 0
    for words in examples:
        pieces = bert(words, is_split_into_words=True, add_special_tokens=False).word_ids() if words else []
        spoken, first, counts = np.unique(np.array(pieces, int), return_index=True, return_counts=True)
        last = first + counts
        begins, sizes = word_windows(len(pieces), max_length, stride)
        ends = begins + sizes
        distance = np.minimum(first[:, None] - begins, ends - last[:, None])
        held = (first[:, None] >= begins) & (first[:, None] < ends)
        window = np.where(held, distance, np.iinfo(np.int64).min).argmax(1)
        wanted[features.starts[row + window] + 1 + first - begins[window]] = spoken
        row += len(begins)
    assert row == len(features)
    assert features.words.tolist() == wanted.tolist()


def test_a_very_long_text_of_words_takes_memory_in_its_length(tokenizer):
    def peak(count):
        dataset = {"tokens": [["river"] * count]}
        tracemalloc.start()
        features = make_features(
            "token_classification", dataset, pieces, max_length=64, stride=16, labelled=False
        )
        assert np.count_nonzero(features.words >= 0) == count
        size = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return size

    pieces = Pieces(tokenizer)
    peak(100)
    assert peak(40_000) < 6 * peak(10_000)


@few
@given(st.data())
def test_labelled_tokens_are_the_answer(bert, data):
    words = data.draw(st.lists(st.sampled_from(WORDS[:-2]), min_size=1, max_size=60))
    context = " ".join(words)
    first = data.draw(st.integers(0, len(words) - 1))
    last = data.draw(st.integers(first, min(first + 5, len(words) - 1)))
    begin = len(" ".join(words[:first])) + (first > 0)
    answer = " ".join(words[first : last + 1])
    # Characters that have no token cannot be at the border of an answer.
    covered = {
        place
        for start, end in bert(context, return_offsets_mapping=True, add_special_tokens=False)[
            "offset_mapping"
        ]
        for place in range(start, end)
    }
    assume(begin in covered and begin + len(answer) - 1 in covered)
    dataset = {
        "question": ["river at"],
        "context": [context],
        "answers": [{"text": [answer], "answer_start": [begin]}],
    }
    max_length = data.draw(st.integers(16, 64))
    features = make_features("question_answering", dataset, bert, max_length=max_length, stride=4)
    for row, (start, stop) in enumerate(features.labels):
        offsets = features.offsets[features.starts[row] : features.starts[row + 1]]
        inside = offsets[offsets[:, 0] >= 0]
        if start == stop == 0:
            assert not len(inside) or inside[0, 0] > begin or inside[-1, 1] < begin + len(answer)
        else:
            assert context[offsets[start, 0] : offsets[stop, 1]] == answer


def test_an_answer_inside_of_words_takes_their_pieces(bert):
    dataset = {
        "question": ["at"],
        "context": ["the unbelievable river"],
        "answers": [{"text": ["lievable ri"], "answer_start": [8]}],
    }
    features = make_features("question_answering", dataset, bert, max_length=32, stride=8)
    words = bert.convert_ids_to_tokens(features.tokens)
    start, stop = features.labels[0]
    assert words[start : stop + 1] == ["##believ", "##able", "river"]


def test_a_context_shorter_than_a_window_and_one_without_tokens(bert):
    answers = [{"text": ["on"], "answer_start": [4]}, {"text": [], "answer_start": []}]
    dataset = {"question": ["at?", "at?"], "context": ["the on", "\x07"], "answers": answers}
    features = make_features("question_answering", dataset, bert, max_length=32, stride=8)
    assert len(features) == 2
    begin = int(features.second[0])
    assert features.labels.tolist() == [[begin + 1, begin + 1], [0, 0]]
    assert features.lengths[1] == features.second[1] + 1


def test_a_question_that_leaves_no_room_is_named(bert):
    dataset = {"id": ["a", "b"], "question": ["at", "the " * 40], "context": ["on", "on"]}
    with pytest.raises(
        UserError, match="question of example b has 40 tokens, .*rows of 32; expected at most 28"
    ):
        make_features("question_answering", dataset, bert, max_length=32, stride=8, labelled=False)


def test_a_long_question_makes_narrow_windows(bert):
    dataset = {"question": ["the " * 24], "context": ["on " * 20]}
    features = make_features("question_answering", dataset, bert, max_length=32, stride=8, labelled=False)
    # 5 tokens of context in a row, of which 2 come again.
    assert features.lengths.tolist() == [32] * 6
    seen = features.offsets[features.offsets[:, 0] >= 0][:, 0]
    assert set(seen) == set(range(0, 60, 3))


def test_texts_without_tokens_and_very_long_ones(bert):
    long = "unbelievable " * 8000  # 104,000 characters
    dataset = {"text": ["", " \r\n ", long, long], "text_pair": ["", "at", long, ""]}
    features = make_features("sequence_classification", dataset, bert, max_length=128, labelled=False)
    assert features.lengths.tolist() == [3, 4, 128, 128]
    assert features.second.tolist() == [2, 2, 64, 127]
    assert features.truncated == 2
    words = make_features(
        "token_classification", {"tokens": [long.split(), []]}, bert, max_length=64, stride=16, labelled=False
    )
    assert np.count_nonzero(words.words >= 0) == 8000
    assert words.lengths[-1] == 2
    answer = [{"text": ["able"], "answer_start": [13 * 7000 + 8]}]
    answers = make_features(
        "question_answering",
        {"question": ["at"], "context": [long], "answers": answer},
        bert,
        max_length=384,
        stride=128,
    )
    found = [
        answers.offsets[answers.starts[row] + label].tolist()
        for row, label in enumerate(answers.labels)
        if label[0]
    ]
    assert found and all(pair == [[91008, 91012], [91008, 91012]] for pair in found)


def test_what_was_no_utf8_is_replaced(bert):
    dataset = {"text": ["at \udc80 on", "at ? on"]}
    first, second = rows(
        make_features("sequence_classification", dataset, bert, max_length=16, labelled=False)
    )
    assert first == second


def test_special_tokens_are_added_whatever_the_tokenizer_would_add(tokenizer):
    dataset = {"text": ["the river"], "text_pair": ["at"], "label": [1]}
    features = make_features("sequence_classification", dataset, tokenizer, max_length=16)
    words = tokenizer.convert_ids_to_tokens(features.tokens)
    assert words == ["[CLS]", "the", "river", "[SEP]", "at", "[SEP]"]


def test_the_tokenizer_is_left_as_it_was(tokenizer):
    # Whatever the tests before this one have asked of it.
    tokenizer.backend_tokenizer.enable_truncation(8)
    tokenizer.backend_tokenizer.enable_padding(length=16)
    before = tokenizer.backend_tokenizer.to_str()
    for kind, dataset in {
        "sequence_classification": {"text": ["the river " * 50]},
        "token_classification": {"tokens": [["the"] * 50]},
        "question_answering": {"question": ["at"], "context": ["the river " * 50]},
    }.items():
        make_features(kind, dataset, tokenizer, max_length=16, stride=2, labelled=False)
    after = json.loads(tokenizer.backend_tokenizer.to_str())
    assert after == json.loads(before)
    assert after["truncation"] is not None and after["padding"] is not None


def test_pieces_that_are_kept_give_the_same_rows(bert):
    dataset = {"text": ["the river", "unbelievable"], "text_pair": ["at", ""]}
    pieces = Pieces(bert)
    for _ in range(2):
        kept = make_features("sequence_classification", dataset, pieces, max_length=16, labelled=False)
        made = make_features("sequence_classification", dataset, bert, max_length=16, labelled=False)
        assert rows(kept) == rows(made) and kept.pad_token_id == made.pad_token_id
    assert kept.lengths is kept.lengths and kept.lengths.tolist() == [6, 6]


def test_a_batch_of_sequences(tokenizer):
    dataset = {"text": ["the river", "at"], "text_pair": ["on", ""], "label": [1, 0]}
    batch = make_features("sequence_classification", dataset, tokenizer, max_length=16).batch([1, -1, 0], 8)
    the, river, at, on = tokenizer.convert_tokens_to_ids(["the", "river", "at", "on"])
    cls, sep, pad = tokenizer.cls_token_id, tokenizer.sep_token_id, tokenizer.pad_token_id
    wanted = {
        "input_ids": [
            [cls, at, sep, sep, pad, pad, pad, pad],
            [pad] * 8,
            [cls, the, river, sep, on, sep, pad, pad],
        ],
        "attention_mask": [[1] * 4 + [0] * 4, [0] * 8, [1] * 6 + [0] * 2],
        "token_type_ids": [[0, 0, 0, 1, 0, 0, 0, 0], [0] * 8, [0, 0, 0, 0, 1, 1, 0, 0]],
        "row": [1, -1, 0],
        "labels": [0, -100, 1],
    }
    assert {name: array.tolist() for name, array in batch.items()} == wanted
    assert {array.dtype for array in batch.values()} == {np.dtype(np.int32)}


def test_a_batch_of_the_other_kinds(tokenizer):
    numbers = make_features(
        "sequence_classification", {"text": ["at"], "label": [2.5]}, tokenizer, max_length=8, regression=True
    ).batch([0, -1], 8)["labels"]
    assert numbers.dtype == np.float32 and numbers.tolist() == [2.5, 0.0]
    words = {"tokens": [["the", "unbelievable"], ["at"]], "tags": [[3, 4], [5]]}
    batch = make_features("token_classification", words, tokenizer, max_length=8).batch([0, 1, -1], 8)
    assert batch["labels"].tolist() == [
        [-100, 3, 4, -100, -100, -100, -100, -100],
        [-100, 5, *[-100] * 6],
        [-100] * 8,
    ]
    asked = {
        "question": ["at"],
        "context": ["the river"],
        "answers": [{"text": ["river"], "answer_start": [4]}],
    }
    batch = make_features("question_answering", asked, tokenizer, max_length=8).batch([-1, 0], 8)
    assert batch["labels"].tolist() == [[0, 0], [4, 4]]
    unlabelled = make_features(
        "sequence_classification", {"text": ["at"]}, tokenizer, max_length=8, labelled=False
    )
    assert "labels" not in unlabelled.batch([0], 8)


@few
@given(st.lists(texts, min_size=1, max_size=6), st.data())
def test_a_batch_holds_exactly_its_rows(bert, examples, data):
    features = make_features(
        "sequence_classification", {"text": examples}, bert, max_length=48, labelled=False
    )
    picked = data.draw(st.lists(st.integers(-1, len(examples) - 1), max_size=8))
    length = int(features.lengths.max()) + data.draw(st.integers(0, 9))
    batch = features.batch(picked, length)
    assert batch["input_ids"].shape == (len(picked), length)
    for number, row in enumerate(picked):
        ids = rows(features)[row] if row >= 0 else []
        rest = length - len(ids)
        assert batch["input_ids"][number].tolist() == ids + [bert.pad_token_id] * rest
        assert batch["attention_mask"][number].tolist() == [1] * len(ids) + [0] * rest


def test_a_row_too_long_for_its_batch(tokenizer):
    features = make_features(
        "sequence_classification", {"text": ["the river at"]}, tokenizer, max_length=8, labelled=False
    )
    with pytest.raises(ValueError, match="a row of 5 tokens does not fit into a batch of length 4"):
        features.batch([0], 4)


@pytest.mark.parametrize("kind", ["sequence_classification", "token_classification", "question_answering"])
def test_no_examples(tokenizer, kind):
    roles = ("text", "tokens", "question", "context")
    features = make_features(kind, {role: [] for role in roles}, tokenizer, max_length=16, labelled=False)
    assert len(features) == 0 and features.batch([-1], 8)["input_ids"].shape == (1, 8)


def test_settings_that_leave_no_room(tokenizer):
    dataset = {"text": ["at"], "tokens": [["at"]]}
    with pytest.raises(UserError, match="max_length is 4; expected 8 or more"):
        make_features("sequence_classification", dataset, tokenizer, max_length=4, labelled=False)
    with pytest.raises(UserError, match="stride is 14; expected 0 to 13, below the 14 tokens"):
        make_features("token_classification", dataset, tokenizer, max_length=16, stride=14, labelled=False)
    with pytest.raises(UserError, match="kind is 'ner'; expected"):
        make_features("ner", dataset, tokenizer, max_length=16, labelled=False)


@few
@given(st.lists(st.integers(0, 90), min_size=1, max_size=40), st.integers(1, 4))
def test_chosen_lengths_waste_the_least(lengths, count):
    def cost(chosen):
        return sum(min(length for length in chosen if length >= row) for row in lengths)

    chosen = choose_lengths(lengths, count)
    top = max(8, -(-max(lengths) // 8) * 8)
    assert len(chosen) <= count and chosen[-1] == top
    assert list(chosen) == sorted(set(chosen)) and all(length % 8 == 0 for length in chosen)
    best = min(
        cost((*others, top))
        for others in itertools.combinations_with_replacement(range(8, top + 1, 8), count - 1)
    )
    assert cost(chosen) == best


def test_lengths_of_nothing_and_no_lengths():
    assert choose_lengths([], 4) == (8,)
    with pytest.raises(UserError, match="number of row lengths is 0; expected 1 or more"):
        choose_lengths([3], 0)
