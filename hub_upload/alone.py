"""
Run by path in a process of its own (`python -I alone.py FOLDER OPTIONS OUTPUT`): loads a folder as somebody does who
has no `icae`, with the folder's own code, and writes down what the model says about a fixed input.
"""

import json
import sys

import torch
from safetensors.torch import save_file
from transformers import AutoModel


PROMPT = "Who lives there, and since when?"


@torch.no_grad()
def outputs(model) -> dict[str, torch.Tensor]:
    """Slots, autoencoding losses, and a prompt's token ids, for two rows of token ids, one of them in two spans."""
    length = min(model.config.span_length, 64)
    # Spread over the vocabulary by a large prime; the second row has half the length.
    ids = torch.arange(1, 2 * length + 1).mul(7919).remainder(model.config.text_config.vocab_size).view(2, length)
    mask = torch.ones_like(ids)
    mask[1, length // 2 :] = 0
    output = model(ids.to(model.device), mask.to(model.device), span_length=length - length // 4)
    losses = output.token_losses["autoencoding"][output.token_masks["autoencoding"]]
    answers = model.generate(memory=output.memory, prompt=PROMPT, max_new_tokens=2, do_sample=False)
    assert len(answers) == 2
    tensors = {
        "slots": output.memory.slots[output.memory.mask],
        "losses": losses,
        "prompt": torch.tensor(model.tokenizer(PROMPT)["input_ids"]),
    }
    return {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}


class _Missing:
    """Makes `icae` impossible to import, even where it is installed."""

    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "icae":
            raise ModuleNotFoundError("No module named 'icae'", name="icae")


def main(folder: str, options: str, output: str) -> None:
    sys.meta_path.insert(0, _Missing())  # type: ignore[arg-type]
    model = AutoModel.from_pretrained(folder, trust_remote_code=True, **json.loads(options))
    model.eval()
    save_file(outputs(model), output, metadata={"fingerprint": model.fingerprint})


if __name__ == "__main__":
    main(*sys.argv[1:])
