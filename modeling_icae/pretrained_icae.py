# Copyright 2026 The ICAE authors. Licensed under the Apache License, Version 2.0.
"""What an ICAE is made of (frozen base, adapter, slot embeddings), and how that is made, loaded and saved."""

import copy
import hashlib
import inspect
import json
import os
import re
import shutil
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from importlib import import_module
from itertools import chain
from pathlib import Path
from typing import Any, Self
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from peft import LoraConfig, PeftModel, get_peft_model_state_dict, set_peft_model_state_dict
from peft.tuners.lora import Linear as LoraLinear
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.layer import ParamWrapper
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.utils import cached_file

from .checkpointing_icae import checkpointed_forward
from .configuration_icae import ICAEConfig


ADAPTER = "icae"
LAYERS_WITH_KEYS_AND_VALUES = ("full_attention", "sliding_attention", "chunked_attention", "attention")
ADAPTER_FOLDER = "adapter"
SLOTS_FILE = "icae_slots.safetensors"
HUB_KWARGS = ("cache_dir", "force_download", "local_files_only", "token", "proxies", "revision", "subfolder")
AUTO_MAP = {
    "AutoConfig": "configuration_icae.ICAEConfig",
    "AutoModel": "modeling_icae.ICAEForConditionalGeneration",
    "AutoModelForCausalLM": "modeling_icae.ICAEForConditionalGeneration",
}
CUSTOM_PIPELINES = {
    "icae-context-generation": {
        "impl": "pipeline_icae.ICAEContextGenerationPipeline",
        "pt": ["AutoModel"],
        "type": "text",
    }
}
# A model has one adapter, which is either on or off. (A lock in the model itself could not be copied or pickled.)
_SWITCHES: WeakKeyDictionary[nn.Module, Any] = WeakKeyDictionary()
AUTO_KWARGS = ("_from_auto", "_from_pipeline", "adapter_kwargs", "code_revision", "_commit_hash", "trust_remote_code")


