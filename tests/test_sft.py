import json
import logging
import pickle
import subprocess
import sys
from functools import partial
from pathlib import Path

import datasets
import pytest
import torch
import torch.nn.functional as F
import yaml
from datasets import Dataset, IterableDataset, Value, concatenate_datasets
from transformers import AutoModelForCausalLM

from icae import ICAEForConditionalGeneration
from icae.cli import main
from icae.trainers import (
    DataCollatorForICAEPretraining,
    DataCollatorForICAESFT,
    ICAESFTConfig,
    ICAESFTTrainer,
    prepare_sft_dataset,
)
from tiny import SHORT_RUN, STYLE, make_base, written_in_evaluation


CONTEXTS = [
    "Ines Okafor lives in Bergen and walks to the harbour.",
    "The train to the north leaves at ten minutes to nine.",
    "A star that runs out of hydrogen becomes a red giant.",
    "The garden behind the wall had been empty for years.",
]
PROMPTS = ["Who lives in Bergen?", "When does it leave?", "What does it become?", "Where is the garden?"]
SENTENCE = "The lighthouse keeper had not spoken to anyone since October."
RESPONSES = ["Ines", "ten to nine", "a red giant", "behind the wall"]
TRIPLES = Dataset.from_dict({"context": CONTEXTS, "prompt": PROMPTS, "response": RESPONSES})


def samples(dataset):
    return [dict(row) for row in dataset]


@pytest.fixture
def warnings_log(caplog, monkeypatch):
    """`caplog`, which also hears the loggers of transformers and icae."""
    for name in ("transformers", "icae"):
        monkeypatch.setattr(logging.getLogger(name), "propagate", True)
    return caplog


@pytest.fixture
def make_trainer(make_icae, tmp_path):
    def make(folder="run", model=None, data=TRIPLES, documents=None, **options):
        defaults = {
            "output_dir": str(tmp_path / folder),
            "per_device_train_batch_size": 2,
            "pretraining_share": 0.4,
            "eval_generations": 3,
            "max_new_tokens": 4,
        }
        args = ICAESFTConfig(**(SHORT_RUN | defaults | options))
        return ICAESFTTrainer(model or make_icae(lora_dropout=0.1), args, data, data, documents=documents)

    return make


# ------------------------------------------------------------------------------------------------------------ data


def test_samples_that_other_code_made_are_not_taken_from_the_cache(make_icae, tmp_path, monkeypatch):
    TRIPLES.to_parquet(tmp_path / "triples.parquet")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    model, triples = make_icae(), Dataset.from_parquet(str(tmp_path / "triples.parquet"), cache_dir=str(tmp_path))

    def made() -> list[str]:
        documents = triples.rename_column("context", "text")
        prepared = prepare_sft_dataset(triples, model, pretraining_share=0.5, documents=documents)
        return [file["filename"] for file in prepared.cache_files]

    before = made()
    assert len(before) > 1 and made() == before
    monkeypatch.setattr("icae.trainers.sft_data.code_digest", lambda: "other")
    monkeypatch.setattr("icae.trainers.pretraining_data.code_digest", lambda: "other")
    assert not set(made()) & set(before)


def test_a_sample_holds_the_context_as_text_the_prompt_in_its_template_and_the_response_with_its_end(make_icae):
    model = make_icae()
    sample = prepare_sft_dataset(TRIPLES, model)[0]
    decode = model.tokenizer.decode
    assert decode(sample["context_ids"]) == CONTEXTS[0]
    assert decode(sample["prompt_ids"][0]) == f"\n\n{PROMPTS[0]}<|im_end|>\n<|im_start|>assistant\n"
    assert decode(sample["response_ids"][0]) == "Ines</s>"
    assert sample["length"] == len(CONTEXTS[0]) and sample["continuation_ids"] == []


def test_the_columns_of_pwc_and_of_conversations_give_the_same_samples(make_icae):
    model = make_icae()
    expected = samples(prepare_sft_dataset(TRIPLES, model))
    pwc = TRIPLES.rename_columns({"context": "input", "response": "answer"})
    assert samples(prepare_sft_dataset(pwc, model)) == expected
    messages = [
        [{"role": "user", "content": prompt}, {"role": "assistant", "content": response}]
        for prompt, response in zip(PROMPTS, RESPONSES, strict=True)
    ]
    chat = Dataset.from_dict({"context": CONTEXTS, "messages": messages})
    assert samples(prepare_sft_dataset(chat, model)) == expected
    assert samples(prepare_sft_dataset(TRIPLES.to_iterable_dataset(), model)) == expected


def test_control_tokens_in_any_text_stay_text(make_icae):
    model = make_icae()
    hostile = "a<|im_end|>b"
    data = Dataset.from_dict({"context": [hostile], "prompt": [hostile], "response": [hostile]})
    sample = prepare_sft_dataset(data, model)[0]
    control = model.tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert control not in sample["context_ids"] + sample["response_ids"][0]
    assert sample["prompt_ids"][0].count(control) == 1  # the template's own
    assert model.tokenizer.decode(sample["context_ids"]) == hostile


@pytest.mark.parametrize("with_documents", [False, True])
def test_control_tokens_that_are_not_special_stay_text_in_what_is_mixed_in_too(make_icae, with_documents):
    model = make_icae()
    model.tokenizer.add_tokens(["</think>"])  # as Qwen3 has it
    model.tokenizer.chat_template += "{# </think> #}"
    hostile = "a</think>b" * 4
    data = Dataset.from_dict({"context": [hostile], "prompt": ["?"], "response": ["!"]})
    documents = Dataset.from_dict({"text": [hostile]}) if with_documents else None
    mixed = prepare_sft_dataset(data, model, pretraining_share=0.7, documents=documents)
    extra = [sample for sample in mixed if not sample["prompt_ids"]]
    control = model.tokenizer.convert_tokens_to_ids("</think>")
    assert control >= 0 and extra
    for sample in extra:
        assert control not in sample["context_ids"] + sample["continuation_ids"]


def test_several_contexts_of_a_row_start_spans_of_their_own(make_icae):
    model = make_icae()
    data = Dataset.from_dict({"context": [CONTEXTS[:2]], "prompt": PROMPTS[:1], "response": RESPONSES[:1]})
    sample = prepare_sft_dataset(data, model)[0]
    assert sample["context_lengths"] == [len(CONTEXTS[0]), len(CONTEXTS[1]) + 2]
    batch = DataCollatorForICAESFT()([sample, prepare_sft_dataset(TRIPLES, model)[2]])
    with torch.no_grad():
        memory = model(**batch, autoencoding_weight=0).memory
    expected = model.compress([CONTEXTS[:2], CONTEXTS[2]])
    assert torch.equal(memory.slots, expected.slots) and memory.spans == expected.spans
    assert [tokens for _, tokens in memory.spans[0]] == [16, 16, 16, 5, 16, 16, 16, 7]


def test_neighbours_with_one_context_become_one_sample_of_up_to_max_prompts(make_icae):
    model = make_icae()
    about = [0, 0, 0, 1, 2, 2, 0]
    data = TRIPLES.select(about).map(lambda row, i: {"prompt": f"{i}?"}, with_indices=True)
    single = samples(prepare_sft_dataset(data, model))
    grouped = samples(prepare_sft_dataset(data, model, max_prompts=2))
    assert [len(sample["prompt_ids"]) for sample in grouped] == [2, 1, 1, 2, 1]
    for name in ("prompt_ids", "response_ids"):
        assert [ids for sample in grouped for ids in sample[name]] == [sample[name][0] for sample in single]
    contexts = [CONTEXTS[0], CONTEXTS[0], CONTEXTS[1], CONTEXTS[2], CONTEXTS[0]]
    assert [model.tokenizer.decode(sample["context_ids"]) for sample in grouped] == contexts
    streamed = prepare_sft_dataset(data.to_iterable_dataset(2), model, max_prompts=2)
    assert [len(sample["prompt_ids"]) for sample in streamed] == [2, 1, 1, 2, 1]


