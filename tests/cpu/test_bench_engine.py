"""`mxfp4-moe bench --engine`: two arms, each what it should be, in turn; the table and the picture. vLLM is a stub."""

from __future__ import annotations

import json
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

import mxfp4_moe
from mxfp4_moe import cli
from mxfp4_moe.bench.engine import compare, picture
from mxfp4_moe.bench.engine.compare import ArmError, Comparison, Load
from mxfp4_moe.bench.engine.random_model import Sizes, write_gpt_oss

SMALL = Sizes(layers=2, experts=4, top_k=2, hidden=64, intermediate=96, heads=2, kv_heads=1, head_dim=32, vocabulary=64)

# A vLLM with a clock of its own: ours is twice as fast, if it is asked as vLLM is. It says what mxfp4-moe would say.
# What it compiles it leaves in its caches, where the next one would find it; and who starts later is slower, as on a
# GPU that gets warm.
STUB = """
import os, time
clock = [0.0]
time.perf_counter = lambda: clock[0]
__version__ = "9.9"
class SamplingParams:
    def __init__(self, max_tokens, temperature, detokenize, ignore_eos):
        self.max_tokens = max_tokens
class LLM:
    def __init__(self, model, **keywords):
        assert keywords["enable_prefix_caching"] is False and keywords["seed"] == 0, keywords
        assert os.path.exists(os.path.join(model, "config.json"))
        ours = os.environ["MXFP4_MOE_ENGINES"] != "off"
        if os.environ.get("STUB") == "ours does not run": ours = False
        if os.environ.get("STUB") == "ours always runs": ours = True
        if os.environ.get("STUB") == "ends": raise RuntimeError("no GPU of mine")
        if ours: print("INFO mxfp4-moe runs this model's experts: MXFP8 activations (W4A8); one call", flush=True)
        else: print("INFO mxfp4-moe is not used: it is Sunday", flush=True)
        for cache in ("TRITON_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR", "VLLM_CACHE_ROOT", "CUDA_CACHE_PATH"):
            assert not os.path.exists(os.environ[cache]), "somebody was here before"
            os.makedirs(os.environ[cache])
        diary = os.path.join(model, "diary")
        with open(diary, "a") as file: file.write("A" if ours else "B")
        late = len(open(diary).read())
        self.step = (0.002 if ours else 0.004) * (1 + late / 10)
        self.llm_engine = self.model_config = self
    def get_vocab_size(self): return 64
    def generate(self, prompts, sampling, use_tqdm):
        tokens = [prompt["prompt_token_ids"] for prompt in prompts]
        assert all(0 <= token < 64 for prompt in tokens for token in prompt)
        assert len(tokens) < 3 or tokens[0] != tokens[1]
        clock[0] += self.step * (sampling.max_tokens + len(tokens[0]) / 100)
"""
LOAD = Load(decode=(1, 2), prefill=(1, 2), prompt=50, short=2, long=12, repeats=2, rounds=2)


@pytest.fixture
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "stubs").mkdir()
    (tmp_path / "stubs" / "vllm.py").write_text(STUB)
    paths = [str(tmp_path / "stubs"), str(Path(mxfp4_moe.__file__).parents[1])]
    monkeypatch.setenv("PYTHONPATH", ":".join(paths))
    monkeypatch.delenv("MXFP4_MOE_ENGINES", raising=False)
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    return tmp_path / "model"


def test_both_arms_are_measured_beside_each_other(model: Path) -> None:
    lines: list[str] = []
    found = compare.compare(model, LOAD, {"seed": 0}, lines.append)
    ours, own = found.arms
    assert [arm.name for arm in found.arms] == ["mxfp4-moe", "vLLM"]
    assert ours.said == "MXFP8 activations (W4A8); one call"
    assert own.said == ""
    assert (model / "diary").read_text() == "ABBA"
    for arm, step, late in ((ours, 2.0, (1.1, 1.4)), (own, 4.0, (1.2, 1.3))):
        assert len(arm.runs) == 2
        for run, slower in zip(arm.runs, late, strict=True):
            assert [entry["sequences"] for entry in run["decode"]] == [1, 2]
            for entry in run["decode"]:
                assert entry["ms_per_step"] == pytest.approx([step * slower] * 2)
            for entry in run["prefill"]:
                assert entry["ms"] == pytest.approx([step * slower * 1.5] * 2)
            assert run["first_token_ms"] == pytest.approx(step * slower * 1.5)
        what, rate = arm.rates("decode")[1]
        assert (what, rate.count) == ("decode, 2 at once", 4)
        rates = sorted(2e3 / (step * slower) for slower in late)
        assert (rate.low, rate.high) == pytest.approx(rates)
        assert rate.median == pytest.approx(sum(rates) / 2)
        assert arm.rates("prefill")[1][1].median == pytest.approx(sum(rates) * 50 / 1.5 / 2)
        assert arm.once("first_token_ms").median == pytest.approx(step * 1.25 * 1.5)
    text = compare.table(found)
    assert "decode, 2 at once" in text
    assert "vLLM 9.9" in text
    measured = [line for line in lines if "first token after" in line]
    assert len(measured) == 4  # of each run, for whoever ends the comparison early
    assert all("; decode, 1 at once: " in line and "; prefill, 2 x " in line for line in measured)
    data = json.loads(json.dumps(found.as_dict()))
    assert data["schema"] == 2
    assert set(data["arms"][0]["tokens_per_s"]["decode, 2 at once"]) == {"median", "low", "high", "count"}
    assert data["load"]["decode"] == [1, 2]


