"""enable(): from a checkpoint's bytes into the kernels' layout; and what transformers then does with the model."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gpt_oss_models
import pytest
import torch
import transformers
from gpt_oss_models import LAYERS, VOCABULARY, read_tensors, run_ranks, write_model
from transformers import AutoModelForCausalLM, Mxfp4Config

from mxfp4_moe import engines, formats
from mxfp4_moe._install.troubles import release
from mxfp4_moe.integrations import _transformers_experts as experts_module
from mxfp4_moe.integrations import _transformers_quantizer as quantizer_module
from mxfp4_moe.integrations import transformers as integration
from mxfp4_moe.integrations._engines.register import forget
from mxfp4_moe.integrations._transformers_experts import LoadedExperts, MoEExperts
from mxfp4_moe.integrations.transformers import disable, enable, replace_experts

OWN = "transformers' own path does"


@pytest.fixture
def enabled(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("MXFP4_MOE_CPU", "1")
    forget()
    assert enable(activation_format="mxfp8")
    yield
    disable()
    forget()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("model"))


def load(folder: Path, **options: Any) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, **{"dtype": torch.bfloat16, **options})


def replaced(folder: Path, dtype: torch.dtype = torch.bfloat16) -> Any:
    """The same model by the other way: dequantized, then our experts from the checkpoint."""
    model = load(folder, dtype=dtype, quantization_config=Mxfp4Config(dequantize=True))
    assert replace_experts(model, checkpoint=folder, activation_format="mxfp8") == len(model.model.layers)
    return model


def prompt(seed: int = 1) -> torch.Tensor:
    return torch.randint(1, VOCABULARY, (2, 17), generator=torch.Generator().manual_seed(seed))


def logits(model: Any, tokens: torch.Tensor | None = None) -> torch.Tensor:
    with torch.no_grad():
        return torch.as_tensor(model(prompt() if tokens is None else tokens).logits)


def layers(model: Any) -> list[Any]:
    return [layer.mlp.experts for layer in model.model.layers]


# ---- what is computed ------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("enabled")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_logits_have_the_bits_of_replace_experts(
    dtype: torch.dtype, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = replaced(folder, dtype)

    def never(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("a dequantized copy")

    monkeypatch.setattr("transformers.integrations.mxfp4.convert_moe_packed_tensors", never)
    model, info = load(folder, dtype=dtype, device_map="auto", output_loading_info=True)
    assert not any(info.values()), info
    assert {type(layer) for layer in layers(model)} == {LoadedExperts}
    assert {parameter.dtype for parameter in layers(model)[0].parameters()} == {torch.uint8, torch.float32}
    expected = logits(other)
    assert torch.equal(logits(model), expected)
    tokens = other.generate(prompt(), attention_mask=torch.ones_like(prompt()), max_new_tokens=6, do_sample=False)
    assert torch.equal(
        model.generate(prompt(), attention_mask=torch.ones_like(prompt()), max_new_tokens=6, do_sample=False), tokens
    )
    layers(model)[1].w2[0, -1] ^= 0x10
    assert not torch.equal(logits(model), expected), "one code changed"


@pytest.mark.usefixtures("enabled")
def test_one_line_says_which_activations(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    load(folder)
    said = [line for line in capfd.readouterr().err.splitlines() if "mxfp4-moe" in line]
    words = (
        "mxfp4-moe runs the experts of 3 layers of GptOssForCausalLM: MXFP8 activations (W4A8), as enable() was asked"
    )
    assert said == [words]
    replaced(folder)
    said = [line for line in capfd.readouterr().err.splitlines() if "mxfp4-moe" in line]
    assert said == [words.replace("enable()", "replace_experts")]


@pytest.mark.usefixtures("enabled")
def test_a_layer_that_is_not_mxfp4_stays(tmp_path: Path) -> None:
    model = load(write_model(tmp_path, not_converted=(1,)))
    assert [type(layer).__name__ for layer in layers(model)] == ["LoadedExperts", "GptOssExperts", "LoadedExperts"]
    stored = read_tensors(tmp_path)
    assert torch.equal(layers(model)[1].down_proj, stored["model.layers.1.mlp.experts.down_proj"])


# ---- where the weights are -------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("enabled")
@pytest.mark.parametrize("shards", [1, 3])
def test_offloaded_layers_come_for_a_call_and_are_saved(shards: int, tmp_path: Path) -> None:
    for name in ("model", "offload", "saved"):
        (tmp_path / name).mkdir()
    folder = write_model(tmp_path / "model", shards=shards)
    places = dict.fromkeys(("model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head", "model.layers.0"), "cpu")
    places |= {f"model.layers.{layer}": "disk" for layer in (1, 2)}
    model = load(folder, device_map=places, offload_folder=tmp_path / "offload")
    assert [layer.w13.is_meta for layer in layers(model)] == [False, True, True]
    expected = logits(replaced(folder))
    for _ in range(2):
        assert torch.equal(logits(model), expected)
        assert all(layer._weights.w13.is_meta for layer in layers(model)[1:]), "nothing keeps what was lent"
    with pytest.warns(UserWarning, match="offloaded modules"):
        model.save_pretrained(tmp_path / "saved")
    same(read_tensors(tmp_path / "saved"), read_tensors(folder))


@pytest.mark.usefixtures("enabled")
def test_layers_are_prepared_for_the_device_that_executes_them(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """CPU plays an SM90: the words are in its order, wherever they wait, and saved as they came."""
    expected = logits(replaced(folder))
    usual = layers(load(folder))[0].w13
    for module in (quantizer_module, experts_module, engines):
        monkeypatch.setattr(module, "word_order_of", lambda device, activation_format: formats.WordOrder.PAIRS)
    model = load(folder)
    assert {layer.weights.word_order for layer in layers(model)} == {formats.WordOrder.PAIRS}
    assert not torch.equal(layers(model)[0].w13, usual)
    assert torch.equal(logits(model), expected)
    model.save_pretrained(tmp_path)
    same(read_tensors(tmp_path), read_tensors(folder))
    monkeypatch.undo()
    model.to("cpu")
    assert torch.equal(layers(model)[0].w13, usual), "a move brings the device's order"
    assert torch.equal(logits(model), expected)


@pytest.mark.usefixtures("enabled")
def test_a_change_of_dtype_leaves_the_experts_as_they_are(folder: Path) -> None:
    model = load(folder)
    expected = logits(model)
    before = {name: parameter.clone() for name, parameter in layers(model)[0].named_parameters()}
    for layer in layers(model):  # transformers lets no quantized model change as a whole
        layer.half()
    for name, parameter in layers(model)[0].named_parameters():
        assert parameter.dtype is before[name].dtype
        assert torch.equal(parameter, before[name])
    assert torch.equal(logits(model), expected)


@pytest.mark.usefixtures("enabled")
def test_two_matrices_wait_at_most(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers asks for all tensors before it converts the first; what is there is converted in between."""
    waiting, most = set(), []
    add, convert = quantizer_module.Converter.add_tensor, quantizer_module.Convert.convert

    def added(self: Any, target: str, *args: Any) -> None:
        add(self, target, *args)
        waiting.add(target)
        most.append(len(waiting))

    def converted(self: Any, tensors: Any, **names: Any) -> Any:
        waiting.discard(names["full_layer_name"])
        return convert(self, tensors, **names)

    monkeypatch.setattr(quantizer_module.Converter, "add_tensor", added)
    monkeypatch.setattr(quantizer_module.Convert, "convert", converted)
    load(folder)
    assert len(most) == 6 * LAYERS
    assert max(most) == 2