def test_prompts_that_share_an_encoder_pass_have_the_losses_of_prompts_that_do_not(make_icae):
    model = make_icae()
    about = [0, 0, 1, 3, 3, 3]
    data = Dataset.from_dict(
        {
            "context": [CONTEXTS[i] for i in about],
            "prompt": [f"{i} {PROMPTS[i]}"[: 8 + 3 * i] for i in about],
            "response": ["yes", "no", "a red giant", "", "the wall", "x"],
        }
    ).filter(lambda text: text != "", input_columns=["response"])
    collate = DataCollatorForICAESFT()
    single = collate(samples(prepare_sft_dataset(data, model)))
    grouped = collate(samples(prepare_sft_dataset(data, model, max_prompts=4)))
    assert len(grouped["context_ids"]) == 3 and len(single["context_ids"]) == 5
    assert grouped["context_index"].tolist() == [0, 0, 1, 2, 2]
    for options in ({}, {"distillation_weight": 0.5}):
        gradients = []
        for batch in (single, grouped):
            output = model(**batch, autoencoding_weight=0, **options)
            output.loss.backward()
            gradients.append({name: p.grad for name, p in model.trainable_parameters().items() if p.grad is not None})
            model.zero_grad()
            gradients[-1]["losses"] = output.token_losses["instruction"]
        for name, expected in gradients[0].items():
            torch.testing.assert_close(gradients[1][name], expected, atol=1e-4, rtol=1e-4)


def test_the_collator_s_example_is_what_it_makes():
    sample = {"context_ids": [7, 8], "context_lengths": [2], "continuation_ids": []}
    batch = DataCollatorForICAESFT()([sample | {"prompt_ids": [[4], [3, 6]], "response_ids": [[5, 2], [8, 2]]}])
    expected = {
        "context_ids": [[7, 8]],
        "context_mask": [[True, True]],
        "prompt_ids": [[4, 0], [3, 6]],
        "prompt_mask": [[True, False], [True, True]],
        "response_ids": [[5, 2], [8, 2]],
        "response_mask": [[True, True], [True, True]],
        "context_index": [0, 0],
        "context_lengths": [[2]],
        "autoencoding_rows": [False],
    }
    assert {name: tensor.tolist() for name, tensor in batch.items()} == expected


def test_the_share_of_pretraining_samples_is_as_asked_and_does_not_depend_on_batches(make_icae):
    model = make_icae()
    data = Dataset.from_dict({name: list(TRIPLES[name]) * 100 for name in TRIPLES.column_names})
    for share in (0.25, 0.75):
        mixed = samples(prepare_sft_dataset(data, model, pretraining_share=share, seed=1))
        extra = [sample for sample in mixed if not sample["response_ids"]]
        assert abs(len(extra) / len(mixed) - share) < 0.05
        assert len(mixed) - len(extra) == 400  # every row is kept
        assert all(sample["context_ids"] and not sample["prompt_ids"] for sample in extra)
        streamed = prepare_sft_dataset(data.to_iterable_dataset(3), model, pretraining_share=share, seed=1)
        assert samples(streamed) == mixed


def test_a_streamed_data_set_can_be_pickled_as_spawned_workers_do(make_icae):
    """As on macOS and Windows: a function within a function could not be."""
    triples, documents = TRIPLES.to_iterable_dataset(2), Dataset.from_dict({"text": CONTEXTS}).to_iterable_dataset(2)
    prepared = prepare_sft_dataset(triples, make_icae(), pretraining_share=0.4, documents=documents)
    assert samples(pickle.loads(pickle.dumps(prepared))) == samples(prepared)


@pytest.mark.parametrize("streamed", [False, True])
def test_documents_give_the_mixed_in_samples_in_place_of_the_contexts(make_icae, streamed):
    model, share = make_icae(), 0.6
    letters = [chr(97 + number) * 90 for number in range(7)]  # texts whose samples can be told apart
    data = Dataset.from_dict({name: list(TRIPLES[name]) * 50 for name in TRIPLES.column_names})
    documents = Dataset.from_dict({"text": letters})
    if streamed:
        data, documents = data.to_iterable_dataset(), documents.to_iterable_dataset()
    options = {"pretraining_share": share, "max_spans": 3, "continuation_length": 5, "seed": 1}
    mixed = samples(prepare_sft_dataset(data, model, documents=documents, **options))
    extra = [sample for sample in mixed if not sample["response_ids"]]
    assert abs(len(extra) / len(mixed) - share) < 0.08
    asked = [sample for sample in mixed if sample["response_ids"]]
    assert asked == samples(prepare_sft_dataset(data, model))  # every triple once, in its order
    assert streamed or len(extra) == 300
    texts = model.tokenizer.batch_decode([sample["context_ids"] + sample["continuation_ids"] for sample in extra])
    assert {text[0] for text in texts} == {letter[0] for letter in letters}
    assert all(len(set(text)) == 1 for text in texts)
    lengths = {len(sample["context_ids"]) for sample in extra}
    assert {16, 32, 48} <= lengths and max(lengths) == 48
    assert all(sample["context_lengths"] == [sample["length"]] for sample in extra)
    assert samples(prepare_sft_dataset(data, model, documents=documents, **options)) == mixed


def test_documents_shorter_than_a_span_have_no_continuation(make_icae):
    documents = Dataset.from_dict({"text": ["abc"] * 3})
    mixed = samples(prepare_sft_dataset(TRIPLES, make_icae(), documents=documents, pretraining_share=0.5))
    assert [sample["continuation_ids"] for sample in mixed if not sample["prompt_ids"]] == [[]] * 4


def test_a_share_of_few_triples_is_at_least_one_sample_of_the_documents(make_icae):
    documents = Dataset.from_dict({"text": ["abc"]})
    mixed = samples(prepare_sft_dataset(TRIPLES, make_icae(), documents=documents, pretraining_share=0.1))
    assert [bool(sample["prompt_ids"]) for sample in mixed] == [True] * 4 + [False]


def test_documents_without_a_token_are_refused(make_icae):
    documents = Dataset.from_dict({"text": ["", ""]})
    with pytest.raises(ValueError, match="Expected `documents` of at least one token, got none"):
        prepare_sft_dataset(TRIPLES, make_icae(), documents=documents, pretraining_share=0.5)


def test_documents_in_another_form_than_the_triples_are_refused(make_icae):
    documents = Dataset.from_dict({"text": CONTEXTS}).to_iterable_dataset()
    with pytest.raises(ValueError, match="in the form of the triples, Dataset, got IterableDataset; stream both"):
        prepare_sft_dataset(TRIPLES, make_icae(), documents=documents, pretraining_share=0.5)


@pytest.mark.parametrize("streaming", [False, True])
def test_words_of_documents_are_shuffled_and_those_of_contexts_are_not(make_icae, streaming):
    texts = [" ".join(f"{word}{number}" for word in ("one", "two", "three")) + "\n" for number in range(9)]
    triples, documents = TRIPLES, Dataset.from_dict({"text": texts})
    if streaming:
        triples, documents = triples.to_iterable_dataset(), documents.to_iterable_dataset()
    model = make_icae()
    options = {"documents": documents, "pretraining_share": 0.5, "shuffled_share": 1.0}
    prepared = prepare_sft_dataset(triples, model, **options)
    samples = list(prepared.take(24) if streaming else prepared)
    written = {True: "", False: ""}
    for sample in samples:
        written[bool(sample["prompt_ids"])] += model.tokenizer.decode(sample["context_ids"])
    assert any(context in written[True] for context in CONTEXTS)
    assert written[False] and sum(text in written[False] for text in texts) < 6
    assert not any(sample["continuation_ids"] for sample in samples)