class ICAEPreTrainedModel(PreTrainedModel):
    """
    The parts of an ICAE, shared by all that is built on it: `language_model` (the base, loaded once and frozen, with a
    LoRA adapter inside), `memory_embeddings` (input embeddings of the slots) and `task_embeddings` (`[AE]`, `[LM]`).
    """

    config: ICAEConfig
    language_model: Any  # a causal language model of any family
    config_class = ICAEConfig
    base_model_prefix = ""
    main_input_name = "context_ids"
    supports_gradient_checkpointing = True
    accepts_loss_kwargs = False  # losses are means over the target tokens of the micro-batch
    _supports_sdpa = _supports_flash_attn = _supports_flex_attn = _supports_attention_backend = True

    def __init__(self, config: ICAEConfig, base_model: PreTrainedModel | None = None):
        super().__init__(config)
        config._attn_implementation_internal = None  # the base has its own; what is set here was asked for
        if base_model is None and config.text_config is None:
            raise ValueError(
                "Expected a base, or a configuration that describes one (`text_config`), got neither; use `from_base`."
            )
        if base_model is None:
            base_model = AutoModelForCausalLM.from_config(config.text_config)
        config.text_config = base_model.config
        self.language_model = base_model.requires_grad_(False)
        embeddings = base_model.get_input_embeddings().weight
        size = embeddings.shape[1]
        self.memory_embeddings = nn.Parameter(torch.empty(config.max_slots_per_span, size, device=embeddings.device))
        self.task_embeddings = nn.Parameter(torch.empty(2, size, device=embeddings.device))  # [AE], [LM]
        self.generation_config = copy.deepcopy(base_model.generation_config)
        self.generation_config.use_cache = True  # some bases are saved without, as they were trained
        self._fill_ends()
        self.post_init()
        self._initialize_slots()

        # Behind post_init(), which would initialise the adapter's B matrices away from zero.
        left_alone = _left_alone(config, base_model)
        base_model.add_adapter(
            LoraConfig(
                r=config.lora_r,
                lora_alpha=config.lora_alpha,
                lora_dropout=config.lora_dropout,
                target_modules=config.lora_target_modules,
                exclude_modules=left_alone,
                task_type="CAUSAL_LM",
            ),
            ADAPTER,
        )
        for name, module in list(base_model.named_modules()):
            # Of stacked experts and their routers PEFT adapts the parameters, for which it excludes nothing.
            parent, _, own = name.rpartition(".")
            inner = own == "base_layer"  # of two parameters, one wrapper in the other
            if isinstance(module, ParamWrapper) and not inner and left_alone and re.fullmatch(left_alone, name):
                setattr(base_model.get_submodule(parent), own, module.get_base_layer())
        if any(isinstance(part(), LoraLayer) for part in (self.get_input_embeddings, self.get_output_embeddings)):
            raise ValueError(
                f"Expected `lora_target_modules` within the layers of the base, got {config.lora_target_modules!r}: "
                "embeddings and head are the frozen decoder's, and would not be trained."
            )
        self._lora_layers = [module for module in base_model.modules() if isinstance(module, LoraLayer)]
        for layer in self._lora_layers:
            layer._disable_adapters = True  # at rest `language_model` is the frozen base
            if type(layer) is LoraLinear:  # quantised layers have forward methods of their own
                layer.forward = partial(_lora_forward, layer)
        self._tokenizer: PreTrainedTokenizerBase | None = None
        self._hub_kwargs: dict[str, Any] = {}  # for the tokenizer, which is loaded later
        self._other_base: str | None = None  # the fingerprint of one that was taken with `verify_base=False`
        self._fingerprint: tuple[Any, str] | None = None
        self.eval()

    def _init_weights(self, module):
        pass  # nothing of the base may be initialised again; see `_initialize_slots`

    @torch.no_grad()
    def _initialize_slots(self) -> None:
        """Memory and task embeddings start like words of the base: the mean and spread of its input embeddings."""
        embeddings = self.language_model.get_input_embeddings()
        if embeddings.weight.is_meta:
            return
        # What the layer gives rather than its weight, which Gemma's multiplies by the root of the hidden size.
        words = embeddings(torch.arange(len(embeddings.weight), device=embeddings.weight.device)).float()
        mean, std = words.mean(dim=0), words.std(dim=0)
        for parameter in (self.memory_embeddings, self.task_embeddings):
            parameter.copy_(mean + std * torch.randn(parameter.shape, device="cpu").to(std.device))

    # ------------------------------------------------------------------------------------------------ make, load, save

    @classmethod
    def from_base(
        cls,
        base: str | os.PathLike | PreTrainedModel,
        config: ICAEConfig | None = None,
        *,
        tokenizer: PreTrainedTokenizerBase | None = None,
        **kwargs,
    ) -> Self:
        """
        A new, untrained ICAE around a base model, ready for training (adapter and slots in float32).

        Args:
            base (`str`, `os.PathLike` or `PreTrainedModel`):
                Hub id or folder of a causal language model, or a loaded one, which then belongs to the ICAE.
            config ([`ICAEConfig`], *optional*):
                How to compress. The fields about the base are filled in; set `base_model_name_or_path` yourself when
                `base` is a local copy of a model that others should find on the Hub.
            tokenizer (`PreTrainedTokenizerBase`, *optional*):
                The base's tokenizer. By default it is loaded from the base when text is first given.
            kwargs:
                Passed to `AutoModelForCausalLM.from_pretrained` (`dtype`, `device_map`, `quantization_config`, …).

        Raises:
            `ValueError`: if the base cannot be found, is in float16, has no end token, or cannot read slots: it has
                layers without keys and values, reads token ids or images too, has a body or head of unknown form, or
                gives no finite numbers at negative positions;
                or if the adapter should be in its embeddings or head.
        """
        config = copy.deepcopy(config) if config is not None else ICAEConfig()
        revision = kwargs.get("revision")
        if isinstance(base, str | os.PathLike):
            base = _load_base(str(base), **kwargs)
        _check_is_model(base)
        config.base_model_name_or_path = config.base_model_name_or_path or base.config._name_or_path
        config.base_model_revision = revision
        config.base_model_fingerprint = _base_fingerprint(base)
        _check_base(base)
        config.text_config = base.config
        config._check()
        model = cls(config, base_model=base)
        model._check_logits()
        model._tokenizer = tokenizer
        model._hub_kwargs = {key: kwargs[key] for key in HUB_KWARGS if key in kwargs and key != "revision"}
        model._make_trainable(True)
        return model

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike,
        *,
        config: PreTrainedConfig | str | os.PathLike | None = None,
        base_model: str | os.PathLike | PreTrainedModel | None = None,
        is_trainable: bool = False,
        verify_base: bool = True,
        **kwargs,
    ) -> Self:
        """
        Loads a trained ICAE: its adapter and slots from `pretrained_model_name_or_path`, its base from where the
        configuration says.

        Args:
            pretrained_model_name_or_path (`str` or `os.PathLike`):
                Hub id or folder of the ICAE.
            config ([`ICAEConfig`], `str` or `os.PathLike`, *optional*):
                Configuration to use instead of the saved one, or the folder or Hub id of it.
            base_model (`str`, `os.PathLike` or `PreTrainedModel`, *optional*):
                Where to take the base from instead of `config.base_model_name_or_path`.
            is_trainable (`bool`, *optional*, defaults to `False`):
                Whether adapter and slots get gradients (and float32 weights).
            verify_base (`bool`, *optional*, defaults to `True`):
                Whether to refuse a base whose weights are not those that the ICAE was trained on. Otherwise, what
                it compresses on another base is of another model.
            kwargs:
                Hub arguments (`revision`, `token`, `cache_dir`, …) or arguments of
                `AutoModelForCausalLM.from_pretrained` for the base (`dtype`, by default and with `"auto"` that of its
                training, `device_map`, `quantization_config`, …).

        Raises:
            `ValueError`: if the base cannot be found or is another one, if a file is missing or damaged, or if a
                `device_map` leaves layers with an adapter on disk or in another memory.
            `OSError`: if there is no such folder or repository.
        """
        path = str(pretrained_model_name_or_path)
        kwargs = {key: value for key, value in kwargs.items() if key not in AUTO_KWARGS}
        hub = {key: kwargs.pop(key) for key in HUB_KWARGS if key in kwargs}
        own: Any = config  # of an AutoModel call, it may come from a twin module
        if not isinstance(config, PreTrainedConfig):
            own = ICAEConfig.from_pretrained(path if config is None else config, **hub)
            if own.text_config is None:
                raise ValueError(
                    f"Expected an ICAE checkpoint with 'config.json' at {path!r}, but there is none or it describes "
                    "no base; give the folder or Hub id of a saved ICAE."
                )
        if base_model is not None and not isinstance(base_model, str | os.PathLike):
            _check_is_model(base_model)
            base = base_model
        else:
            shared = {key: value for key, value in hub.items() if key not in ("revision", "subfolder")}
            revision = own.base_model_revision if base_model is None else None
            dtype = getattr(own.text_config, "dtype", None)
            if dtype is not None and "torch_dtype" not in kwargs and kwargs.get("dtype", "auto") == "auto":
                kwargs["dtype"] = dtype  # as in training, not as stored, which may be float16
            if own._attn_implementation is not None:  # where AutoModel puts it
                kwargs.setdefault("attn_implementation", own._attn_implementation)
            base = _load_base(
                str(base_model or own.base_model_name_or_path or ""), revision=revision, **shared, **kwargs
            )
        _check_base(base)
        found, known, other_base = _base_fingerprint(base), own.base_model_fingerprint, None
        if bases_differ(found, known):
            if verify_base:
                raise ValueError(
                    f"Expected the base model {own.base_model_name_or_path!r} (fingerprint "
                    f"{known}), got {base.config._name_or_path!r} (fingerprint "
                    f"{found}). Slots are written for one set of weights: pass the right `base_model`, or "
                    "`verify_base=False` if you know that the difference is harmless."
                )
            other_base = found
        model = cls(copy.deepcopy(own), base_model=base)
        model._other_base = other_base
        model._make_trainable(is_trainable)  # first, so that float32 weights are not rounded on their way
        if offloaded := [name for name, one in model.trainable_parameters().items() if one.is_meta]:
            raise ValueError(
                f"Expected the slots and all layers with an adapter on their devices, got {len(offloaded)} offloaded "
                f"tensors, first {offloaded[0]!r}; load the base in 4 bits (`quantization_config`), or give a "
                "`device_map` that needs neither the disk nor the CPU beside an accelerator."
            )
        model.load_icae_weights(path, **hub)
        model.name_or_path, model._hub_kwargs = path, hub
        silent = ("_raise_exceptions_for_missing_entries", "_raise_exceptions_for_connection_errors")
        if cached_file(path, "generation_config.json", **dict.fromkeys(silent, False), **hub):
            try:
                model.generation_config = GenerationConfig.from_pretrained(path, **hub)
            except OSError as error:
                raise ValueError(
                    f"Expected a 'generation_config.json' in JSON at {path!r}, got a damaged one ({error}); save the "
                    "model again, or remove the file."
                ) from error
            model._fill_ends()
        return model.eval()  # without the file: the base's own, copied in __init__

    def _fill_ends(self) -> None:
        """Answers end where the base's texts end, too, also if its generation_config does not say so."""
        if self.generation_config.eos_token_id is None or len(self.end_token_ids) > 1:
            self.generation_config.eos_token_id = self.end_token_ids

    def load_icae_weights(self, path: str | os.PathLike, **hub_kwargs) -> None:
        """
        Loads adapter, memory embeddings and task embeddings in place from a saved ICAE.

        Raises:
            `ValueError`: if a file is missing or damaged, or if a tensor is missing, left over or of another shape.
        """
        slots = _load_safetensors(path, SLOTS_FILE, **hub_kwargs)
        adapter = _load_safetensors(path, f"{ADAPTER_FOLDER}/adapter_model.safetensors", **hub_kwargs)
        adapter = {key.removeprefix("base_model.model."): value for key, value in adapter.items()}
        for what, found, expected in (
            (SLOTS_FILE, slots, self._slots_state_dict()),
            ("the adapter", adapter, get_peft_model_state_dict(self.language_model, adapter_name=ADAPTER)),
        ):
            shapes = {key: tuple(value.shape) for key, value in found.items()}
            wanted = {key: tuple(value.shape) for key, value in expected.items()}
            if shapes != wanted:
                odd = sorted(key for key in shapes.keys() | wanted.keys() if shapes.get(key) != wanted.get(key))
                raise ValueError(
                    f"Expected {what} in {str(path)!r} to hold {len(wanted)} tensors as the configuration says, but "
                    f"{len(odd)} are missing, left over or of another shape, first {odd[0]!r}: expected "
                    f"{wanted.get(odd[0])}, got {shapes.get(odd[0])}. Load the files and the config.json of one and "
                    "the same checkpoint."
                )
        with torch.no_grad():
            self.memory_embeddings.copy_(slots["memory_embeddings"])
            self.task_embeddings.copy_(slots["task_embeddings"])
        set_peft_model_state_dict(self.language_model, adapter, adapter_name=ADAPTER)

    def save_pretrained(
        self,
        save_directory: str | os.PathLike,
        is_main_process: bool = True,
        state_dict: dict[str, torch.Tensor] | None = None,
        dtype: torch.dtype | str | None = None,
        with_code: bool = True,
        **kwargs,
    ) -> None:
        """
        Saves what training changed — adapter and slots — with the configuration and, if loaded, the tokenizer. The
        base model is not copied.

        Args:
            save_directory (`str` or `os.PathLike`):
                The folder, made if missing.
            is_main_process (`bool`, *optional*, defaults to `True`):
                Only the main process writes.
            state_dict (`dict[str, torch.Tensor]`, *optional*):
                Weights to save instead of the model's own, as DeepSpeed gathers them.
            dtype (`torch.dtype` or `str`, *optional*):
                Stores the tensors in this dtype, for example `torch.bfloat16` for publishing.
            with_code (`bool`, *optional*, defaults to `True`):
                Also writes the model's code, so that the folder loads with `trust_remote_code=True` where this
                package is not installed.

        Raises:
            `ValueError`: if the folder holds another kind of model, or with `push_to_hub`.
        """
        if kwargs.get("push_to_hub"):
            raise ValueError("Expected no `push_to_hub` here, got True; call `model.push_to_hub(repo_id)` instead.")
        if not is_main_process:
            return
        folder = Path(save_directory)
        check_folder(folder)
        stored: torch.dtype | None = getattr(torch, dtype) if isinstance(dtype, str) else dtype
        (folder / ADAPTER_FOLDER).mkdir(parents=True, exist_ok=True)

        config = copy.deepcopy(self.config)
        config.architectures = [type(self).__name__]
        config.text_config.__dict__.pop("quantization_config", None)
        config.text_config._name_or_path = ""  # a path of this machine; `base_model_name_or_path` names the base
        config.text_config.dtype = self.get_input_embeddings().weight.dtype  # which a cast does not tell it
        for name in ("auto_map", "custom_pipelines"):
            config.__dict__.pop(name, None)
        if with_code:
            config.auto_map, config.custom_pipelines = AUTO_MAP, CUSTOM_PIPELINES
            for file in self._code_files():
                if file.parent != folder.resolve():
                    shutil.copyfile(file, folder / file.name)
        config.save_pretrained(folder)
        # Not `save_pretrained`, which refuses what the configurations of some bases hold (Vicuna's).
        self.generation_config.to_json_file(folder / "generation_config.json")

        def packed(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
            return {key: value.detach().to(device="cpu", dtype=stored).contiguous() for key, value in tensors.items()}

        save_file(packed(self._slots_state_dict(state_dict)), folder / SLOTS_FILE, metadata={"format": "pt"})
        inner = state_dict and {
            key.removeprefix("language_model."): value
            for key, value in state_dict.items()
            if key.startswith("language_model.")
        }
        adapter = get_peft_model_state_dict(self.language_model, state_dict=inner, adapter_name=ADAPTER)
        save_file(
            {f"base_model.model.{key}": value for key, value in packed(adapter).items()},
            folder / ADAPTER_FOLDER / "adapter_model.safetensors",
            metadata={"format": "pt"},
        )
        adapter_config = copy.deepcopy(self.language_model.peft_config[ADAPTER])
        adapter_config.base_model_name_or_path = self.config.base_model_name_or_path
        adapter_config.inference_mode = True
        if isinstance(adapter_config.target_modules, set):
            adapter_config.target_modules = sorted(adapter_config.target_modules)  # the same file every time
        adapter_config.save_pretrained(folder / ADAPTER_FOLDER)
        if self._tokenizer is not None:
            self._tokenizer.save_pretrained(folder)

    def push_to_hub(self, repo_id: str, **kwargs):
        """
        Uploads the model — adapter, slots, configuration, tokenizer, code and a card, not the base — in one commit.

        Where the package `icae` is installed, what is uploaded is first loaded in a process of its own and compared
        with this model, and the card says what is known of it.

        Args:
            repo_id (`str`):
                The repository, `"org/name"`, made if missing.
            kwargs:
                Of those that models of transformers take: `private`, `create_pr`, `revision`, `token`,
                `commit_message`, `commit_description`, `tags`.

        Returns:
            `CommitInfo`: the commit.

        Raises:
            `ValueError`: if the base is named by a path, where nobody else would find it.
        """
        base = self.config.base_model_name_or_path
        if not base or os.path.exists(base):
            raise ValueError(
                f"Expected the Hub id of the base in `model.config.base_model_name_or_path`, got {base!r}, which "
                "others cannot load; set it."
            )
        self.tokenizer  # noqa: B018  # loaded, so that it is saved
        if __package__ == "icae.modeling_icae":  # not from a Hub repository, where `icae` may be missing
            return import_module("icae.hub_upload").push_model(self, repo_id, **kwargs)
        tags = kwargs.pop("tags", None) or []
        kwargs["tags"] = ["icae", "context-compression", "custom_code", *([tags] if isinstance(tags, str) else tags)]
        kwargs["commit_message"] = kwargs.get("commit_message") or "Upload ICAE"
        return super().push_to_hub(repo_id, **kwargs)

    @staticmethod
    def _code_files() -> list[Path]:
        """The files that make a folder load by itself: those beside this one, and that of the configuration."""
        siblings = sorted(Path(__file__).resolve().parent.glob("*_icae.py"))
        configuration = Path(inspect.getfile(ICAEConfig)).resolve()
        return [configuration, *(file for file in siblings if file.name != configuration.name)]

    def _slots_state_dict(self, state_dict: dict[str, torch.Tensor] | None = None) -> dict[str, torch.Tensor]:
        names = ("memory_embeddings", "task_embeddings")
        return {name: state_dict[name] if state_dict else getattr(self, name) for name in names}

    def _make_trainable(self, trainable: bool) -> None:
        base_dtype = self.language_model.get_input_embeddings().weight.dtype
        for parameter in self.trainable_parameters().values():
            parameter.requires_grad_(trainable)
            parameter.data = parameter.data.to(torch.float32 if trainable else base_dtype)

    def trainable_parameters(self) -> dict[str, nn.Parameter]:
        """What training changes, by name: the adapter's matrices, `memory_embeddings` and `task_embeddings`."""
        return {name: parameter for name, parameter in self.named_parameters() if _is_icae_parameter(name)}

    @property
    def end_token_ids(self) -> list[int]:
        """Tokens that end a text for this base, its own end token first, then others that end its answers (Phi-3)."""
        own, answers = self.config.text_config.eos_token_id, self.generation_config.eos_token_id
        listed = [end if isinstance(end, list) else [end] for end in (own, answers) if end is not None]
        return list(dict.fromkeys(chain(*listed)))

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The base's tokenizer, loaded when first needed."""
        if self._tokenizer is None:
            named, came_from = self.config.base_model_name_or_path, self.language_model.name_or_path
            hub = {key: value for key, value in self._hub_kwargs.items() if key not in ("revision", "subfolder")}
            base_hub = hub | {"revision": self.config.base_model_revision}
            sources = {
                # The ICAE's configuration is at hand; its file may name code, which would have to be trusted.
                self.name_or_path: {"config": self.config, **self._hub_kwargs},
                came_from: base_hub if came_from == named else hub,
                named: base_hub,
            }
            reason: Exception = ValueError("no name is known")
            for source in filter(None, sources):  # the ICAE's own first
                try:
                    self._tokenizer = AutoTokenizer.from_pretrained(source, **sources[source])
                    return self._tokenizer
                except (OSError, ValueError) as error:
                    reason = error
            raise ValueError(
                f"Expected a tokenizer at one of {list(sources)}, found none ({reason}); set `model.tokenizer` or "
                "give token ids."
            ) from reason
        return self._tokenizer

    @tokenizer.setter
    def tokenizer(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer

    @property
    def fingerprint(self) -> str:
        """Digest of base, adapter, memory embeddings and configuration: which model a memory belongs to."""
        parameters = self.trainable_parameters()
        # Fused optimizers change weights without counting a version: the slots, which every step of training changes
        # unless they are frozen, are compared as well.
        slots = self.memory_embeddings.detach().float().cpu().numpy().tobytes()
        # Tensors of inference mode have no version, and do not change.
        counted = ((one.data_ptr(), None if one.is_inference() else one._version) for one in parameters.values())
        versions = (slots, *counted)
        if self._fingerprint is None or self._fingerprint[0] != versions:
            kind = [self.config.memory_type, self.config.encoder_layout, self.config.lora_alpha]
            base = self._other_base or self.config.base_model_fingerprint
            digest = hashlib.sha256(json.dumps([base, *kind]).encode())
            # The task embeddings are the decoder's; the slots do not depend on them.
            encoder = (parameter for name, parameter in parameters.items() if name != "task_embeddings")
            digest.update(_digest(encoder).encode())
            self._fingerprint = versions, digest.hexdigest()[:16]
        return self._fingerprint[1]

    # ------------------------------------------------------------------------------------------------- adapter, modes

    @contextmanager
    def adapter(self, enabled: bool) -> Iterator[None]:
        """
        Switches the encoder's adapter on or off for a block, and back whatever happens in it. Other threads that want
        to switch it wait for the end of the block: where several use the model, calls of `model.language_model` itself
        belong in `with model.adapter(False):`.

        Raises:
            `ValueError`: if the adapter was merged into the base, which would then no longer be the frozen one.
        """
        if any(layer.merged for layer in self._lora_layers):
            raise ValueError(
                "Expected the adapter beside the frozen base, got it merged into its weights; unmerge it."
            )
        with _SWITCHES.setdefault(self, threading.RLock()):
            before = [layer._disable_adapters for layer in self._lora_layers]
            # Only the flag: PEFT's `disable_adapters()` also flips requires_grad, which would lose the gradients.
            for layer in self._lora_layers:
                layer._disable_adapters = not enabled
            try:
                yield
            finally:
                for layer, disabled in zip(self._lora_layers, before, strict=True):
                    layer._disable_adapters = disabled

    @property
    def adapter_enabled(self) -> bool:
        """Whether the adapter is on; at rest it is off."""
        return not self._lora_layers[0]._disable_adapters

    def train(self, mode: bool = True) -> Self:
        """Only the adapter's dropout ever trains: the frozen base stays in eval mode."""
        super().train(mode)
        self.language_model.eval()
        for layer in self._lora_layers:
            layer.lora_dropout.train(mode)
        return self

    def get_input_embeddings(self) -> nn.Module:
        return self.language_model.get_input_embeddings()

    def get_output_embeddings(self) -> nn.Module:
        return self.language_model.get_output_embeddings()

    def resize_token_embeddings(self, *args, **kwargs):
        """Raises a `ValueError`: the base is frozen, and slots are written for its very weights."""
        raise ValueError(
            "Expected the base as it is, got a new size of its embeddings; resize and save the base, then make a new "
            "ICAE with `from_base`."
        )

    def _set_gradient_checkpointing(self, enable=True, gradient_checkpointing_func=checkpoint, every_n_layers=1):
        layers = [module for module in self.language_model.modules() if isinstance(module, GradientCheckpointingLayer)]
        for index, layer in enumerate(layers):
            before = layer.__dict__.pop("forward", None)  # accelerate's hooks stand here too
            if isinstance(before, partial) and before.func is checkpointed_forward:
                before = before.keywords["before"]
            if enable and index % every_n_layers == 0:
                layer.forward = partial(  # a partial, because copy.deepcopy copies what is bound in it
                    checkpointed_forward, self, layer, index, gradient_checkpointing_func, before=before
                )
            elif before is not None:
                layer.forward = before


def _is_icae_parameter(name: str) -> bool:
    return name in ("memory_embeddings", "task_embeddings") or ".lora_" in name


def _lora_forward(layer: LoraLinear, x: torch.Tensor) -> torch.Tensor:
    """
    What PEFT's layer computes, in fewer passes over the activations: its float32 weights are cast to the dtype of the
    activations, not the other way round, and scale and sum are part of the matrix product.
    """
    if layer.disable_adapters:
        return layer.base_layer(x)
    flat = x.flatten(0, -2)
    low_rank = F.linear(layer.lora_dropout[ADAPTER](flat), layer.lora_A[ADAPTER].weight.to(x.dtype))
    up = layer.lora_B[ADAPTER].weight.to(low_rank.dtype)  # not that of x under autocast
    output = layer.base_layer(flat).addmm_(low_rank, up.T, alpha=layer.scaling[ADAPTER])
    return output.unflatten(0, x.shape[:-1])


def _left_alone(config: ICAEConfig, base: PreTrainedModel) -> str | None:
    """
    Modules, as a regular expression, that get no adapter: linear layers named `router`, which give more than a product
    (Phi-3.5-MoE), and those that could not change a slot, for keys and values of the last layer are made before that
    layer's queries, output and feed-forward block.
    """
    modules = []
    if any(name.endswith(".router") for name, _ in base.named_modules()):
        modules.append(r".*\.router")
    if config.memory_type == "key_values":
        others = r"(mlp|feed_forward|block_sparse_moe)\.|(q_proj|q_[ab]_proj|o_proj|out_proj|c_proj|dense|fc1|fc2)$"
        modules.append(rf".*\.{config.text_config.num_hidden_layers - 1}\.(?=.*({others})).*")
    return "|".join(modules) or None


def check_folder(folder: Path) -> None:
    """Raises a `ValueError` if the 'config.json' of something else lies in a folder that an ICAE is to be saved in."""
    file = folder / "config.json"
    if not file.is_file():
        return
    content = json.loads(file.read_text(encoding="utf-8"))
    kind = content.get("model_type") if isinstance(content, dict) else None
    if kind != ICAEConfig.model_type:
        held = f"a model of the type {kind!r}" if kind else "a 'config.json' that is no model's"
        raise ValueError(
            f"Expected a folder of its own for the ICAE, got {str(folder)!r}, which holds {held}; give another one."
        )


def _check_is_model(base: Any) -> None:
    if isinstance(base, ICAEPreTrainedModel):
        raise ValueError(
            f"Expected the base of an ICAE, got {base.config._name_or_path!r}, an ICAE itself; load it with "
            "`from_pretrained`, or give the language model that it extends."
        )
    if isinstance(base, PeftModel) or (
        isinstance(base, nn.Module) and any(isinstance(module, BaseTunerLayer) for module in base.modules())
    ):
        raise ValueError(
            f"Expected a base without adapters, got {type(base).__name__} with one inside, which reading memories "
            "would switch off; merge it into the weights and save them as a base of their own "
            "(`AutoPeftModelForCausalLM.from_pretrained(…).merge_and_unload().save_pretrained(…)`). The base of "
            "another ICAE is loaded once more."
        )
    if not isinstance(base, PreTrainedModel):
        raise TypeError(f"Expected the base as a folder, a Hub id or a model, got {type(base).__name__}.")


def _load_base(name: str, **kwargs) -> PreTrainedModel:
    if not name:
        raise ValueError("Expected the name or folder of a base model, got none; pass `base_model`.")
    try:
        base = AutoModelForCausalLM.from_pretrained(name, **kwargs)
    except OSError as error:
        raise ValueError(
            f"Expected a base model at {name!r}, found none ({error}). Pass `base_model`, the folder or Hub id of the "
            "language model that this ICAE extends."
        ) from error
    _check_is_model(base)
    return base


def _check_base(base: PreTrainedModel) -> None:
    check_dtype(base.get_input_embeddings().weight.dtype)
    config, name = base.config, type(base).__name__
    if (text_config := config.get_text_config()) is not config:
        raise ValueError(
            f"Expected a base that reads text alone, got {name}, of which its language model "
            f"({text_config.model_type!r}) is a part; save that part as a model of its own and pass it."
        )
    others = set(getattr(config, "layer_types", None) or ()) - set(LAYERS_WITH_KEYS_AND_VALUES)
    if config.is_encoder_decoder or base._is_stateful or others:
        raise ValueError(
            "Expected a base with a cache of keys and values in all layers, as decoder-only models have, got "
            f"{name}{f', with layers {sorted(others)}' if others else ''}."
        )
    if getattr(config, "hidden_size_per_layer_input", None):
        raise ValueError(
            f"Expected a base that reads embeddings, which slots have, got {name}, whose layers read token ids too "
            "(`hidden_size_per_layer_input`)."
        )
    taken = inspect.signature(base.base_model.forward).parameters
    if base.base_model is base or not {"position_ids", "past_key_values"}.issubset(taken):
        raise ValueError(
            f"Expected a base with a body that takes `position_ids` and `past_key_values`, as slots need, got {name}."
        )
    if config.eos_token_id is None:
        raise ValueError(
            f"Expected a base with an end token, got `eos_token_id=None` in the configuration of "
            f"{type(base).__name__}; set it, a reconstruction has to end somewhere."
        )


def check_dtype(dtype: torch.dtype) -> None:
    """Raises a `ValueError` for float16."""
    if dtype == torch.float16:
        raise ValueError(
            "Expected a base in bfloat16 or float32, got float16, whose range the hidden states of language models "
            "leave; load it with `dtype=torch.bfloat16`."
        )


def _base_fingerprint(base: PreTrainedModel) -> str | None:
    """
    Digests, joined by "-", of the norms and some input embeddings, and of some weights of the linear layers, rounded
    to bfloat16: the same in every dtype that the base is loaded in. Quantised linear layers have no second digest.
    `None` when weights are offloaded.
    """
    embeddings = base.get_input_embeddings().weight
    kept = [embeddings[:: max(1, len(embeddings) // 64)]]
    kept += [weight for weight in base.parameters() if weight.dim() == 1]
    linear = [weight for weight in base.parameters() if weight.dim() == 2 and weight is not embeddings]
    if any(weight.is_meta for weight in kept + linear):
        return None
    parts = [kept]
    if getattr(base.config, "quantization_config", None) is None:
        parts.append([weight.flatten()[:: max(1, weight.numel() // 64)] for weight in linear])
    return "-".join(_digest(tensors) for tensors in parts)


def bases_differ(fingerprint: str | None, other: str | None) -> bool:
    """Whether two fingerprints are of different bases; one may be shorter, of a quantised base, or not known."""
    if fingerprint is None or other is None:
        return False
    return any(a != b for a, b in zip(fingerprint.split("-"), other.split("-"), strict=False))


def _digest(tensors: Iterable[torch.Tensor]) -> str:
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(tensor.detach().bfloat16().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


def _load_safetensors(path: str | os.PathLike, name: str, **hub_kwargs) -> dict[str, torch.Tensor]:
    try:
        return load_file(cached_file(str(path), name, **hub_kwargs))
    except (OSError, SafetensorError) as error:
        raise ValueError(
            f"Expected an ICAE checkpoint with {name!r} at {str(path)!r}, but the file is missing or damaged "
            f"({error}); save it again with `save_pretrained` or download it again."
        ) from error


__all__ = ["ICAEPreTrainedModel"]
