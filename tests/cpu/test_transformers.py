"""gpt-oss in transformers with this library's experts against the same model with the dequantized weights."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import oracles
import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from transformers import GptOssConfig, GptOssForCausalLM

from mxfp4_moe import formats
from mxfp4_moe.integrations import _transformers_experts as integration
from mxfp4_moe.integrations.transformers import MoEExperts, replace_experts

EXPERTS, TOP_K, HIDDEN, INTER, LAYERS, VOCABULARY = 32, 4, 64, 96, 2, 32
PROMPTS, PROMPT_TOKENS, NEW_TOKENS = 2, 12, 8
# Relative norm of the difference of logits, on which the experts have a share of an eighth. The dequantized model keeps
# activations in bfloat16, ours are MXFP8 before each GEMM: E4M3 has 4 bits, which is 3% of an expert's output for each
# of the two; and where a router's logits nearly tie, it can change the choice of the next layer's experts.
TOLERANCE = 0.02
STORED = {f"{name}_proj_{what}" for name in ("gate_up", "down") for what in ("blocks", "scales", "bias")}
# Random logits lie close together, and a greedy token hangs on the closest two. With this seed none does: the smallest
# lead of a first over a second is more than twice the largest difference of any logit, which the tests check.
SEED = 45


def make_model(dtype: torch.dtype = torch.bfloat16) -> GptOssForCausalLM:
    """Random weights, of which the experts' are values that MXFP4 holds: the dequantized weights."""
    config = GptOssConfig(
        num_hidden_layers=LAYERS,
        num_local_experts=EXPERTS,
        num_experts_per_tok=TOP_K,
        hidden_size=HIDDEN,
        intermediate_size=INTER,
        vocab_size=VOCABULARY,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=256,
        sliding_window=32,
        pad_token_id=0,
        bos_token_id=None,
        eos_token_id=None,
        initializer_range=0.2,
    )
    torch.manual_seed(SEED)
    model = GptOssForCausalLM(config).to(dtype).eval()
    with torch.no_grad():
        for layer in model.model.layers:
            experts = layer.mlp.experts
            for weight in (experts.gate_up_proj, experts.down_proj):
                packed, scales = formats.quantize_mxfp4(weight.mT.contiguous())
                weight.copy_(formats.dequantize_mxfp4(packed, scales).mT)
            for bias in (experts.gate_up_proj_bias, experts.down_proj_bias):
                bias.normal_(0, 0.1)
            experts.down_proj.mul_(1 / 16)
            experts.down_proj_bias.mul_(1 / 16)
    return model


@pytest.fixture(scope="module")
def model() -> GptOssForCausalLM:
    return make_model()


def prompt(device: str = "cpu") -> torch.Tensor:
    return torch.randint(1, VOCABULARY, (PROMPTS, PROMPT_TOKENS), generator=torch.Generator().manual_seed(1)).to(device)


def generate(model: Any, tokens: torch.Tensor) -> torch.Tensor:
    out: torch.Tensor = model.generate(
        tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=NEW_TOKENS, do_sample=False, use_cache=True
    )
    return out


def logits(model: Any, tokens: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return torch.as_tensor(model(tokens).logits).float()


def distance(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).norm() / b.norm())


def compare(model: Any, device: str) -> None:
    replaced = copy.deepcopy(model)
    assert replace_experts(replaced) == LAYERS
    tokens = generate(model, prompt(device))
    assert tokens.shape == (PROMPTS, PROMPT_TOKENS + NEW_TOKENS)
    assert torch.equal(generate(replaced, prompt(device)), tokens)

    expected, ours = logits(model, tokens), logits(replaced, tokens)
    assert distance(ours, expected) < TOLERANCE
    chose = slice(PROMPT_TOKENS - 1, -1)  # the positions whose logits chose the new tokens
    first, second = expected[:, chose].topk(2).values.unbind(-1)
    if device == "cpu":  # what the seed was chosen for: no token hangs on rounding
        assert (first - second).min() > 2 * (ours - expected)[:, chose].abs().max()

    without = copy.deepcopy(model)
    for layer in without.model.layers:
        nn.init.zeros_(layer.mlp.experts.down_proj)
        nn.init.zeros_(layer.mlp.experts.down_proj_bias)
    assert distance(logits(without, tokens), expected) > 5 * TOLERANCE
    assert not torch.equal(generate(without, prompt(device)), tokens), "without the experts, other tokens"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_same_tokens_and_logits(dtype: torch.dtype) -> None:
    compare(make_model(dtype), "cpu")


@pytest.mark.gpu
def test_same_tokens_and_logits_on_the_gpu(model: GptOssForCausalLM) -> None:
    compare(copy.deepcopy(model).cuda(), "cuda")


def test_from_a_checkpoint(model: GptOssForCausalLM, tmp_path: Path) -> None:
    """The checkpoint's bytes, not the model's weights, and in the layers' order."""
    checkpoints = [oracles.random_checkpoint(EXPERTS, HIDDEN, INTER, seed=layer) for layer in range(LAYERS)]
    tensors = {}
    for layer, checkpoint in enumerate(checkpoints):
        tensors |= oracles.gpt_oss_tensors(checkpoint, layer)
    save_file(tensors, tmp_path / "model.safetensors")
    replaced = copy.deepcopy(model)
    assert replace_experts(replaced, checkpoint=tmp_path) == LAYERS
    for layer, checkpoint in zip(replaced.model.layers, checkpoints, strict=True):
        for name, tensor in layer.mlp.experts.weights.to_mxfp4()._asdict().items():
            assert torch.equal(tensor, checkpoint[name].to(tensor.dtype))