def test_a_shuffled_share_without_documents_is_refused(make_icae):
    with pytest.raises(ValueError, match=r"Expected `documents` with a `shuffled_share` of 0\.5, got none: wo"):
        prepare_sft_dataset(TRIPLES, make_icae(), pretraining_share=0.5, shuffled_share=0.5)


def test_documents_without_a_share_are_refused(make_icae):
    documents = Dataset.from_dict({"text": CONTEXTS})
    with pytest.raises(ValueError, match="Expected a `pretraining_share` above 0 with `documents`, got 0"):
        prepare_sft_dataset(TRIPLES, make_icae(), documents=documents)


def test_documents_beside_finished_samples_are_refused(make_trainer, make_icae):
    prepared = prepare_sft_dataset(TRIPLES, make_icae())
    with pytest.raises(ValueError, match="Expected triples with `documents`, got samples"):
        make_trainer(data=prepared, documents=Dataset.from_dict({"text": CONTEXTS}))


def test_rows_about_one_context_that_stand_apart_are_counted(make_icae, warnings_log):
    apart = Dataset.from_dict(
        {
            "context": [CONTEXTS[0], CONTEXTS[1], CONTEXTS[0], CONTEXTS[1]],
            "prompt": ["Who?", "What?", "When?", "Where?"],
            "response": ["A", "B", "C", "D"],
        }
    )
    assert len(prepare_sft_dataset(apart, make_icae(), max_prompts=1)) == 4
    assert "comes again" not in warnings_log.text
    assert len(prepare_sft_dataset(apart, make_icae(), max_prompts=4)) == 4
    assert "2 times a context comes again after rows about others" in warnings_log.text
    warnings_log.clear()
    assert len(prepare_sft_dataset(apart.sort("context"), make_icae(), max_prompts=4)) == 2
    assert "comes again" not in warnings_log.text


def test_rows_that_are_too_long_are_left_out_and_counted(make_icae, warnings_log):
    kept = prepare_sft_dataset(TRIPLES, make_icae(), max_context_length=52)
    assert len(kept) == 1
    assert "Left out 3 of 4 rows" in warnings_log.text
    long = Dataset.from_dict({"context": ["x" * 500, "x" * 300], "prompt": ["?"] * 2, "response": ["y"] * 2})
    assert len(prepare_sft_dataset(long, make_icae())) == 1  # the base has 512 positions


@pytest.mark.parametrize("name", ["context", "response"])
def test_an_empty_text_is_refused_with_its_row(make_icae, name):
    texts = {"context": CONTEXTS, "prompt": PROMPTS, "response": RESPONSES}
    data = Dataset.from_dict(texts | {name: [*texts[name][:2], "", "x"]})
    with pytest.raises(Exception, match=f"Expected a {name} of at least one letter, got none in row 2"):
        prepare_sft_dataset(data, make_icae())


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"response": ["one", "two"]}, r"Row 1: Expected a prompt and one response as texts, got .* and \['one'"),
        ({"prompt": None}, "Row 1: Expected a prompt and one response as texts, got None and 'ten to nine'"),
        ({"prompt": [{"role": "user", "content": None}]}, "Row 1: Expected messages with a text as their content"),
        ({"context": ["one", None]}, "Row 1: Expected a context as a text or a list of texts, got None for one"),
        ({"context": ["one", ""]}, "Expected a context of at least one letter, got none in row 1"),
        ({"messages": None}, r"Row 1: Expected `messages` that end with the assistant's, got the roles \[\]"),
        (
            {"messages": [{"role": name, "content": "x"} for name in ("system", "user", "assistant")]},
            "Row 1: Expected a conversation that starts with the user's message",
        ),
        (
            {"messages": [{"role": name, "content": "x"} for name in ("user", "assistant", "assistant")]},
            "Row 1: Expected a conversation that the assistant is to answer, got one that ends with its own 'x'",
        ),
    ],
)
def test_what_is_no_text_is_refused_with_its_row(make_icae, wrong, message):
    def rows():
        good = [dict(row) for row in TRIPLES]
        if "messages" in wrong:
            turns = [{"role": "user", "content": "?"}, {"role": "assistant", "content": "!"}]
            good = [{"context": row["context"], "messages": turns} for row in good]
        good[1] |= wrong
        yield from good

    streamed = IterableDataset.from_generator(rows)  # where a column may hold several types
    with pytest.raises(ValueError, match=message):
        list(prepare_sft_dataset(streamed, make_icae()))


def test_that_no_row_is_short_enough_is_said(make_icae):
    with pytest.raises(ValueError, match="Expected rows to train on, got none but 4 of 4 rows, which are longer"):
        prepare_sft_dataset(TRIPLES, make_icae(), max_context_length=10)


@pytest.mark.parametrize("memory_type", ["key_values", "hidden_states"])
def test_slots_that_have_positions_of_their_own_are_counted(make_icae, memory_type):
    """Rows that fit can be trained on, up to the last position of the base."""
    model = make_icae(memory_type=memory_type, encoder_layout="sequential", decoder_layout="sequential")
    texts = {"context": ["x" * n for n in range(360, 500)], "prompt": ["?"] * 140, "response": ["y"] * 140}
    kept = prepare_sft_dataset(Dataset.from_dict(texts), model)
    assert len(kept) < 140
    longest = DataCollatorForICAESFT()([kept[len(kept) - 1]])
    assert model(**longest).loss.isfinite()


def test_processes_share_the_work_and_change_nothing(make_icae):
    model, how = make_icae(), {"pretraining_share": 0.5, "documents": TRIPLES.rename_column("context", "text")}
    one, two = (prepare_sft_dataset(TRIPLES, model, **how, num_proc=number) for number in (None, 2))
    assert samples(one) == samples(two)


def test_missing_columns_are_named(make_icae):
    with pytest.raises(ValueError, match=r"Expected the columns .* got \['context', 'prompt'\]"):
        prepare_sft_dataset(TRIPLES.remove_columns("response"), make_icae())


def test_columns_of_two_kinds_are_refused(make_icae):
    data = TRIPLES.add_column("messages", [[{"role": "user", "content": "?"}]] * len(TRIPLES))
    with pytest.raises(ValueError, match="Expected either `prompt`, `response` or `messages`, got"):
        prepare_sft_dataset(data, make_icae())


def test_a_conversation_without_an_answer_is_refused(make_icae):
    data = Dataset.from_dict({"context": ["x"], "messages": [[{"role": "user", "content": "?"}]]})
    with pytest.raises(Exception, match="Expected `messages` that end with the assistant's"):
        prepare_sft_dataset(data, make_icae())


# -------------------------------------------------------------------------------------------------------- training


def test_the_loss_is_that_of_the_response_alone(make_icae):
    model = make_icae()
    batch = DataCollatorForICAESFT()(samples(prepare_sft_dataset(TRIPLES, model)))
    with torch.no_grad():
        output = model(**batch, autoencoding_weight=0)
    assert set(output.task_losses) == {"instruction"}
    assert int(output.token_masks["instruction"].sum()) == sum(len(text) + 1 for text in RESPONSES)


def test_a_mixed_batch_is_the_sum_of_its_parts(make_icae):
    """Rows that train answers and rows that train reconstruction do not touch each other."""
    model = make_icae()
    mixed = samples(prepare_sft_dataset(TRIPLES, model, pretraining_share=0.5, continuation_length=4))
    answers = [sample for sample in mixed if sample["response_ids"]]
    extra = [sample for sample in mixed if not sample["response_ids"]]
    assert answers and extra
    collate = DataCollatorForICAESFT()
    weights = {"autoencoding_weight": 0.6, "continuation_weight": 0.4}
    with torch.no_grad():
        together = model(**collate(mixed), **weights).task_losses
        alone = model(**collate(answers), autoencoding_weight=0).task_losses
        others = model(**collate(extra), **weights).task_losses
    for task, loss in (alone | others).items():
        torch.testing.assert_close(together[task], loss, atol=1e-5, rtol=1e-5)


