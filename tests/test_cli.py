import io
import json
import sys

import pytest

from icae import ICAEForConditionalGeneration, ICAEMemory
from icae.cli import main
from icae.demo import COLUMN, mark_differences, visible
from tiny import make_base


TEXT = "The lighthouse keeper had not spoken to anyone since October."


@pytest.fixture
def options(make_icae, tokenizer, tmp_path):
    """A saved model, and the options that name it."""
    make_base().save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    from transformers import AutoModelForCausalLM

    make_icae(base=AutoModelForCausalLM.from_pretrained(tmp_path / "base")).save_pretrained(tmp_path / "icae")
    return ["--model", str(tmp_path / "icae"), "--base", str(tmp_path / "base"), "--dtype", "float32"]


@pytest.fixture
def expected(options):
    return ICAEForConditionalGeneration.from_pretrained(options[1]).reconstruct(TEXT)[0]


def test_a_file_is_compressed_and_its_memory_reconstructed(options, expected, tmp_path, capsys):
    (tmp_path / "text.txt").write_text(TEXT)
    memory = str(tmp_path / "text.safetensors")
    assert main(["compress", str(tmp_path / "text.txt"), "-o", memory, *options]) == 0
    assert "61 tokens -> 16 slots" in capsys.readouterr().err
    assert ICAEMemory.load(memory).spans == [[(4, 16), (4, 16), (4, 16), (4, 13)]]
    assert main(["reconstruct", memory, *options]) == 0
    assert capsys.readouterr().out == expected + "\n"


def test_a_text_is_compressed_and_reconstructed_in_one_go(options, expected, tmp_path, capsys):
    (tmp_path / "text.txt").write_text(TEXT)
    assert main(["reconstruct", str(tmp_path / "text.txt"), *options]) == 0
    assert capsys.readouterr().out == expected + "\n"


def test_standard_input_is_a_text(options, expected, monkeypatch, capsys):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(TEXT.encode()), encoding="ascii"))
    assert main(["reconstruct", "-", *options]) == 0
    assert capsys.readouterr().out == expected + "\n"


def test_texts_are_written_in_the_encoding_that_they_are_read_in(options, tmp_path, monkeypatch):
    """Where output goes into a file, the locale may be one without these letters."""
    for content in (TEXT.encode(), b"\xef\xbb\xbf" + TEXT.encode()):  # as some editors start files
        (tmp_path / "text.txt").write_bytes(content)
        written = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
        monkeypatch.setattr(sys, "stdout", written)
        monkeypatch.setattr(ICAEForConditionalGeneration, "reconstruct", lambda _, text: [f"é: {text}"])
        assert main(["reconstruct", str(tmp_path / "text.txt"), *options]) == 0
        written.flush()
        assert written.buffer.getvalue().decode("utf-8").splitlines() == [f"é: {TEXT}"]


def test_lines_end_the_same_wherever_a_text_is_from(options, expected, tmp_path, capsys):
    texts = [f"{TEXT}\n{TEXT}".encode(), f"{TEXT}\r\n{TEXT}".encode()]
    found = []
    for content in texts:
        (tmp_path / "text.txt").write_bytes(content)
        assert main(["reconstruct", str(tmp_path / "text.txt"), *options]) == 0
        found.append(capsys.readouterr().out)
    assert found[0] == found[1]


def test_an_empty_context_among_several_is_refused(options, tmp_path, capsys):
    (tmp_path / "text.txt").write_text(TEXT)
    (tmp_path / "empty.txt").write_text("")
    files = [str(tmp_path / name) for name in ("text.txt", "empty.txt")]
    assert main(["ask", *options, "--prompt", "Who?", "--context", *files]) == 2
    assert "Expected contexts of at least one token, got an empty one in row 0" in capsys.readouterr().err


def test_the_folder_of_a_memory_file_is_looked_for_first(tmp_path, capsys):
    (tmp_path / "text.txt").write_text(TEXT)
    assert main(["compress", str(tmp_path / "text.txt"), "-o", str(tmp_path / "none" / "x.safetensors")]) == 2
    assert "Expected a folder for the memory file, found no" in capsys.readouterr().err


