"""SGLang and transformers of every age, as stubs: the engine starts, one line says why, and the doctor explains."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import pytest
import stub_engines
from stub_engines import START, write_engine

from mxfp4_moe.integrations import _engines
from mxfp4_moe.integrations._engines import Choice, Settings
from mxfp4_moe.integrations._engines.hooks import missing_hooks, missing_in_files
from mxfp4_moe.integrations._sglang_decide import Model, decide

SGLANG, TRANSFORMERS = _engines.engine("sglang"), _engines.engine("transformers")
POINTS = {SGLANG.name: "sglang.srt.plugins = mxfp4_moe.integrations.sglang:register", TRANSFORMERS.name: ""}
ENABLE = """
import transformers
from mxfp4_moe.integrations.transformers import enable
print([enable(), enable()])
"""
CODES = {
    SGLANG.name: (START.format(module="sglang", group="sglang.srt.plugins"), "started\n"),
    TRANSFORMERS.name: (ENABLE, "[False, False]\n"),
}
DOCTOR = """
import json
from mxfp4_moe.integrations._engines.findings import engine_findings
print(json.dumps([finding.as_dict() for finding in engine_findings() if {title!r} in finding.text]))
"""


@dataclass(frozen=True, kw_only=True)
class Stub:
    """An engine, and what it must lead to; hooks are how many of the row's it has, None for all."""

    version: str = "tested"
    hooks: int | None = None
    broken: str = ""
    settings: tuple[tuple[str, str], ...] = ()
    line: str
    row: str


STUBS = {
    "old": Stub(version="0.1.0", hooks=1, line="0.1.0 was not tested (tested: >=", row="was not tested"),
    "unknown": Stub(version="99.0", line="99.0 was not tested", row="MXFP4_MOE_ENGINES=untested"),
    "unknown, tried, and changed": Stub(
        version="99.0",
        hooks=1,
        settings=(("MXFP4_MOE_ENGINES", "untested"),),
        line="99.0 has no ",
        row="which the integration needs",
    ),
    "a hook is gone": Stub(hooks=-1, line=" has no ", row="has no"),
    "broken": Stub(broken="raise OSError('libcuda.so.1: no')", line="which the integration needs", row="is in"),
    "what was found is not what it was": Stub(line="own kernels run: ", row="is in"),
    "off": Stub(settings=(("MXFP4_MOE_ENGINES", "vllm"),), line="MXFP4_MOE_ENGINES leaves ", row="leaves"),
}


@pytest.mark.parametrize("name", [SGLANG.name, TRANSFORMERS.name])
@pytest.mark.parametrize("case", STUBS)
def test_the_engine_starts_and_one_line_says_why(case: str, name: str, tmp_path: Path) -> None:
    engine, stub = _engines.engine(name), STUBS[case]
    version = engine.tested[-1][0] + ".0" if stub.version == "tested" else stub.version
    write_engine(tmp_path, engine, version, engine.hooks[: stub.hooks], broken=stub.broken, point=POINTS[name])
    code, expected = CODES[name]
    started = stub_engines.run(tmp_path, code, **dict(stub.settings))
    assert (started.returncode, started.stdout) == (0, expected), started.stderr
    said = started.stderr.strip().splitlines()
    assert len(said) == 1, said
    assert f"{engine.title}'s own kernels run" in said[0]
    assert stub.line in said[0]
    doctor = stub_engines.run(tmp_path, DOCTOR.format(title=engine.title), **dict(stub.settings))
    (finding,) = json.loads(doctor.stdout)
    assert finding["level"] == "ok"
    assert f"{engine.title} {version}" in finding["text"]
    assert stub.row in f"{finding['text']} -> {finding['next_step']}"


def test_transformers_here_has_every_hook() -> None:
    assert missing_hooks(TRANSFORMERS.hooks) == []
    assert missing_in_files(TRANSFORMERS.hooks) == []


def test_the_wheel_has_sglangs_entry_point() -> None:
    text = (Path(__file__).parents[2] / "pyproject.toml").read_text(encoding="utf-8")
    group, _, value = POINTS["sglang"].partition(" = ")
    assert f'[project.entry-points."{group}"]\nmxfp4_moe = "{value}"\n' in text


# ---- what SGLang's auto means ----------------------------------------------------------------------------------------


class Arguments:
    """SGLang's, as far as they are looked at."""

    enable_lora = False
    lora_paths = None
    moe_a2a_backend = "none"
    speculative_algorithm = None
    speculative_moe_runner_backend = None
    quantization = None


class Config:
    """A model's config.json, as transformers reads it."""

    quantization_config: ClassVar = {"quant_method": "mxfp4"}
    swiglu_limit = 7.0


ASKED = Settings(engines=("sglang",), activations="mxfp8", cpu=True)


def choice(settings: Settings = ASKED, config: type = Config, **changes: object) -> Choice:
    arguments = type("Changed", (Arguments,), changes)
    return decide(Model.of(arguments, config), settings)


def test_auto_is_ours_for_an_mxfp4_model() -> None:
    assert choice().format == "mxfp8"
    assert choice().reason == "MXFP8 activations (W4A8), as MXFP4_MOE_ACTIVATIONS says"
    draft = {"speculative_algorithm": "EAGLE", "speculative_moe_runner_backend": "triton"}
    assert choice(**draft).format == "mxfp8"


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"enable_lora": True}, "LoRA may change experts"),
        ({"lora_paths": ["adapter"]}, "LoRA may change experts"),
        ({"moe_a2a_backend": "deepep"}, "--moe-a2a-backend deepep brings tokens in another form"),
        ({"speculative_algorithm": "EAGLE"}, "the draft model of speculative decoding"),
        ({"quantization": "fp8"}, "--quantization fp8 is not MXFP4"),
        ({"config": type("Other", (Config,), {"quantization_config": None})}, "the checkpoint is not MXFP4"),
        ({"config": type("Other", (Config,), {"swiglu_limit": None})}, "config.json has no swiglu_limit"),
        ({"settings": Settings(engines=("sglang",), activations="mxfp8")}, "there is no CUDA GPU"),
    ],
)
def test_auto_stays_sglangs(changes: dict[str, object], words: str) -> None:
    found = choice(**changes)  # type: ignore[arg-type]
    assert found.format == ""
    assert words in found.reason


def test_numbers_are_sglangs_unless_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """W4A8 on SM120, where SGLang computes that too; W4A16 elsewhere."""
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.current_device", lambda: 0)
    monkeypatch.setattr("torch.cuda.get_device_name", lambda: "a card")
    monkeypatch.setattr("mxfp4_moe.integrations._sglang_decide.wheel.arch_for", lambda capability: "any")
    for capability, expected in (((12, 0), "mxfp8"), ((9, 0), "")):
        monkeypatch.setattr("torch.cuda.get_device_capability", lambda capability=capability: capability)
        monkeypatch.setattr("mxfp4_moe.integrations._sglang_decide.formats_on", lambda device: ("mxfp8",))
        found = choice(Settings(engines=("sglang",), selftest=False))
        assert found.format == expected
        assert "as SGLang computes" in found.reason
        monkeypatch.setattr("mxfp4_moe.integrations._sglang_decide.formats_on", lambda device: ("mxfp8", "bf16"))
        found = choice(Settings(engines=("sglang",), selftest=False))
        assert found.format == expected or (expected, found.format) == ("", "bf16")
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda: (12, 0))
    waits = choice(Settings(engines=("sglang",)))
    assert "the self-test has not been run on a card" in waits.reason