def test_a_distilled_model_learns_from_the_base_with_the_whole_context(make_icae):
    """A response of one token has a divergence that can be written down from two plain passes of the base."""
    model = make_icae()
    data = Dataset.from_dict({"context": CONTEXTS[:1], "prompt": PROMPTS[:1], "response": ["I"]})
    sample = prepare_sft_dataset(data, model)[0]
    batch = DataCollatorForICAESFT()([sample])
    with torch.no_grad():
        plain = model(**batch, autoencoding_weight=0).loss
        distilled = model(**batch, autoencoding_weight=0, distillation_weight=1.0).loss
        half = model(**batch, autoencoding_weight=0, distillation_weight=0.5).loss
        prefix = model.tokenizer("<s><|im_start|>user\n")["input_ids"]
        ids = [*prefix, *sample["context_ids"], *sample["prompt_ids"][0], sample["response_ids"][0][0]]
        with model.adapter(False):
            teacher = model.language_model(torch.tensor([ids])).logits[0, -2:].log_softmax(-1)
        memory = model.compress(CONTEXTS[0])
        output = model.generate(
            memory=memory,
            prompt=PROMPTS[0],
            max_new_tokens=2,
            output_logits=True,
            return_dict_in_generate=True,
            prefix_allowed_tokens_fn=lambda *_: [sample["response_ids"][0][0]],
        )
        student = torch.cat(output.logits).log_softmax(-1)
    expected = (teacher.exp() * (teacher - student)).sum(-1).mean()
    torch.testing.assert_close(distilled, expected, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(half, (plain + distilled) / 2, atol=1e-5, rtol=1e-5)


def test_distillation_keeps_no_logits_and_has_the_gradient_of_its_loss(make_icae):
    model = make_icae("llama").train()
    data = Dataset.from_dict({"context": CONTEXTS[:2], "prompt": PROMPTS[:2], "response": ["A long answer. " * 8] * 2})
    batch = DataCollatorForICAESFT()(list(prepare_sft_dataset(data, model)))
    batch |= {"autoencoding_weight": 0, "distillation_weight": 1.0}
    chunk, targets = model._loss_chunk_size, int(batch["response_mask"].sum())
    assert chunk < targets < 2 * chunk
    logits = {size * model.config.text_config.vocab_size for size in (chunk, targets - chunk, targets)}

    def step() -> tuple[set[int], dict[str, torch.Tensor]]:
        """Sizes of the tensors that are kept for the backward pass, and the gradients."""
        sizes = set()

        def keep(tensor):
            sizes.add(tensor.numel())
            return tensor

        model.zero_grad()
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            model(**batch).loss.backward()
        parameters = model.trainable_parameters().items()
        return sizes, {name: one.grad.clone() for name, one in parameters if one.grad is not None}

    def in_chunks(hidden, teacher):
        parts = []
        for states in zip(hidden.split(chunk), teacher.split(chunk), strict=True):
            scores, target = (model._logits(one).log_softmax(-1) for one in states)
            parts.append(F.kl_div(scores, target, reduction="none", log_target=True).sum(-1))
        return torch.cat(parts)

    sizes, gradients = step()
    assert sizes.isdisjoint(logits)
    model._divergence = in_chunks
    sizes, expected = step()
    assert not sizes.isdisjoint(logits), "what this test forbids would be seen"
    assert gradients.keys() == expected.keys() and len(gradients) > 2
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, expected[name], atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("distillation_weight", [0.0, 0.5])
def test_tuning_moves_the_encoder_and_leaves_the_base_alone(make_trainer, make_icae, distillation_weight):
    base = make_base()
    frozen = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    model = make_icae(base=base)
    before = {name: tensor.detach().clone() for name, tensor in model.trainable_parameters().items()}
    make_trainer(model=model, distillation_weight=distillation_weight, pretraining_share=0.7).train()
    still = [name for name, tensor in model.trainable_parameters().items() if torch.equal(tensor, before[name])]
    assert still == []
    after = {name.replace(".base_layer", ""): tensor for name, tensor in base.state_dict().items()}
    assert all(torch.equal(after[name], tensor) for name, tensor in frozen.items())


def test_a_resumed_run_equals_an_unbroken_one(make_trainer):
    def losses(trainer):
        return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]

    unbroken = make_trainer("unbroken")
    unbroken.train()
    resumed = make_trainer("resumed")
    resumed.train(resume_from_checkpoint=str(Path(unbroken.args.output_dir) / "checkpoint-3"))
    assert losses(resumed) == losses(unbroken)
    assert resumed.model.fingerprint == unbroken.model.fingerprint


def test_evaluation_reports_the_control_and_real_answers(make_trainer):
    trainer = make_trainer()
    trainer.evaluate()
    logged = trainer.state.log_history[-1]
    names = ("response_loss", "response_accuracy", "response_loss_other_text", "f1", "exact_match")
    assert {f"eval_{name}" for name in names} <= set(logged)
    assert logged["eval_response_loss"] != logged["eval_response_loss_other_text"]


def test_evaluation_does_without_the_control_where_the_base_has_no_positions_for_it(make_icae, make_trainer):
    """A long context with a short prompt and the other way round fit; the long context's slots with the long prompt
    do not."""
    rows = {"context": ["a long one " * 16, "short."], "prompt": ["Who?", "Tell me in many words " * 6]}
    data = Dataset.from_dict(rows | {"response": ["x", "y"]})
    trainer = make_trainer(
        model=make_icae(base=make_base(max_position_embeddings=256)), data=data, per_device_eval_batch_size=2
    )
    trainer.evaluate()
    logged = trainer.state.log_history[-1]
    assert logged["eval_response_loss"] > 0 and "eval_response_loss_other_text" not in logged
    trainer.model.language_model.config.max_position_embeddings = 512
    trainer.evaluate()
    assert "eval_response_loss_other_text" in trainer.state.log_history[-1]


def test_evaluation_is_greedy_whatever_style_of_answers_the_base_asks_for(make_trainer):
    assert written_in_evaluation(make_trainer(), **STYLE) == written_in_evaluation(make_trainer())


def test_evaluation_shows_what_tuning_costs_reconstruction(make_trainer):
    trainer = make_trainer(pretraining_share=0.25, autoencoding_weight=0.4)
    trainer.evaluate()
    logged = trainer.state.log_history[-1]
    model = trainer.model.eval()
    with torch.no_grad():
        expected = model(**DataCollatorForICAEPretraining()(samples(trainer.eval_dataset))).loss.item()
    assert logged["eval_ae_loss"] == pytest.approx(expected, rel=1e-4)
    assert logged["eval_ae_loss_other_text"] != logged["eval_ae_loss"]
    weighed = 0.75 * logged["eval_response_loss"] + 0.25 * logged["eval_ae_loss"]
    assert logged["eval_loss"] == pytest.approx(weighed, rel=1e-4)


def test_held_out_contexts_too_long_to_be_written_back_are_answered_only(make_trainer, make_icae):
    paper = {"encoder_layout": "sequential", "decoder_layout": "sequential"}
    texts = {"context": ["x" * 300, "y" * 320], "prompt": ["?", "?"], "response": ["z", "z"]}
    trainer = make_trainer(model=make_icae(**paper), data=Dataset.from_dict(texts), pretraining_share=0.5)
    trainer.evaluate()
    logged = trainer.state.log_history[-1]
    assert "eval_ae_loss" not in logged and logged["eval_loss"] == pytest.approx(logged["eval_response_loss"])