def test_the_module_follows_devices_and_keeps_its_dtypes(model: GptOssForCausalLM) -> None:
    replaced = copy.deepcopy(model)
    replace_experts(replaced)
    experts = replaced.model.layers[0].mlp.experts
    assert isinstance(experts, MoEExperts)
    before = {name: buffer.clone() for name, buffer in experts.named_buffers()}
    replaced.half()
    for name, buffer in experts.named_buffers():
        assert buffer.dtype == before[name].dtype
        assert torch.equal(buffer, before[name])
    assert "num_experts=32" in repr(experts)
    assert copy.deepcopy(replaced).to("meta").model.layers[0].mlp.experts.weights.device == torch.device("meta")

    state = {name: tensor.clone() for name, tensor in experts.state_dict().items()}
    assert set(state) == STORED
    other = replaced.model.layers[1].mlp.experts
    x = torch.randn(5, HIDDEN).bfloat16()
    ids, scales = torch.randint(0, EXPERTS, (5, TOP_K)), torch.rand(5, TOP_K)
    for assign in (False, True):
        other.load_state_dict(state, assign=assign)
        assert torch.equal(other(x, ids, scales), experts(x, ids, scales))


def test_a_state_dict_has_one_word_order_wherever_it_was_made(
    model: GptOssForCausalLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    """CPU plays an SM90 here: the words are converted on the way there, and back in a state dict."""
    replaced = copy.deepcopy(model)
    replace_experts(replaced)
    experts, other = (replaced.model.layers[layer].mlp.experts for layer in (0, 1))
    x = torch.randn(5, HIDDEN).bfloat16()
    ids, scales = torch.randint(0, EXPERTS, (5, TOP_K)), torch.rand(5, TOP_K)
    expected, expected_other = experts(x, ids, scales), other(x, ids, scales)
    before = experts.w13.clone()
    state = {name: tensor.clone() for name, tensor in experts.state_dict().items()}
    state_other = {name: tensor.clone() for name, tensor in other.state_dict().items()}

    monkeypatch.setattr(integration, "word_order_of", lambda device, activation_format: formats.WordOrder.PAIRS)
    experts.to("cpu")
    assert experts.weights.word_order is formats.WordOrder.PAIRS
    assert not torch.equal(experts.w13, before)
    assert torch.equal(experts(x, ids, scales), expected)
    for name, tensor in experts.state_dict().items():
        assert torch.equal(tensor, state[name]), name
    for assign in (False, True):
        experts.load_state_dict(state_other, assign=assign)
        assert torch.equal(experts(x, ids, scales), expected_other)
        experts.load_state_dict(state, assign=assign)
        assert torch.equal(experts(x, ids, scales), expected)
    fewer = {name: tensor[:-1] for name, tensor in state.items()}
    with pytest.raises(RuntimeError, match=r"size mismatch for w13"):
        experts.load_state_dict(fewer)
    with pytest.raises(RuntimeError, match=r"w13_scale: expected uint8 \[32, 192, 2\], got uint8 \[32, 191"):
        experts.load_state_dict({**state, "gate_up_proj_scales": state["gate_up_proj_scales"][:, :-1]})
    with pytest.raises(RuntimeError, match=r'Missing key\(s\) in state_dict: "down_proj_scales"'):
        experts.load_state_dict({name: tensor for name, tensor in state.items() if name != "down_proj_scales"})
    assert torch.equal(experts(x, ids, scales), expected), "what does not fit changes nothing"
    monkeypatch.undo()
    experts.to("cpu")
    assert torch.equal(experts.w13, before)
    assert torch.equal(experts(x, ids, scales), expected)


@pytest.mark.gpu
def test_a_state_dict_of_the_gpu_loads_on_cpu(model: GptOssForCausalLM) -> None:
    on_cpu = copy.deepcopy(model)
    replace_experts(on_cpu)
    state = on_cpu.state_dict()
    on_gpu = copy.deepcopy(on_cpu).to("cuda")
    experts = on_gpu.model.layers[0].mlp.experts
    assert experts.weights.word_order is formats.word_order_of(experts.weights.device)
    for name, tensor in on_gpu.state_dict().items():
        assert torch.equal(tensor.cpu(), state[name]), name
    before = experts.w13.clone()
    for assign in (False, True):
        on_gpu.load_state_dict({name: tensor.cuda() for name, tensor in state.items()}, assign=assign)
        assert torch.equal(experts.w13, before)
    back = on_gpu.to("cpu").model.layers[0].mlp.experts
    assert torch.equal(back.w13, on_cpu.model.layers[0].mlp.experts.w13)


def test_refuses() -> None:
    with pytest.raises(ValueError, match="model: expected a model with GptOssExperts, got Linear without any"):
        replace_experts(nn.Linear(2, 2))

    class Mxfp4GptOssExperts(nn.Module):
        pass

    with pytest.raises(TypeError, match=r"got Mxfp4GptOssExperts; load it with .*Mxfp4Config\(dequantize=True\)"):
        replace_experts(nn.Sequential(Mxfp4GptOssExperts()))