def test_a_text_is_not_replaced_by_its_memory(tmp_path, capsys):
    text = tmp_path / "text.txt"
    text.write_text(TEXT)
    (tmp_path / "link.txt").symlink_to(text)
    for name in ("text.txt", "link.txt"):
        assert main(["compress", str(text), "-o", str(tmp_path / name)]) == 2
        assert "Expected another file for the memory than the text's, got" in capsys.readouterr().err
    assert text.read_text() == TEXT


def test_an_interrupt_at_a_prompt_ends_without_a_traceback(options, tmp_path, monkeypatch, capsys):
    def interrupted(*args):
        raise KeyboardInterrupt

    (tmp_path / "text.txt").write_text(TEXT)
    monkeypatch.setattr("builtins.input", interrupted)
    assert main(["ask", *options, "--context", str(tmp_path / "text.txt")]) == 130


def test_a_demo_of_no_passages_is_refused(options, capsys):
    assert main(["demo", "--max-passages", "0", *options]) == 2
    assert "Expected at least one of the passages to show, got `max_passages` 0" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"", "at least one token"), (b"\xff\xfe\x00", "Expected a text file in UTF-8")],
    ids=["empty", "binary"],
)
def test_a_file_that_is_no_text_is_refused_without_a_traceback(options, tmp_path, capsys, content, message):
    (tmp_path / "bad.txt").write_bytes(content)
    assert main(["compress", str(tmp_path / "bad.txt"), "-o", str(tmp_path / "x.safetensors"), *options]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "x.safetensors").exists()


def test_a_missing_file_is_named(options, tmp_path, capsys):
    assert main(["reconstruct", str(tmp_path / "nowhere.txt"), *options]) == 2
    assert "nowhere.txt" in capsys.readouterr().err


def test_a_damaged_memory_is_refused(options, tmp_path, capsys):
    (tmp_path / "bad.safetensors").write_bytes(b"nonsense")
    assert main(["reconstruct", str(tmp_path / "bad.safetensors"), *options]) == 2
    assert "truncated, was changed or is not an ICAE memory file" in capsys.readouterr().err


def test_a_model_that_is_not_there_is_named(tmp_path, capsys):
    assert main(["demo", "--model", str(tmp_path / "none"), "--base", "x"]) == 2
    assert "none" in capsys.readouterr().err