@pytest.mark.parametrize("kind", ["in memory", "streamed", "prepared"])
def test_without_a_weight_for_autoencoding_nothing_trains_it(make_trainer, make_icae, kind):
    """Contexts without a continuation, which could train nothing else, are left out."""
    texts = [SENTENCE[:length] * repeats for length in (10, 20) for repeats in (1, 8)]
    data, documents = TRIPLES, Dataset.from_dict({"text": texts})
    if kind == "streamed":
        data, documents = data.to_iterable_dataset(), documents.to_iterable_dataset()
    if kind == "prepared":
        data = prepare_sft_dataset(data, make_icae(), documents=documents, pretraining_share=0.7)
        assert not all(row["prompt_ids"] or row["continuation_ids"] for row in data)
        documents = None
    trainer = make_trainer(data=data, documents=documents, autoencoding_weight=0, pretraining_share=0.7, max_steps=6)
    kept = list(trainer.train_dataset.take(20))
    assert all(row["prompt_ids"] or row["continuation_ids"] for row in kept)
    assert any(row["prompt_ids"] for row in kept) and any(row["continuation_ids"] for row in kept)
    trainer.train()
    assert not [name for row in trainer.state.log_history for name in row if name == "ae_loss"]
    assert [name for row in trainer.state.log_history for name in row if name == "lm_loss"]


def test_predict_takes_triples_and_gives_the_loss_of_evaluation(make_trainer):
    trainer = make_trainer()
    expected = trainer.evaluate(TRIPLES)["eval_loss"]
    trainer.model.train()
    assert trainer.predict(TRIPLES).metrics["test_loss"] == pytest.approx(expected, abs=1e-6)
    assert trainer.model.training and not trainer._metrics["eval"]


def test_triples_that_are_given_to_evaluate_are_prepared(make_trainer):
    trainer = make_trainer()
    expected = trainer.evaluate()["eval_loss"]
    assert trainer.evaluate(TRIPLES)["eval_loss"] == expected
    trainer.eval_dataset = None
    with pytest.raises(ValueError, match="Expected an `eval_dataset`, here or when the trainer was made, got none"):
        trainer.evaluate()


def test_held_out_samples_without_prompts_are_not_asked(make_trainer, make_icae):
    model = make_icae()
    mixed = prepare_sft_dataset(TRIPLES, model, pretraining_share=0.5)
    trainer = make_trainer(model=model, data=mixed, eval_generations=8)
    assert "eval_f1" in trainer.evaluate()


def test_held_out_answers_end_where_the_positions_of_the_base_do(make_trainer, make_icae):
    texts = {"context": ["x" * 440, "y" * 430], "prompt": ["?", "?"], "response": ["z", "z"]}
    trainer = make_trainer(data=Dataset.from_dict(texts), max_new_tokens=300, pretraining_share=0)
    assert "eval_f1" in trainer.evaluate()


@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_held_out_answers_are_as_long_as_asked_for(make_trainer, make_icae, family, monkeypatch):
    texts = {"context": ["x" * 20, "y" * 20], "prompt": ["?", "Who is it, and where? " * 4], "response": ["z", "z"]}
    model = make_icae(family)
    model.generation_config.max_new_tokens = 100
    trainer = make_trainer(model=model, data=Dataset.from_dict(texts), max_new_tokens=4, pretraining_share=0)
    written, generate = [], model.generate
    monkeypatch.setattr(model, "generate", lambda *args, **how: written.append(generate(*args, **how)) or written[-1])
    trainer.evaluate()
    assert all(answers.shape[1] <= 4 for answers in written)


def test_batches_of_one_context_have_no_control_and_a_warning(make_trainer, warnings_log):
    trainer = make_trainer(per_device_eval_batch_size=1)
    trainer.evaluate()
    assert "eval_response_loss_other_text" not in trainer.state.log_history[-1]
    assert "No losses with another text's slots: each batch of the `eval_dataset` has one context" in warnings_log.text


def test_several_sets_to_evaluate_on_are_refused(make_icae, tmp_path):
    args = ICAESFTConfig(output_dir=str(tmp_path), use_cpu=True)
    several, message = {"a": TRIPLES, "b": TRIPLES}, r"Expected one `eval_dataset`, got 2 by name \(a, b\)"
    with pytest.raises(ValueError, match=message):
        ICAESFTTrainer(make_icae(), args, TRIPLES, several)
    with pytest.raises(ValueError, match=message):
        ICAESFTTrainer(make_icae(), args, TRIPLES).evaluate(several)


def test_several_devices_for_one_process_are_refused(make_icae, tmp_path):
    args = ICAESFTConfig(output_dir=str(tmp_path), use_cpu=True)
    args._n_gpu = 2
    with pytest.raises(ValueError, match="Expected one GPU for each process, got 2 for one: start it with"):
        ICAESFTTrainer(make_icae(), args, TRIPLES)


@pytest.mark.parametrize(
    ("layout", "tokens", "fits"),
    [("uniform", 497, True), ("uniform", 498, False), ("sequential", 226, True), ("sequential", 227, False)],
)
def test_mixed_in_contexts_that_the_base_could_not_write_out_are_refused(
    make_trainer, make_icae, layout, tokens, fits
):
    """512 positions; a span is 16 tokens and 4 slots; text goes on for 14 tokens."""
    model = make_icae(encoder_layout=layout, decoder_layout=layout)
    ids = {"context_ids": [[7] * tokens], "context_lengths": [[tokens]], "continuation_ids": [[7] * 14]}
    mixed_in = {**ids, "prompt_ids": [[]], "response_ids": [[]], "rejected_ids": [[]], "length": [tokens]}
    asked = prepare_sft_dataset(TRIPLES, model)
    data = concatenate_datasets([asked, Dataset.from_dict(mixed_in, features=asked.features)])
    options = {"autoencoding_weight": 0.5, "continuation_length": 14}
    if fits:
        make_trainer(model=model, data=data, **options)
        batch = DataCollatorForICAESFT()([data[len(data) - 1]])
        losses = model(**batch, autoencoding_weight=0.5, continuation_weight=0.5).task_losses
        assert set(losses) == {"autoencoding", "continuation"}
    else:
        with pytest.raises(ValueError, match=f"positions, can write out and go on behind, got one of {tokens} tokens"):
            make_trainer(model=model, data=data, **options)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("max_length", 512),
        ("loss_type", "dft"),
        ("label_smoothing_factor", 0.1),
        ("neftune_noise_alpha", 5.0),
        ("assistant_only_loss", True),
        ("completion_only_loss", False),
        ("chat_template_path", "x"),
        ("eos_token", "x"),
        ("pad_token", "x"),
        ("dataset_text_field", "content"),
        ("shuffle_dataset", True),
        ("truncation_mode", "keep_end"),
        ("pad_to_multiple_of", 8),
        ("packing_strategy", "wrapped"),
        ("remove_unused_columns", True),
        ("include_num_input_tokens_seen", "all"),
        ("fp16", True),
    ],
)
def test_options_of_trl_that_would_have_no_effect_are_refused(tmp_path, name, value):
    with pytest.raises(ValueError, match=f"Expected `{name}` to be .*, for it would have no effect here, got "):
        ICAESFTConfig(output_dir=str(tmp_path), use_cpu=True, **{name: value})


def test_evaluation_without_a_share_is_of_answers_alone(make_trainer):
    trainer = make_trainer(pretraining_share=0)
    trainer.evaluate()
    logged = trainer.state.log_history[-1]
    assert "eval_ae_loss" not in logged and logged["eval_loss"] == pytest.approx(logged["eval_response_loss"])


def test_packing_is_refused_with_the_reason(tmp_path):
    with pytest.raises(ValueError, match="packed rows would share one memory"):
        ICAESFTConfig(output_dir=str(tmp_path), packing=True)


def test_contexts_without_prompts_are_refused(tmp_path):
    with pytest.raises(ValueError, match="Expected `max_prompts` of at least 1 per context, got 0"):
        ICAESFTConfig(output_dir=str(tmp_path), max_prompts=0)


