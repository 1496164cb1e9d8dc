"""
What somebody does who has never seen this repository: `python -I hub_stranger.py STEPS OUTCOMES` takes steps from a
JSON file, `{name: [action, repo, options]}`, and writes what came of each, or the text of its error, to another.
"""

import hashlib
import json
import re
import sys
import tempfile
from pathlib import Path

import torch
from huggingface_hub import hf_hub_download
from peft import PeftModel
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer, pipeline


CONTEXTS = ["Ines Okafor lives in Bergen. Every morning she walks to the harbour.", "A short one."]
PROMPT = "Who lives in Bergen?"
GREEDY = {"max_new_tokens": 8, "do_sample": False}


def digest(tensor: torch.Tensor) -> str:
    return hashlib.sha256(tensor.detach().float().contiguous().numpy().tobytes()).hexdigest()


def outputs(model) -> dict:
    """What an ICAE says of two contexts: equal digests, equal tensors."""
    memory = model.compress(CONTEXTS)
    return {
        "fingerprint": model.fingerprint,
        "slots": digest(memory.slots[memory.mask]),
        "answers": model.generate(memory=memory, prompt=PROMPT, **GREEDY).tolist(),
    }


def answers(pipe) -> list:
    return pipe([{"context": context, "prompt": PROMPT} for context in CONTEXTS], **GREEDY)


def encoded(language_model) -> str:
    """What a base with the adapter makes of some token ids."""
    with torch.no_grad():
        return digest(language_model(torch.arange(5, 25)[None]).logits)


def peft(repo: str, base: str, base_revision: str) -> str:
    base_model = AutoModelForCausalLM.from_pretrained(base, revision=base_revision)
    return encoded(PeftModel.from_pretrained(base_model, repo, subfolder="adapter"))


def save_and_load(repo: str, **options) -> dict:
    with tempfile.TemporaryDirectory() as folder:
        AutoModel.from_pretrained(repo, **options).save_pretrained(folder)
        return outputs(AutoModel.from_pretrained(folder, **options))


def push(repo: str, to: str, token: str, **options) -> dict:
    AutoModel.from_pretrained(repo, **options).push_to_hub(to, token=token)
    return outputs(AutoModel.from_pretrained(to, **options))


def quickstart(repo: str) -> dict:
    """Does what the repository's card says."""
    card = Path(hf_hub_download(repo, "README.md")).read_text(encoding="utf-8")
    names: dict = {}
    exec(re.search(r"```python\n(.*?)```", card, re.DOTALL)[1], names)
    return outputs(names["model"])


def class_of(thing) -> str:
    return f"{type(thing).__module__.split('.')[0]}.{type(thing).__name__}"


ACTIONS = {
    "AutoConfig": lambda *args, **options: class_of(AutoConfig.from_pretrained(*args, **options)),
    "AutoModel": lambda *args, **options: outputs(AutoModel.from_pretrained(*args, **options)),
    "AutoModelForCausalLM": lambda *args, **options: outputs(AutoModelForCausalLM.from_pretrained(*args, **options)),
    "AutoTokenizer": lambda *args, **options: AutoTokenizer.from_pretrained(*args, **options)(PROMPT)["input_ids"],
    "pipeline": lambda repo, **options: answers(pipeline(model=repo, **options)),
    "class": lambda *args, **options: class_of(AutoModelForCausalLM.from_pretrained(*args, **options)),
    "peft": peft,
    "save and load": save_and_load,
    "push": push,
    "quickstart": quickstart,
}


def main(steps: str, outcomes: str) -> None:
    sys.modules["icae"] = None  # type: ignore[assignment]  # an editable install would be found even by `python -I`
    found = {}
    for name, (action, repo, options) in json.loads(Path(steps).read_text()).items():
        try:
            found[name] = ACTIONS[action](repo, **options)
        except Exception as error:
            found[name] = f"{type(error).__name__}: {error}"
    Path(outcomes).write_text(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
