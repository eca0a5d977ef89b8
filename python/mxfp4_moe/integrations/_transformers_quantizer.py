"""How transformers loads an MXFP4 gpt-oss with our experts; imported once `enable` has looked up all of its hooks.

transformers asks the quantizer of "mxfp4" what stands in the model and how checkpoint tensors become its parameters.
Ours puts `LoadedExperts` where `GptOssExperts` stand on meta, and converts blocks and scales of one matrix at a time
into the kernels' layout, in the word order of the device that will execute the layer. Parameters in their final layout
are all that the rest of transformers and accelerate sees: so device maps count the right bytes, offloading stores what
is executed, and an expert-parallel plan shards by experts. Where we do not serve a model, every method is transformers'
own.
"""

from __future__ import annotations

import re
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers.core_model_loading import ConversionOps, WeightConverter
from transformers.quantizers.quantizer_mxfp4 import Mxfp4HfQuantizer
from transformers.quantizers.quantizers_utils import should_convert_module

from .._checkpoints.options import source_rows
from ..engines import prepare_matrix
from ..formats import word_order_of
from ..weights import GateUpOrder, MoEWeights
from . import _transformers_models as models
from ._engines import Settings, say
from ._engines.table import TRANSFORMERS
from ._engines.verify import verify_layer
from ._transformers_experts import LoadedExperts, MoEExperts, format_argument
from ._transformers_serving import Serving, serving_on

# gpt-oss's names in a checkpoint -> the parameter that they become
_SOURCES = {
    "w13": ("gate_up_proj_blocks", "gate_up_proj_scales"),
    "w13_bias": ("gate_up_proj_bias",),
    "w2": ("down_proj_blocks", "down_proj_scales"),
    "w2_bias": ("down_proj_bias",),
}
_PLANNED = {  # a name in transformers' parallel plans -> all that are sharded like it
    "gate_up_proj": ("w13", *_SOURCES["w13"]),
    "gate_up_proj_bias": ("w13_bias",),
    "down_proj": ("w2", *_SOURCES["w2"]),
    "down_proj_bias": ("w2_bias",),
}