@pytest.mark.parametrize("name", ["pretraining_share", "distillation_weight"])
def test_a_share_outside_its_range_is_refused(tmp_path, name):
    with pytest.raises(ValueError, match=f"Expected `{name}` to be a share, .* got 1.5"):
        ICAESFTConfig(output_dir=str(tmp_path), **{name: 1.5})


@pytest.fixture
def config_file(tmp_path, tokenizer, make_icae):
    make_base().save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    TRIPLES.to_parquet(tmp_path / "train.parquet")
    options = {
        "base_model": str(tmp_path / "base"),
        "dtype": "float32",
        "train_files": [str(tmp_path / "train.parquet")],
        "eval_files": [str(tmp_path / "train.parquet")],
        "span_length": 16,
        "lora_r": 4,
        "output_dir": str(tmp_path / "run"),
        "per_device_train_batch_size": 2,
        "max_steps": 4,
        "save_steps": 1,
        "eval_steps": 1,
        "eval_strategy": "steps",
        "eval_generations": 2,
        "max_new_tokens": 3,
        "logging_steps": 1,
        "report_to": "none",
        "use_cpu": True,
        "learning_rate": 1e-3,
    }
    (tmp_path / "config.yaml").write_text(yaml.dump(options))
    return tmp_path / "config.yaml"


def test_icae_sft_runs_from_a_file_and_goes_on(config_file):
    assert main(["sft", "--config", str(config_file), "--max_steps", "2"]) == 0
    assert main(["sft", "--config", str(config_file), "--resume", "true"]) == 0
    run = config_file.parent / "run"
    history = json.loads((run / "trainer_state.json").read_text())["log_history"]
    assert [entry["step"] for entry in history if "loss" in entry] == [1, 2, 3, 4]
    assert ICAEForConditionalGeneration.from_pretrained(run).config.span_length == 16


def test_a_run_does_not_go_on_with_a_base_in_another_dtype(config_file, capsys, monkeypatch):
    def stop(trainer):
        raise KeyboardInterrupt

    monkeypatch.setattr(ICAESFTTrainer, "save_state", stop)  # at the end, when there are checkpoints
    assert main(["sft", "--config", str(config_file), "--max_steps", "1"]) == 130
    assert main(["sft", "--config", str(config_file), "--resume", "true", "--dtype", "bfloat16"]) == 2
    error = capsys.readouterr().err
    assert "Expected a base in float32, with which the run in" in error and "set `--dtype float32`" in error


def test_a_new_run_is_not_mixed_with_an_old_one(config_file, capsys):
    for _ in range(2):
        status = main(["sft", "--config", str(config_file), "--max_steps", "1"])
    assert status == 2
    error = capsys.readouterr().err
    assert "Expected a folder without checkpoints, got" in error and "go on from them with `--resume true`" in error


@pytest.mark.parametrize("streaming", ["false", "true"])
def test_icae_sft_trains_answers_and_the_reconstruction_of_documents(config_file, streaming, monkeypatch):
    trained_on, collate = set(), DataCollatorForICAESFT.__call__

    def keep(collator, samples):
        trained_on.update((bool(sample["prompt_ids"]), *sample["context_ids"][:3]) for sample in samples)
        return collate(collator, samples)

    monkeypatch.setattr(DataCollatorForICAESFT, "__call__", keep)
    folder = config_file.parent
    Dataset.from_dict({"text": ["A document that no prompt is about. " * 3] * 5}).to_parquet(
        folder / "documents.parquet"
    )
    options = ["--document_files", str(folder / "documents.parquet"), "--pretraining_share", "0.5"]
    options += ["--max_steps", "6", "--eval_strategy", "no", "--streaming", streaming]
    monkeypatch.setattr(datasets.config, "SLEEP_TIME_ON_THREADS_SHUTDOWN", 0.01)  # at each end of a tiny file
    assert main(["sft", "--config", str(config_file), *options]) == 0
    history = json.loads((folder / "run" / "trainer_state.json").read_text())["log_history"]
    assert all(any(name in entry for entry in history) for name in ("response_loss", "ae_loss", "lm_loss"))
    model = ICAEForConditionalGeneration.from_pretrained(folder / "run")
    starts = {
        answers: {model.tokenizer.decode(ids) for kind, *ids in trained_on if kind == answers}
        for answers in (True, False)
    }
    assert starts[True] <= {context[:3] for context in CONTEXTS}
    assert starts[False] and all(start in "A document that no prompt is about. " * 2 for start in starts[False])


def test_documents_mixed_in_are_of_all_files_alike(config_file, monkeypatch):
    folder, seen = config_file.parent, []
    monkeypatch.setattr("icae.trainers.sft.ICAESFTTrainer", lambda *_, documents, **__: seen.extend(documents["text"]))
    monkeypatch.setattr("icae.trainers.sft.run", lambda *_: None)
    for name, number in (("many", 9), ("few", 2)):
        Dataset.from_dict({"text": [name * 5] * number}).to_parquet(folder / f"{name}.parquet")
    files = ["--document_files", str(folder / "many.parquet"), str(folder / "few.parquet")]
    assert main(["sft", "--config", str(config_file), *files, "--document_characters", "35"]) == 0
    assert seen == ["many" * 5] * 2 + ["few" * 5] * 2


def test_the_teacher_writes_responses_to_tune_on(config_file, make_icae, capsys):
    folder = config_file.parent
    load_base = partial(AutoModelForCausalLM.from_pretrained, folder / "base")
    base, model = load_base(), make_icae(base=load_base())

    def written(context, prompt):
        chat = [{"role": "user", "content": f"{context}\n\n{prompt}"}]
        text = "<s>" + model.tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
        ids = model.tokenizer(text, return_tensors="pt").input_ids
        return base.generate(ids, max_new_tokens=5, do_sample=False)[0, ids.shape[1] :].tolist()

    answers = [written(*pair) for pair in zip(CONTEXTS, PROMPTS, strict=True)]
    end = next(token for token in answers[1][1:] if token != answers[1][0])
    base.config.eos_token_id = [2, end]
    base.save_pretrained(folder / "base")
    make_icae(base=load_base()).save_pretrained(folder / "icae")
    options = ["--model", str(folder / "icae"), "--dtype", "float32", "--max-new-tokens", "5", "--batch-size", "3"]
    files = ["--data", str(folder / "train.parquet"), "--output", str(folder / "taught.parquet")]
    assert main(["write-responses", *files, *options]) == 0
    taught = Dataset.from_parquet(str(folder / "taught.parquet"))
    complete = [ids.index(end) if end in ids else 0 for ids in answers]  # tokens before the end, none without one
    kept = [index for index, length in enumerate(complete) if length]
    assert 1 in kept and len(kept) < 4
    assert list(taught["context"]) == [CONTEXTS[index] for index in kept]
    expected = [model.tokenizer.decode(answers[index][: complete[index]]) for index in kept]
    assert list(taught["response"]) == expected and "complete" not in taught.column_names
    assert f"{len(kept)} responses in " in (printed := capsys.readouterr().out)
    assert f"left out are {4 - len(kept)} rows whose answer was empty or not at its end after 5 tokens" in printed
    assert len(prepare_sft_dataset(taught, model)) == len(kept)
    assert main(["write-responses", *files, *options, "--least-overlap", "0"]) == 0
    mixed, given = Dataset.from_parquet(str(folder / "taught.parquet")), Dataset.from_parquet(files[1])
    assert list(mixed["context"]) == CONTEXTS
    assert [mixed["response"][index] for index in kept] == expected
    others = [index for index in range(4) if index not in kept]
    assert [mixed["response"][index] for index in others] == [given["response"][index] for index in others]
    assert f"{len(kept)} responses in " in (printed := capsys.readouterr().out)
    assert f"{4 - len(kept)} rows beside them keep theirs" in printed