# ---- saving ----------------------------------------------------------------------------------------------------------


def same(tensors: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert set(tensors) == set(expected)
    for name, tensor in expected.items():
        assert tensors[name].dtype is tensor.dtype, name
        assert torch.equal(tensors[name], tensor), name


@pytest.mark.usefixtures("enabled")
def test_what_is_saved_is_the_checkpoint(folder: Path, tmp_path: Path) -> None:
    model = load(folder)
    expected = logits(model)
    model.save_pretrained(tmp_path)
    same(read_tensors(tmp_path), read_tensors(folder))
    assert torch.equal(logits(load(tmp_path)), expected)
    assert {name.rpartition(".")[2] for name in layers(model)[0].state_dict()} == set(experts_module.STORED.values())
    disable()
    dequantized = load(tmp_path, quantization_config=Mxfp4Config(dequantize=True))
    assert torch.equal(logits(dequantized), logits(load(folder, quantization_config=Mxfp4Config(dequantize=True))))


@pytest.mark.usefixtures("enabled")
def test_a_state_dict_goes_into_another_model(folder: Path, tmp_path: Path) -> None:
    model, other = load(folder), load(write_model(tmp_path, initializer_range=0.1))
    expected = logits(model)
    for assign in (False, True):
        other.load_state_dict(model.state_dict(), assign=assign)
        assert torch.equal(logits(other), expected)


# ---- who serves ------------------------------------------------------------------------------------------------------


def declined(folder: Path, capfd: pytest.CaptureFixture[str], **options: Any) -> list[str]:
    """Loads a model, which transformers' own path must serve; the lines that we said."""
    capfd.readouterr()
    model = load(folder, **options)
    assert not any(isinstance(layer, MoEExperts) for layer in layers(model))
    return [line for line in capfd.readouterr().err.splitlines() if "mxfp4-moe" in line]


@pytest.mark.usefixtures("enabled")
def test_a_cpu_is_left_to_transformers_unless_asked_for(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("MXFP4_MOE_CPU")
    enable(activation_format="mxfp8")
    (line,) = declined(folder, capfd)
    assert line == (
        f"mxfp4-moe does not serve this model, {OWN}: this is a CPU, where we have a slow reference alone; "
        "MXFP4_MOE_CPU=1 takes it, for tests"
    )


@pytest.mark.usefixtures("enabled")
def test_activations_are_transformers_own_unless_asked_for(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("mxfp4_moe.integrations._transformers_serving.formats_on", lambda device: ("mxfp8",))
    enable()
    (line,) = declined(folder, capfd)
    assert f"{OWN}: no kernels with bfloat16 activations (W4A16) on this device, as transformers computes" in line
    assert "MXFP4_MOE_ACTIVATIONS=mxfp8" in line
    monkeypatch.setenv("MXFP4_MOE_ACTIVATIONS", "mxfp8")
    enable()
    assert isinstance(layers(load(folder))[0], LoadedExperts)
    monkeypatch.setattr("mxfp4_moe.integrations._transformers_serving.formats_on", lambda device: ("mxfp8", "bf16"))
    enable(activation_format="bf16")
    assert {layer.activation_format for layer in layers(load(folder))} == {"bf16"}


@pytest.mark.usefixtures("enabled")
def test_dequantize_is_taken_at_its_word(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert declined(folder, capfd, quantization_config=Mxfp4Config(dequantize=True)) == []


@pytest.mark.usefixtures("enabled")
@pytest.mark.parametrize(
    ("options", "changes", "words"),
    [
        ({"use_kernels": True}, {}, "use_kernels=True asks for kernels of transformers"),
        ({}, {"hidden_size": 80}, "expected sizes that are multiples of 32, got H = 80"),
    ],
)
def test_a_model_that_is_not_for_us(
    options: dict[str, Any], changes: dict[str, Any], words: str, capfd: pytest.CaptureFixture[str]
) -> None:
    """Before any weight is loaded: the quantizer says why, and then is transformers' own."""
    config = transformers.GptOssConfig(
        **{"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, **changes}
    )
    config.vocab_size = 32
    with torch.device("meta"):
        model = transformers.GptOssForCausalLM(config)
    quantizer = quantizer_module.Quantizer(Mxfp4Config(), pre_quantized=True)
    quantizer.validate_environment(device_map=None)
    assert quantizer.serving is not None
    quantizer.preprocess_model(model=model, dtype=torch.bfloat16, device_map=None, checkpoint_files=[], **options)
    assert quantizer.serving is None
    assert quantizer.quantization_config.dequantize, "what transformers does on a CPU"
    assert f"{OWN}: " in (said := capfd.readouterr().err)
    assert words in said
    assert not any(isinstance(module, MoEExperts) for module in model.modules())


@pytest.mark.usefixtures("enabled")
def test_verify_compares_the_first_layer(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MXFP4_MOE_VERIFY", "1")
    enable(activation_format="mxfp8")
    load(folder)
    assert "mxfp4-moe verified model.layers.0.mlp.experts in transformers" in capfd.readouterr().err
    prepare = quantizer_module.prepare_matrix

    def wrong(*args: Any, **kwargs: Any) -> torch.Tensor:
        made = prepare(*args, **kwargs)
        made[:, -1] ^= 0x10
        return made

    monkeypatch.setattr(quantizer_module, "prepare_matrix", wrong)
    with pytest.raises(RuntimeError, match=r"layers\.0\.mlp\.experts: \d+ of 17 tokens have other bits in transform"):
        load(folder)


# ---- enable and disable ----------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("enabled")
def test_enable_and_disable() -> None:
    mapping, quantizer = integration._look_up()
    assert mapping["mxfp4"] is quantizer
    assert enable(activation_format="mxfp8")
    assert mapping["mxfp4"] is quantizer
    for _ in range(2):
        disable()
        assert mapping["mxfp4"].__name__ == "Mxfp4HfQuantizer"
    assert enable()
    assert mapping["mxfp4"] is quantizer
    with pytest.raises(ValueError, match="activation_format: expected 'bf16', 'fp16', 'mxfp8' or None, got 'fp4'"):
        enable(activation_format="fp4")


def test_another_quantizer_in_that_place_stays(monkeypatch: pytest.MonkeyPatch, capfd: Any) -> None:
    forget()
    mapping, _ = integration._look_up()
    monkeypatch.setitem(mapping, "mxfp4", type("Theirs", (), {}))
    assert not enable()
    assert mapping["mxfp4"].__name__ == "Theirs"
    assert "Theirs here, somebody else's" in capfd.readouterr().err
    forget()


# ---- on a GPU --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def larger(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One whose matrices are what memory goes to: six layers of 20 MB, of which w13 is 13."""
    sizes = {"num_hidden_layers": 6, "num_local_experts": 12, "hidden_size": 1024, "intermediate_size": 1024}
    return write_model(tmp_path_factory.mktemp("larger"), **sizes)


@pytest.mark.gpu
@pytest.mark.usefixtures("enabled")
def test_the_gpu_holds_the_layout_and_two_matrices_at_most(larger: Path) -> None:
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    model = load(larger, device_map="cuda")
    peak = torch.cuda.max_memory_allocated() - before
    held = sum(parameter.nbytes for parameter in model.parameters())
    matrix = layers(model)[0].w13.nbytes
    assert {layer.weights.word_order for layer in layers(model)} == {formats.word_order_of(layers(model)[0].w13.device)}
    # transformers takes the model's size once from the allocator before it loads, and gives it back. Beside that: two
    # raw matrices, and one that is being made, with pieces of an expert.
    assert peak - held < 4 * matrix
    raw = sum(layer.w13.nbytes + layer.w2.nbytes for layer in layers(model))
    assert 8 * matrix < raw, "all raw matrices at once are twice as much"
    expected = logits(replaced(larger).to("cuda"), prompt().cuda())
    assert torch.equal(logits(model, prompt().cuda()), expected)


@pytest.mark.gpu
@pytest.mark.usefixtures("enabled")
def test_layers_on_the_cpu_are_executed_on_the_gpu(larger: Path, tmp_path: Path) -> None:
    names = ("model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head", "model.layers.0")
    places: dict[str, int | str] = dict.fromkeys(names, 0)
    model = load(larger, device_map=places | {f"model.layers.{layer}": "cpu" for layer in range(1, 6)})
    whole = load(larger, device_map="cuda")
    assert layers(model)[1].w13.is_meta
    order = formats.word_order_of(torch.device("cuda", 0))
    assert torch.equal(layers(model)[1].real("w13"), layers(whole)[1].w13.cpu()), f"prepared in {order}"
    expected = logits(whole, prompt().cuda())  # and what torch keeps from a first call on
    before = torch.cuda.memory_allocated()
    assert torch.equal(logits(model, prompt().cuda()), expected)
    assert torch.cuda.memory_allocated() - before < layers(whole)[1].w2.nbytes, "a layer stayed"
    with pytest.warns(UserWarning, match="offloaded modules"):
        model.save_pretrained(tmp_path)
    same(read_tensors(tmp_path), read_tensors(larger))


# ---- expert parallelism ----------------------------------------------------------------------------------------------


def test_an_expert_parallel_plan_shards_our_layout(folder: Path, tmp_path: Path) -> None:
    """Two processes of four experts each: a layer's sum is that of the whole layer, and what is saved is whole."""
    program = Path(gpt_oss_models.__file__).with_name("expert_parallel_model.py")
    ran = run_ranks(program, 2, str(folder), str(tmp_path))
    assert ran.returncode == 0, ran.stderr[-3000:]
    lines = [json.loads(file.read_text()) for file in tmp_path.glob("rank*.json")]
    assert sorted(line["rank"] for line in lines) == [0, 1]
    for line in lines:
        assert line["experts"] == "LoadedExperts"
        assert line["bytes"] == line["whole_bytes"] // 2
        assert line["alone"] > 0.1, "one rank alone is not the layer"
        # Each rank rounds its own sum to bfloat16, and the two are added in bfloat16: three roundings of 2^-9.
        assert line["error"] < 3 * 2**-9
    if release(transformers.__version__) >= (5, 13):  # before, transformers cannot save an expert-parallel model
        same(read_tensors(tmp_path), read_tensors(folder))