@pytest.mark.parametrize(
    ("stub", "message"),
    [
        ("ours does not run", "mxfp4-moe: our kernels did not run; what was said: INFO mxfp4-moe is not used"),
        ("ours always runs", "vLLM: our kernels ran in vLLM's own arm"),
        ("ends", "vLLM ended with exit status 1:.*no GPU of mine"),
    ],
)
def test_an_arm_that_is_not_what_it_should_be_is_an_error(
    model: Path, monkeypatch: pytest.MonkeyPatch, stub: str, message: str
) -> None:
    monkeypatch.setenv("STUB", stub)
    with pytest.raises(ArmError, match=f"(?s){message}"):
        compare.compare(model, LOAD, {}, lambda line: None)


def test_the_command(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = [f"--json={tmp_path / 'a.json'}", f"--picture={tmp_path / 'a.svg'}"]
    assert cli.main(["bench", "--engine", "vllm", "--dry", f"--model={model}", *files]) == 0
    assert "decode, 1 at once" in capsys.readouterr().out
    assert json.loads((tmp_path / "a.json").read_text())["model"] == "model"
    assert (model / "diary").read_text() == "AB"
    assert cli.main(["bench", "--engine", "vllm", "--dry", f"--model={model}", "--rounds=2"]) == 0
    assert (model / "diary").read_text() == "ABABBA"
    assert cli.main(["bench", "--engine", "vllm", "--dry", f"--model={model}", "--rounds=0"]) == 2
    assert "rounds: expected at least 1, got 0" in capsys.readouterr().err
    assert ElementTree.parse(tmp_path / "a.svg").getroot().tag.endswith("svg")
    for wrong, words in ((["--model=nowhere"], "config.json"), (["--engine-arguments=[]"], "a JSON object")):
        assert cli.main(["bench", "--engine", "vllm", "--dry", f"--model={model}", *wrong]) == 2
        assert words in capsys.readouterr().err


def arm(rate: float) -> dict[str, Any]:
    return {
        **{"vllm": "1.0", "torch": "2.13", "device": "a <card>", "start_s": 60.0},
        **{"first_token_ms": 100.0 / rate, "second_token_ms": 50.0 / rate},
        "decode": [{"sequences": 1, "ms_per_step": [1.0 / rate]}],
        "prefill": [{"prompts": 1, "tokens": 1024, "ms": [16.0 / rate]}],
    }


def test_more_is_better_and_bars_are_in_proportion() -> None:
    arms = [
        compare.Arm(name="mxfp4-moe", said="W4A8", runs=[arm(1.0), arm(3.0)]),
        compare.Arm(name="vLLM", said="", runs=[arm(1), arm(1)]),
    ]
    both = Comparison(model="m", load=Load(), keywords={}, arms=arms)
    rows = [line.split() for line in compare.table(both).splitlines()]
    assert [row[-1] for row in rows[1:6]] == ["1.00", "1.50", "1.50", "2.00", "2.00"]
    assert rows[4][4:] == ["2,000.0", "tokens/s", "50%", "1,000.0", "tokens/s", "0%", "2.00"]
    svg = picture.picture(both)
    root = ElementTree.fromstring(svg)
    bars = [float(rect.attrib["width"]) for rect in root if rect.tag.endswith("rect") and rect.attrib.get("x") == "170"]
    assert [a / b for a, b in zip(bars[::2], bars[1::2], strict=True)] == pytest.approx([2.0, 2.0])
    assert "a &lt;card&gt;" in svg


def test_the_random_model_is_a_checkpoint(tmp_path: Path) -> None:
    folder = write_gpt_oss(tmp_path / "model", SMALL)
    again = write_gpt_oss(tmp_path / "again", SMALL)
    weights = [mxfp4_moe.MoEWeights.from_pretrained(folder, layer=number) for number in range(2)]
    assert [(w.num_experts, w.hidden_size, w.intermediate_size, w.limit) for w in weights] == [(4, 64, 96, 7.0)] * 2
    assert not torch.equal(weights[0].w13, weights[1].w13)
    for file in folder.glob("*.safetensors"):
        with safe_open(file, "pt") as a, safe_open(again / file.name, "pt") as b:
            assert all(torch.equal(a.get_tensor(name), b.get_tensor(name)) for name in a.keys())  # noqa: SIM118


def test_transformers_reads_the_random_model(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    folder = write_gpt_oss(tmp_path / "model", SMALL)
    read, info = transformers.AutoModelForCausalLM.from_pretrained(
        folder,
        quantization_config=transformers.Mxfp4Config(dequantize=True),
        dtype=torch.bfloat16,
        output_loading_info=True,
    )
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert bool(read(torch.tensor([[3, 4, 5]])).logits.isfinite().all())


def test_nothing_is_imported_from_an_engine_by_the_command() -> None:
    assert "vllm" not in sys.modules