@pytest.mark.parametrize(
    ("written", "whole"),
    [
        ("It is red. It is", "It is red."),
        ('He said "no." And', 'He said "no."'),
        ("One line!\nTwo lines?\nThree", "One line!\nTwo lines?"),
        ("Version 2.5 of", ""),
        ("", ""),
    ],
)
def test_a_cut_answer_ends_with_its_last_whole_sentence(written, whole):
    from icae.trainers.write_responses import whole_sentences

    assert whole_sentences(written) == whole


def test_answers_of_full_length_are_cut_or_left_out_and_those_unlike_the_response_are_not_taught(
    config_file, make_icae, monkeypatch, capsys
):
    from icae.evaluation.readers import TokenReader

    folder = config_file.parent
    model = make_icae(base=AutoModelForCausalLM.from_pretrained(folder / "base"))
    model.save_pretrained(folder / "icae")
    base_files = ["--model", str(folder / "icae"), "--dtype", "float32"]
    texts = ["a b. a", "a b c", "a b c.", "b"]
    ids = [model.tokenizer(text, add_special_tokens=False).input_ids for text in texts]
    limit = max(map(len, ids))
    full = [len(answer) == limit for answer in ids]
    monkeypatch.setattr(TokenReader, "answer_ids", lambda *_: ids)
    given = Dataset.from_dict({"context": CONTEXTS, "prompt": PROMPTS, "response": ["x", "a b c", "b", "b"]})
    given = given.cast_column("response", Value("large_string"))  # as pandas 3 writes
    given.to_parquet(str(folder / "given.parquet"))
    files = ["--data", str(folder / "given.parquet"), "--output", str(folder / "taught.parquet")]
    assert full == [True, False, True, False]

    def written(*options):
        assert main(["write-responses", *files, *base_files, "--max-new-tokens", str(limit), *options]) == 0
        return list(Dataset.from_parquet(str(folder / "taught.parquet"))["response"])

    assert written() == ["a b c", "b"] and "too long" not in capsys.readouterr().out
    assert written("--cut") == ["a b.", "a b c", "a b c.", "b"]
    assert written("--cut", "--least-overlap", "0.5") == ["x", "a b c", "a b c.", "b"]
    assert written("--least-overlap", "0.5") == ["x", "a b c", "b", "b"]
    given.rename_columns({"context": "input", "response": "answer"}).to_parquet(str(folder / "given.parquet"))
    assert written("--least-overlap", "0.5") == ["x", "a b c", "b", "b"]
    given.select_columns(["context", "prompt"]).rename_column("context", "input").to_parquet(files[1])
    assert written("--cut") == ["a b.", "a b c", "a b c.", "b"]

    extra = {"written": [1, 2, 3, 4], "taught": ["w", "x", "y", "z"], "rejected": ["a"] * 4}
    for name, values in extra.items():
        given = given.add_column(name, values)
    given.to_parquet(files[1])
    assert written("--least-overlap", "0.5") == ["x", "a b c", "b", "b"]
    columns = Dataset.from_parquet(files[3])[:]
    assert columns["written"] == [1, 2, 3, 4] and columns["taught"] == ["w", "x", "y", "z"]
    assert columns["rejected"] == ["a", None, "a", None]  # pairs are of the responses that they were made for
    given = given.remove_columns([*extra])

    rows = given.to_list()
    rows[1]["context"] = "x" * 500  # of 512 positions
    Dataset.from_list(rows).to_parquet(files[1])
    asked = []
    monkeypatch.setattr(
        TokenReader, "answer_ids", lambda _, rows, limit: asked.extend(rows) or [ids[n] for n in (0, 2, 3)]
    )
    capsys.readouterr()
    assert written("--cut") == ["a b.", "a b c.", "b"] and len(asked) == 3
    assert "1 of them are too long for the base" in capsys.readouterr().out
    assert written("--cut", "--least-overlap", "0") == ["a b.", "a b c", "a b c.", "b"]
    monkeypatch.setattr(TokenReader, "answer_ids", lambda _, rows, limit: [ids[3] for _ in rows] if rows else 1 / 0)
    assert written("--batch-size", "1") == ["b"] * 3  # one batch is of the row that is too long alone
    monkeypatch.setattr(TokenReader, "answer_ids", lambda _, rows, limit: [ids[0] for _ in rows])
    before = (folder / "taught.parquet").read_bytes()
    assert main(["write-responses", *files, *base_files, "--max-new-tokens", str(limit)]) == 2
    assert f"within {limit} tokens, got none for 4 rows; raise `--max-new-tokens`" in capsys.readouterr().err
    assert (folder / "taught.parquet").read_bytes() == before


@pytest.mark.parametrize("command", ["write-responses", "write-quotations", "write-preferences"])
def test_no_command_writes_over_the_triples_that_it_reads(tmp_path, monkeypatch, capsys, command):
    monkeypatch.chdir(tmp_path)
    Dataset.from_dict({"context": ["a"], "prompt": ["b"], "response": ["c"]}).to_parquet("given.parquet")
    before = Path("given.parquet").read_bytes()
    assert main([command, "--data", "given.parquet", "--output", str(tmp_path / "given.parquet")]) == 2
    assert "Expected an `--output` besides `--data`" in capsys.readouterr().err
    assert Path("given.parquet").read_bytes() == before


@pytest.mark.parametrize("command", ["write-responses", "write-quotations", "write-preferences"])
def test_rows_are_not_written_to_a_file_that_would_be_read_as_json(tmp_path, capsys, command):
    assert main([command, "--data", "given.parquet", "--output", str(tmp_path / "new.jsonl")]) == 2
    assert "Expected an `--output` that is not named like JSON, got" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["write-responses", "write-quotations", "write-preferences"])
def test_missing_texts_and_empty_files_are_refused_by_all_commands_that_read_triples(tmp_path, capsys, command):
    file = str(tmp_path / "given.parquet")
    words = [command, "--data", file, "--output", str(tmp_path / "new.parquet")]
    Dataset.from_dict({"context": ["a", None], "prompt": ["b", "b"], "response": ["c", "c"]}).to_parquet(file)
    assert main(words) == 2
    assert "a value in each row of the column 'context'" in capsys.readouterr().err
    for no_rows in (Dataset.from_dict({"context": []}), Dataset.from_parquet(file).select([])):
        no_rows.to_parquet(file)
        assert main(words) == 2
        assert f"Expected rows in {file!r}, got none" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main([command, "--help"])
    assert capsys.readouterr().out.startswith(f"usage: icae {command}")


@pytest.mark.parametrize(
    ("columns", "share", "message"),
    [
        (("context", "prompt"), "0.2", "Expected the columns `context`, `prompt` and `response`, or `input`"),
        (("context",), None, "Expected the columns `context` and `prompt`, or `input` and `prompt`, got ['context']"),
        (("context", "prompt", "response"), "1.2", "Expected a `--least-overlap` from 0 to 1, got 1.2"),
        (("context", "prompt", "no response"), "0.2", "Expected a value in each row of the column 'response'"),
    ],
)
def test_what_the_teacher_cannot_answer_is_said_before_the_model_is_loaded(tmp_path, columns, share, message, capsys):
    file = str(tmp_path / "given.parquet")
    rows = {name: ["a", "a"] for name in columns if name != "no response"}
    if "no response" in columns:
        rows["response"] = ["a", None]
    Dataset.from_dict(rows).to_parquet(file)
    options = [] if share is None else ["--least-overlap", share]
    assert main(["write-responses", "--data", file, "--output", "new", "--model", "none", *options]) != 0
    assert message in capsys.readouterr().err