def test_the_demo_shows_every_passage_and_reads_saved_memories_again(options, tmp_path, capsys):
    assert main(["demo", "--max-passages", "2", "--json", str(tmp_path / "none" / "demo.json"), *options]) == 2
    numbers = tmp_path / "demo.json"
    assert main(["demo", "--max-passages", "2", "--json", str(numbers), *options]) == 0
    printed = capsys.readouterr().out
    assert "── story ──" in printed and "All 2 read the same." in printed
    for result in json.loads(numbers.read_text()):
        assert result["slots"] == -(-result["tokens"] // 4)
        assert result["full_cache_bytes"] / result["memory_bytes"] == pytest.approx(4, rel=0.05)


def test_differences_are_marked():
    assert mark_differences("a red cat sat", "a blue cat", color=False) == {
        "original": ["a [red] cat [sat]"],
        "reconstruction": ["a [blue] cat"],
    }
    assert mark_differences("a b", "a b", color=True)["original"] == ["a b"]
    assert "\033[31mred\033[0m" in mark_differences("red", "blue", color=True)["original"]


def test_columns_are_wrapped_by_what_is_seen_and_keep_lines_and_indents():
    lines = mark_differences("def f():\n    return " + "word " * 30, "def", color=True)["original"]
    assert lines[0].startswith("def") and lines[1].startswith("    ") and len(lines) == 4
    assert all(visible(line) <= COLUMN for line in lines)


@pytest.fixture
def answer(options):
    """What `generate` says about the text."""
    model = ICAEForConditionalGeneration.from_pretrained(options[1])

    def answer(prompt, context=TEXT):
        ids = model.generate([context], prompt, max_new_tokens=5, do_sample=False)
        return model.tokenizer.decode(ids[0], skip_special_tokens=True) + "\n"

    return answer


def test_prompts_are_answered_from_texts_and_from_a_memory(options, answer, tmp_path, capsys):
    (tmp_path / "text.txt").write_text(TEXT)
    (tmp_path / "more.txt").write_text("More.")
    ask = ["ask", "--max-new-tokens", "5", *options, "--prompt", "Who?", "When?"]
    assert main([*ask, "--context", str(tmp_path / "text.txt")]) == 0
    assert capsys.readouterr().out == answer("Who?") + answer("When?")
    assert main([*ask, "--context", str(tmp_path / "text.txt"), str(tmp_path / "more.txt")]) == 0
    assert capsys.readouterr().out == answer("Who?", [TEXT, "More."]) + answer("When?", [TEXT, "More."])
    memory = str(tmp_path / "text.safetensors")
    assert main(["compress", str(tmp_path / "text.txt"), "-o", memory, *options]) == 0
    assert main([*ask, "--memory", memory]) == 0
    assert capsys.readouterr().out == answer("Who?") + answer("When?")


def test_texts_beyond_the_positions_of_the_base_take_a_window(options, tmp_path, capsys):
    text, memory = tmp_path / "long.txt", str(tmp_path / "long.safetensors")
    text.write_text("The keeper counts every vessel. " * 30)
    ask = ["ask", *options, "--prompt", "Who?"]
    assert main([*ask, "--context", str(text)]) == 2
    assert "`compress(..., window=…)` (`--window`) takes longer documents" in capsys.readouterr().err
    assert main([*ask, "--context", str(text), "--window", "256"]) == 0
    said = capsys.readouterr()
    assert "960 tokens in 240 slots" in said.err and "Compressing" in said.err
    assert main(["compress", str(text), "-o", memory, "--window", "256", *options]) == 0
    assert "Compressing" in capsys.readouterr().err
    assert main([*ask, "--memory", memory]) == 0
    assert capsys.readouterr().out == said.out


def test_an_answer_ends_where_the_positions_of_the_base_do(options, tmp_path, capsys):
    (tmp_path / "text.txt").write_text("x" * 470)
    ask = ["ask", *options, "--context", str(tmp_path / "text.txt"), "--prompt", "?"]
    assert main([*ask, "--max-new-tokens", "128"]) == 0
    assert capsys.readouterr().out


def test_typed_prompts_are_answered_until_an_empty_line(options, answer, tmp_path, monkeypatch, capsys):
    (tmp_path / "text.txt").write_text(TEXT)
    monkeypatch.setattr(sys, "stdin", io.StringIO("Who?\nWhen?\n\nWhere?\n"))
    assert main(["ask", "--max-new-tokens", "5", *options, "--context", str(tmp_path / "text.txt")]) == 0
    assert capsys.readouterr().out == answer("Who?") + answer("When?")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--prompt", "Who?"], "Expected either `--context` or `--memory`, got neither or both"),
        (["--context", "a", "--memory", "b"], "Expected either `--context` or `--memory`, got neither or both"),
        (["--context", "-"], "Expected `--prompt` beside a context from standard input"),
        (["--memory", "a", "--window", "64"], "Expected `--window` with `--context`, which is compressed now"),
    ],
)
def test_ask_says_what_is_missing(arguments, message, capsys):
    assert main(["ask", *arguments]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("number", ["0", "1.5", "many"])
def test_numbers_of_things_are_whole_and_not_too_small(number, capsys):
    with pytest.raises(SystemExit):
        main(["ask", "--memory", "a", "--max-new-tokens", number])
    message = f"--max-new-tokens: expected a whole number of at least 1, got '{number}'"
    assert message in capsys.readouterr().err


def test_prompts_that_cannot_be_decoded_are_refused(options, tmp_path, monkeypatch, capsys):
    (tmp_path / "text.txt").write_text(TEXT)
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"caf\xe9\n"), encoding="utf-8"))
    assert main(["ask", *options, "--context", str(tmp_path / "text.txt")]) == 2
    assert "Expected prompts in utf-8, got other bytes" in capsys.readouterr().err


def test_a_name_that_is_not_found_anywhere_is_said(tmp_path, capsys):
    (tmp_path / "text.txt").write_text(TEXT)
    assert main(["ask", "--model", "no-such-icae", "--context", str(tmp_path / "text.txt")]) == 2
    assert "Expected the folder or Hub id of an ICAE, got 'no-such-icae': " in capsys.readouterr().err


def test_a_package_that_only_some_commands_need_is_named_with_its_extra(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)
    for module in ("icae.evaluation.sweep", "icae.evaluation.curves"):
        monkeypatch.delitem(sys.modules, module, raising=False)
    assert main(["sweep", "none.yaml"]) == 2
    assert "this command needs more than the others: `pip install 'icae[eval]'`" in capsys.readouterr().err