class Quantizer(Mxfp4HfQuantizer):  # type: ignore[misc]
    """transformers' quantizer for MXFP4, whose experts are `LoadedExperts` where we serve the model.

    Args:
        quantization_config: as for transformers' own.

    Attributes:
        settings: the user's, set by `enable`.
        wish: whose wish the activations are, where not the settings'.
    """

    settings: Settings
    wish: str = ""

    def __init__(self, quantization_config: Any, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        self.serving: Serving | None = None  # None while transformers' own path serves
        self.model: Any = None  # while its weights come
        self.waiting: Converter | None = None  # the last one whose tensors are all on their way
        self._asked: dict[str, Any] = {}
        self._to_verify: tuple[models.FoundExperts, Path] | None = None

    # ---- what transformers calls, in its order -----------------------------------------------------------------------

    def validate_environment(self, *args: Any, **kwargs: Any) -> None:
        """Decides who serves; transformers calls it again when it has made a device map of "auto"."""
        device_map = kwargs.get("device_map")
        if self.serving is not None:
            self.serving = self.serving.with_device_map(device_map)
            return
        self._asked = kwargs
        if self.quantization_config.dequantize or not self.pre_quantized:
            return self._own(*args, **kwargs)  # asked for by name
        self.serving = serving_on(device_map, self.settings, self.wish)
        if self.serving.refused:
            self._decline(self.serving.refused, self.serving.next_step)
            return self._own(*args, **kwargs)

    def update_tp_plan(self, config: Any) -> Any:
        """Before transformers 5.24 the plans are the configuration's."""
        return config if self.serving else super().update_tp_plan(config)

    def update_ep_plan(self, config: Any) -> Any:
        """Adds our parameters, and the names of a saved checkpoint, to the expert-parallel plan."""
        if not self.serving:
            return super().update_ep_plan(config)
        plan = getattr(config, "base_model_ep_plan", None)
        if plan is not None:
            config.base_model_ep_plan = _planned(plan)
        return config

    def update_parallel_plan(self, model: Any, plan: dict[str, str]) -> None:
        """As `update_ep_plan`, for transformers 5.24."""
        if not self.serving:
            super().update_parallel_plan(model, plan)
            return
        there = {re.sub(r"\.\d+\.", ".*.", name) for name, _ in (*model.named_parameters(), *model.named_modules())}
        made = {name: style for name, style in _planned(plan).items() if name in there or name in plan}
        gone = [name for name in made if name.rpartition(".")[2] in _PLANNED and name not in there]
        plan.clear()
        plan.update({name: style for name, style in made.items() if name not in gone})

    def _process_model_before_weight_loading(self, model: Any, use_kernels: bool = False, **kwargs: Any) -> Any:
        if self.serving is not None and not self._put_experts_in(model, use_kernels, kwargs.get("checkpoint_files")):
            self._own(**self._asked)
        if self.serving is None:
            return super()._process_model_before_weight_loading(model, use_kernels=use_kernels, **kwargs)
        self.model, self.waiting = model, None
        return model

    def get_weight_conversions(self) -> Any:
        """A converter for each parameter; checkpoint bytes go in, the kernels' layout comes out."""
        if self.serving is None:
            return super().get_weight_conversions()
        return [
            Converter(
                source_patterns=[f"mlp.experts.{source}" for source in sources],
                target_patterns=f"mlp.experts.{parameter}",
                operations=[Convert(self)],
            )
            for parameter, sources in _SOURCES.items()
        ]

    def update_weight_conversions(self, weight_conversions: list[Any], *args: Any, **kwargs: Any) -> Any:
        """Where transformers combines its own conversions with the quantizer's."""
        if self.serving is None:
            return super().update_weight_conversions(weight_conversions, *args, **kwargs)
        return [*weight_conversions, *self.get_weight_conversions()]

    def param_needs_quantization(self, model: Any, param_name: str, **kwargs: Any) -> bool:
        """Nothing is quantized on the way: the checkpoint is MXFP4."""
        return False if self.serving else super().param_needs_quantization(model, param_name, **kwargs)

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        if self.serving is None:
            return super()._process_model_after_weight_loading(model, **kwargs)
        self.model = self.waiting = None
        for module in model.modules():
            if isinstance(module, LoadedExperts):
                module.is_loaded = True
                self._make_ready(module)
        # What is saved are checkpoint names already, which transformers need not find by reversing.
        model._weight_conversions = [one for one in model._weight_conversions if not _is_ours(one)]
        if self.settings.verify and self._to_verify is not None:
            self._verify(model, *self._to_verify)
        return model

    def get_state_dict_and_metadata(self, model: Any) -> tuple[Any, dict[str, Any]]:
        """What is saved: MXFP4 under the checkpoint's names, also of layers that are offloaded or sharded."""
        if self.serving is None:
            found: tuple[Any, dict[str, Any]] = super().get_state_dict_and_metadata(model)
            return found
        layers = {name: module for name, module in model.named_modules() if isinstance(module, LoadedExperts)}
        try:
            for layer in layers.values():
                layer.is_saved_apart = True
            state = model.state_dict()
        finally:
            for layer in layers.values():
                layer.is_saved_apart = False
        for name, layer in layers.items():
            state |= {f"{name}.{stored}": tensor for stored, tensor in layer.stored().items()}
        return state, {}

    # ---- our part ----------------------------------------------------------------------------------------------------

    def _own(self, *args: Any, **kwargs: Any) -> None:
        super().validate_environment(*args, **kwargs)

    def _decline(self, reason: str, next_step: str = "") -> None:
        self.serving = None
        step = f"; {next_step}" if next_step else ""
        say(
            TRANSFORMERS,
            f"mxfp4-moe does not serve this model, transformers' own path does: {reason}{step}",
            once=False,
        )

    def _put_experts_in(self, model: Any, use_kernels: bool, files: list[str] | None) -> bool:
        """Replaces every layer's experts on meta; or says why not, and changes nothing."""
        assert self.serving is not None
        if use_kernels:
            self._decline("use_kernels=True asks for kernels of transformers")
            return False
        try:
            found = models.find_experts(model, MoEExperts)
        except (TypeError, ValueError) as error:
            self._decline(str(error))
            return False
        config = self.quantization_config
        left_out = self.get_modules_to_not_convert(model, config.modules_to_not_convert, model._keep_in_fp32_modules)
        found = [experts for experts in found if should_convert_module(experts.name, left_out)]
        choice = self.serving.choose(str(model.config.dtype or ""))
        if not choice.format:
            self._decline(choice.reason, choice.next_step)
            return False
        for experts in found:
            count, hidden, inter = experts.sizes
            module = LoadedExperts(
                count,
                hidden,
                inter,
                alpha=float(experts.module.alpha),
                limit=float(experts.module.limit),
                activation_format=choice.format,
            )
            parent, _, attribute = experts.name.rpartition(".")
            setattr(model.get_submodule(parent), attribute, module)
        if found and files:
            first = Path(files[0])
            self._to_verify = found[0], first if len(files) == 1 else first.parent
        line = f"mxfp4-moe runs the experts of {len(found)} layers of {type(model).__name__}: {choice.reason}"
        say(TRANSFORMERS, line, once=False)
        return True

    def _make_ready(self, module: LoadedExperts) -> None:
        """Makes what float16 activations need now, before a graph is traced; not of layers that wait elsewhere."""
        w13: Any = module.w13
        assert self.serving is not None
        here = not w13.is_meta and not hasattr(w13, "full_tensor") and self.serving.executes(w13.device) == w13.device
        if here and module.activation_format == "fp16":
            module.weights.fp16_factors()

    def _verify(self, model: Any, found: models.FoundExperts, checkpoint: Path) -> None:
        """Compares the first layer with one that was read by `MoEWeights`, bit by bit."""
        layer = model.get_submodule(found.name)
        if found.number is None or hasattr(layer.w13, "full_tensor"):
            say(TRANSFORMERS, f"mxfp4-moe cannot verify {found.name}, of which this process has a part")
            return
        assert self.serving is not None
        device = self.serving.executes(layer.real("w13").device)
        numbers: dict[str, Any] = {"alpha": float(found.module.alpha), "limit": float(found.module.limit)}
        read = MoEWeights.from_safetensors(checkpoint, layer=found.number, device=device, **numbers)
        verify_layer(
            TRANSFORMERS,
            lambda hidden, weights, ids, logits: layer(hidden, ids, weights),
            read.to(device, layer.activation_format),
            found.name,
            dtype=torch.float16 if model.config.dtype is torch.float16 else torch.bfloat16,
            top_k=int(model.config.num_experts_per_tok),
            device=device,
            keywords=format_argument(layer.activation_format),
        )


class Converter(WeightConverter):  # type: ignore[misc]
    """Converts a matrix as soon as the next one is on its way.

    transformers' threads read every tensor of a checkpoint as fast as they can, and its loop converts only when all
    have been asked for: on a GPU the checkpoint's bytes would wait beside the prepared ones, twice the model. With a
    wait in the loop that asks for them, two matrices are there at most.
    """

    __slots__ = ("made",)

    def add_tensor(self, target_key: str, source_key: str, source_pattern: str, future: Any) -> None:
        """transformers' call for each tensor on its way."""
        super().add_tensor(target_key, source_key, source_pattern, future)
        if isinstance(future, Future) and len(self.collected_tensors) == len(self.source_patterns):
            quantizer = self.operations[0].hf_quantizer
            if quantizer.waiting is not None:
                quantizer.waiting.make()
            quantizer.waiting = self

    def make(self) -> None:
        """Waits for the tensors, and keeps what they become, or the error that `convert` then raises."""
        (name,) = self.layer_targets
        (operation,) = self.operations
        try:
            tensors = self.materialize_tensors()
            self.made = operation.convert(tensors, full_layer_name=name, model=operation.hf_quantizer.model)
        except Exception as error:
            self.made = error

    def convert(self, layer_name: str, *args: Any, **kwargs: Any) -> Any:
        """transformers' call for each parameter, once all tensors are on their way."""
        made = getattr(self, "made", None)
        if made is not None:  # passed on as the tensors would be, so that transformers reports errors in its way
            self.made = None
            self.collected_tensors["made"] = [lambda: made]
        return super().convert(layer_name, *args, **kwargs)


class Convert(ConversionOps):  # type: ignore[misc]
    """Checkpoint tensors of one parameter -> the parameter, on the device where they are.

    Args:
        hf_quantizer: the quantizer; transformers takes an operation that has one for a loading one, and then leaves the
            checkpoint's dtypes alone.
    """

    def __init__(self, hf_quantizer: Quantizer) -> None:
        self.hf_quantizer = hf_quantizer

    def __deepcopy__(self, memo: Any) -> Convert:
        return self  # transformers copies the converter for every parameter; the quantizer is one

    @torch.no_grad()
    def convert(self, input_dict: dict[str, Any], **kwargs: Any) -> dict[str, Tensor]:
        """transformers' call: tensors by source pattern -> the parameter by its full name."""
        if "made" in input_dict:  # early, by `Converter`
            (made,) = input_dict["made"]
            if isinstance(made, Exception):
                raise made
            return dict(made)
        name: str = kwargs["full_layer_name"]
        path, _, parameter = name.rpartition(".")
        module = kwargs["model"].get_submodule(path)
        given = {key.rpartition(".")[2]: value for key, value in input_dict.items()}
        tensors = [_only(given.pop(source)) for source in _SOURCES[parameter]]
        serving = self.hf_quantizer.serving
        assert serving is not None
        if parameter == "w2_bias":
            return {name: tensors[0].to(torch.float32)}
        if parameter == "w13_bias":
            rows = source_rows(GateUpOrder.INTERLEAVED, module.intermediate_size, True, tensors[0].device)
            return {name: tensors[0][:, rows].to(torch.float32).contiguous()}
        device = serving.executes(tensors[0].device)
        module.prepared_for(word_order_of(device, module.activation_format))
        order = GateUpOrder.INTERLEAVED if parameter == "w13" else None
        raw = (tensor.to(device) for tensor in tensors)
        made = prepare_matrix(*raw, gate_up_order=order, activation_format=module.activation_format)
        return {name: made.to(tensors[0].device)}

    @property
    def reverse_op(self) -> ConversionOps:
        """There is none: `Quantizer` takes the conversions out of what a save would reverse."""
        raise NotImplementedError


def _planned(plan: dict[str, str]) -> dict[str, str]:
    """A parallel plan with our names; they come first, because older versions take the first rule that is a prefix."""
    ours: dict[str, str] = {}
    for name, style in plan.items():
        path, _, last = name.rpartition(".")
        if path.endswith("experts"):
            ours |= {f"{path}.{own}": style for own in _PLANNED.get(last, ())}
    return ours | plan


def _only(tensors: Any) -> Tensor:
    tensor: Tensor = tensors[0] if isinstance(tensors, list) else tensors
    return tensor


def _is_ours(conversion: Any) -> bool:
    return any(isinstance(operation, Convert) for operation in getattr(conversion, "operations", ()))