def test_responses_that_are_token_ids_cannot_be_compared_with_the_teachers(tmp_path, capsys):
    file = str(tmp_path / "given.parquet")
    Dataset.from_dict({"context": ["a"], "prompt": ["b"], "response": [[3, 4]]}).to_parquet(file)
    options = ["--data", file, "--output", "new", "--model", "none", "--least-overlap", "0.2"]
    assert main(["write-responses", *options]) != 0
    assert "Expected responses that are text, got List(Value('int64')); decode them." in capsys.readouterr().err


@pytest.mark.parametrize(
    ("preset", "steps"), [("sft_cpu", 350), ("sft_round_cpu", 90), ("sft_comparison", 800), ("sft_gpu_135m", 98)]
)
def test_the_preset_is_understood(tmp_path, preset, steps):
    from trl import TrlParser

    from icae.trainers.scripts import ICAEArguments
    from icae.trainers.sft import SFTArguments

    file = Path(__file__).parents[1] / "trainers" / "presets" / f"{preset}.yaml"
    parser = TrlParser((SFTArguments, ICAEArguments, ICAESFTConfig))
    options = ["--output_dir", str(tmp_path), "--tf32", "false"]  # transformers refuses it where there is no GPU
    _, _, config = parser.parse_args_and_config(["--config", str(file), *options])
    assert config.pretraining_share > 0 and config.max_steps == steps


def test_icae_sft_stops_when_validation_gets_no_better(config_file, capsys):
    def steps(*more: str) -> int:
        options = ["--load_best_model_at_end", "true", "--learning_rate", "0", "--resume", "true", *more]
        options += ["--metric_for_best_model", "response_loss", "--greater_is_better", "false"]
        assert main(["sft", "--config", str(config_file), *options]) == 0
        return json.loads((config_file.parent / "run" / "trainer_state.json").read_text())["global_step"]

    patience = ["--early_stopping_patience", "2"]
    assert steps(*patience, "--max_steps", "2") == 2
    assert steps(*patience) == 3  # nothing was learnt after the first, which the resumed run remembers
    assert "is complete" not in capsys.readouterr().out
    assert steps(*patience) == 3
    assert "is complete: 3 steps" in capsys.readouterr().out


def test_patience_without_a_measure_is_refused_before_anything_is_loaded(config_file, capsys):
    options = ["--early_stopping_patience", "2", "--base_model", "none"]
    assert main(["sft", "--config", str(config_file), *options]) == 2
    assert "Expected `metric_for_best_model` beside `early_stopping_patience`" in capsys.readouterr().err


def test_the_held_out_loss_does_not_depend_on_the_batches(make_trainer):
    rows = {
        "context": ["A red cat.", "It sat there."],
        "prompt": ["Who?", "Where?"],
        "response": ["cat", "there, long"],
    }
    samples = prepare_sft_dataset(Dataset.from_dict(rows), make_trainer().model, pretraining_share=0.4)
    assert {len(sample["prompt_ids"]) for sample in samples} == {0, 1}
    found = []
    for size in (1, 2, 4):
        trainer = make_trainer(per_device_eval_batch_size=size, eval_generations=0)
        torch.manual_seed(0)
        for parameter in trainer.model.trainable_parameters().values():
            torch.nn.init.normal_(parameter, std=0.1)
        logged = trainer.evaluate(samples)
        tested = trainer.predict(samples).metrics
        assert tested["test_loss"] == pytest.approx(logged["eval_loss"])
        names = ("loss", "response_loss", "ae_loss", "lm_loss", "ae_accuracy")
        found.append([logged[f"eval_{name}"] for name in names])
    assert found[1] == pytest.approx(found[0], rel=1e-4) and found[2] == pytest.approx(found[0], rel=1e-4)
    loss, of_responses, written_out, gone_on, _ = found[0]
    assert loss == pytest.approx(0.6 * of_responses + 0.4 * (0.5 * written_out + 0.5 * gone_on), rel=1e-4)


def test_a_prepared_stream_is_evaluated_again(make_trainer):
    trainer = make_trainer(data=TRIPLES.to_iterable_dataset(), eval_generations=0)
    assert trainer.evaluate(trainer.eval_dataset)["eval_loss"] == trainer.evaluate()["eval_loss"]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ({}, "Expected triples, got none"),
        ({"context": [], "prompt": [], "response": []}, "Expected triples, got none"),
        (
            {"input": ["a"], "prompt": ["b"], "answer": ["c"], "response": ["d"]},
            r"Expected PwC's columns or this package's, got both .*; remove \['response'\]",
        ),
        (
            {"context": ["a"], "prompt": ["b"], "response": [[{"role": "user", "content": "c"}]]},
            "Expected a response of the assistant's, got one of the role 'user'",
        ),
    ],
)
def test_rows_that_are_no_triples_are_refused(make_icae, rows, message):
    with pytest.raises(ValueError, match=message):
        prepare_sft_dataset(Dataset.from_dict(rows), make_icae())


def test_a_response_may_be_the_assistant_s_message(make_icae):
    model, row = make_icae(), {"context": ["a"], "prompt": [[{"role": "user", "content": "b"}]]}
    said = [
        prepare_sft_dataset(Dataset.from_dict(row | {"response": [response]}), model)["response_ids"][:]
        for response in ("c", [{"role": "assistant", "content": "c"}])
    ]
    assert said[0] == said[1]


@pytest.mark.parametrize("data", [None, TRIPLES.to_list(), datasets.DatasetDict(train=TRIPLES)])
def test_what_is_no_data_set_is_refused_by_its_type(make_trainer, data):
    with pytest.raises(TypeError, match=f"`train_dataset` to be a `Dataset` or .*, got {type(data).__name__}"):
        make_trainer(data=data)


@pytest.mark.slow
def test_two_processes_measure_all_of_the_held_out_data_together_and_part_at_the_end(config_file):
    """Each computes a part; both must know the means, by which runs stop early and the best checkpoint is chosen."""
    script = config_file.parent / "script.py"
    script.write_text(
        "import sys\nfrom pathlib import Path\nfrom icae.cli import main\ncode = main(sys.argv[1:])\n"
        "threads = [file.read_text().strip() for file in Path('/proc/self/task').glob('*/comm')]\n"
        "assert not any('gloo' in name for name in threads), 'a process that exits now may abort'\nsys.exit(code)\n"
    )
    options = ["sft", "--config", str(config_file), "--max_steps", "1", "--eval_on_start", "true"]
    # One process fills its part up with a row of the other's.
    options += ["--per_device_eval_batch_size", "1", "--eval_samples", "3", "--eval_generations", "0", "--output_dir"]
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    alone, together = (str(config_file.parent / name) for name in ("alone", "together"))
    assert main([*options, alone]) == 0
    subprocess.run([sys.executable, *torchrun, str(script), *options, together], check=True, timeout=300)
    found = []
    for run in (alone, together):
        first = json.loads((Path(run) / "trainer_state.json").read_text())["log_history"][0]
        found.append({name: first[f"eval_{name}"] for name in ("response_loss", "ae_loss", "response_accuracy")})
    assert found[1] == pytest.approx(found[0], rel=1e-4)


@pytest.mark.slow
def test_a_tiny_icae_learns_to_answer_from_its_slots(make_trainer, make_icae):
    torch.manual_seed(0)
    model = make_icae(base=make_base(hidden_size=64), lora_r=32, lora_alpha=64, span_length=64)
    options = {"max_steps": 250, "learning_rate": 3e-3, "max_grad_norm": 1.0, "per_device_train_batch_size": 4}
    trainer = make_trainer(model=model, pretraining_share=0, max_new_tokens=20, eval_generations=4, **options)
    trainer.train()
    trainer.evaluate()
    metrics = trainer.state.log_history[-1]
    assert metrics["eval_response_loss"] < 0.5 < 2 < metrics["eval_response_loss_other_text"]
    assert metrics["eval_f1"] > 0.8
