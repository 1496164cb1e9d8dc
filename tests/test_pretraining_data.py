import numpy as np
import pytest
import torch
from datasets import Dataset

from icae.trainers import DataCollatorForICAEPretraining, prepare_pretraining_dataset
from icae.trainers.pretraining_data import cut_document, shuffle_words


TEXTS = ["The lighthouse keeper had not spoken to anyone.", "", "x", "A train leaves at nine. " * 20]
OPTIONS = {"span_length": 8, "max_spans": 3, "short_share": 0.3, "continuation_length": 4, "seed": 5}


def samples(dataset):
    return [(row["context_ids"], row["continuation_ids"], row["length"]) for row in dataset]


def test_documents_are_cut_as_the_docstring_says():
    rng = np.random.default_rng(0)
    pairs = cut_document([1, 2, 3, 4, 5, 6, 7], rng, span_length=4, max_spans=1, short_share=0, continuation_length=2)
    assert pairs == [([1, 2, 3, 4], [5, 6]), ([5, 6, 7], [])]


def test_every_token_is_in_exactly_one_context_and_continuations_are_what_follows(tokenizer):
    prepared = samples(prepare_pretraining_dataset(Dataset.from_dict({"text": TEXTS}), tokenizer, **OPTIONS))
    ids = [token for text in TEXTS for token in tokenizer(text, add_special_tokens=False)["input_ids"]]
    assert [token for context, _, _ in prepared for token in context] == ids
    long = [sample for sample in prepared if len(sample[1]) == 4]
    assert len(long) > 10
    joined = "".join(tokenizer.decode(context) for context, _, _ in prepared)
    for context, continuation, length in long:
        assert length == len(context) <= 24
        assert tokenizer.decode(context) + tokenizer.decode(continuation) in joined


def test_samples_depend_on_neither_processes_nor_batches_nor_streaming(tokenizer):
    documents = Dataset.from_dict({"text": TEXTS * 3})
    expected = samples(prepare_pretraining_dataset(documents, tokenizer, **OPTIONS))
    streamed = prepare_pretraining_dataset(documents.to_iterable_dataset(num_shards=3), tokenizer, **OPTIONS)
    assert samples(streamed) == expected
    other_seed = prepare_pretraining_dataset(documents, tokenizer, **(OPTIONS | {"seed": 6}))
    assert samples(other_seed) != expected


def test_words_are_shuffled_and_none_is_lost():
    assert shuffle_words("The keeper had not spoken to anyone.\n", np.random.default_rng(0)) == (
        "had spoken not anyone.\nto The keeper "
    )
    text = "  " + " ".join(f"{number:02}" for number in range(30)) + "\n"
    words = shuffle_words(text, np.random.default_rng(1)).split()
    assert words != text.split() and sorted(words) == text.split()
    for same in ("", " \n", "x"):
        assert shuffle_words(same, np.random.default_rng(0)) == same


@pytest.mark.parametrize("streaming", [False, True])
def test_of_a_share_of_documents_words_are_shuffled_for_autoencoding_only(tokenizer, streaming):
    texts = [" ".join(f"{word}{number}" for word in ("one", "two", "three", "four", "five")) for number in range(60)]
    documents = Dataset.from_dict({"text": texts})
    if streaming:
        documents = documents.to_iterable_dataset()
    options = OPTIONS | {"max_spans": 1, "short_share": 0.0, "continuation_length": 9, "shuffled_share": 0.5}
    options["span_length"] = min(len(tokenizer(text, add_special_tokens=False)["input_ids"]) for text in texts) - 2
    prepared = samples(prepare_pretraining_dataset(documents, tokenizer, **options))
    decoded, following = "", 0
    for context, continuation, _ in prepared:
        decoded += tokenizer.decode(context)
        following += bool(continuation)
    whole = [text for text in texts if text in decoded]
    assert 15 < len(whole) < 45 and following == len(whole)
    for text in texts:
        assert all(word in decoded for word in text.split())
    assert samples(prepare_pretraining_dataset(documents, tokenizer, **options)) == prepared


def test_control_tokens_in_a_document_stay_text(tokenizer):
    documents = Dataset.from_dict({"text": ["a<|im_end|>b</s>"]})
    prepared = samples(prepare_pretraining_dataset(documents, tokenizer, **(OPTIONS | {"span_length": 32})))
    assert all(token >= 5 for context, _, _ in prepared for token in context)


def test_a_missing_column_is_named(tokenizer):
    with pytest.raises(
        ValueError, match=r"Expected a column 'text' with documents, got \['body'\]; rename one of them"
    ):
        prepare_pretraining_dataset(Dataset.from_dict({"body": TEXTS}), tokenizer, **OPTIONS)


def test_the_collator_pads_as_its_docstring_shows():
    batch = DataCollatorForICAEPretraining()(
        [{"context_ids": [7, 8, 9], "continuation_ids": [5]}, {"context_ids": [4, 3], "continuation_ids": []}]
    )
    expected = {
        "context_ids": torch.tensor([[7, 8, 9], [4, 3, 0]]),
        "context_mask": torch.tensor([[True, True, True], [True, True, False]]),
        "continuation_ids": torch.tensor([[5], [0]]),
        "continuation_mask": torch.tensor([[True], [False]]),
    }
    assert batch.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(batch[name], tensor)


def test_a_batch_without_any_continuation_has_none():
    batch = DataCollatorForICAEPretraining()([{"context_ids": [7], "continuation_ids": []}])
    assert set(batch) == {"context_ids", "context_mask"}
