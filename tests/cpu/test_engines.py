"""What stands between us and an engine: settings, hooks, versions, the line that is said, the doctor's row."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import stub_engines
from stub_engines import START, write_engine

from mxfp4_moe._health import remembered
from mxfp4_moe._install import wheel
from mxfp4_moe._install.driver import Gpu
from mxfp4_moe.integrations import _engines
from mxfp4_moe.integrations._engines import Settings, SettingsError, choose_activations, settings, standing
from mxfp4_moe.integrations._engines.findings import engine_findings, finding_of
from mxfp4_moe.integrations._engines.hooks import missing_hooks, missing_in_files

VLLM = _engines.engine("vllm")
TESTED = VLLM.tested[-1][0] + ".0"
POINT = "vllm.general_plugins = mxfp4_moe.integrations.vllm:register"
DOCTOR = """
import json
from mxfp4_moe.integrations._engines.findings import engine_findings
print(json.dumps([finding.as_dict() for finding in engine_findings() if "vLLM" in finding.text]))
"""

# ---- an engine starts, whatever it is --------------------------------------------------------------------------------

NO_HOOKS = VLLM.hooks[:1]
CASES = {  # version, hooks, what its modules do, settings, the line, the doctor's row
    "old": ("0.6.0", NO_HOOKS, "", {}, "vLLM 0.6.0 was not tested (tested: >=0.32, <0.34)", "was not tested"),
    "unknown": ("7.0.0", None, "", {}, "vLLM 7.0.0 was not tested", "MXFP4_MOE_ENGINES=untested"),
    "unknown, tried, and changed": (
        "7.0.0",
        NO_HOOKS,
        "",
        {"MXFP4_MOE_ENGINES": "untested"},
        f"vLLM 7.0.0 has no {VLLM.hooks[1].replace(':', '.')} (and {len(VLLM.hooks) - 2} more)",
        "which the integration needs",
    ),
    "a hook is gone": (TESTED, VLLM.hooks[:-1], "", {}, f"has no {VLLM.hooks[-1].replace(':', '.')}", "has no"),
    "broken": (TESTED, None, "raise RuntimeError('libcuda.so.1: no')", {}, "which the integration needs", "is in"),
    "what was found is not what it was": (TESTED, None, "", {}, "own kernels run: ", "is in"),
    "off": (TESTED, None, "", {"MXFP4_MOE_ENGINES": "off"}, "MXFP4_MOE_ENGINES leaves vllm out", "leaves vllm out"),
    "others alone": (TESTED, None, "", {"MXFP4_MOE_ENGINES": "sglang"}, "leaves vllm out", "leaves vllm out"),
    "a typing error": (
        TESTED,
        None,
        "",
        {"MXFP4_MOE_ACTIVATIONS": "fp4"},
        "MXFP4_MOE_ACTIVATIONS: expected engine, bf16, fp16 or mxfp8, got 'fp4'",
        "expected engine, bf16, fp16 or mxfp8",
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_the_engine_starts_and_one_line_says_why(case: str, tmp_path: Path) -> None:
    version, hooks, broken, settings, line, row = CASES[case]
    write_engine(tmp_path, VLLM, version, hooks, broken=broken, point=POINT)
    started = stub_engines.run(tmp_path, START.format(module="vllm", group="vllm.general_plugins"), **settings)
    assert (started.returncode, started.stdout) == (0, "started\n"), started.stderr
    said = started.stderr.strip().splitlines()
    assert len(said) == 1, said
    assert "mxfp4-moe" in said[0]
    assert "vLLM's own kernels run" in said[0]
    assert line in said[0]
    doctor = stub_engines.run(tmp_path, DOCTOR, **settings)
    (finding,) = json.loads(doctor.stdout)
    assert finding["level"] == "ok"
    assert f"vLLM {version}" in finding["text"]
    assert row in f"{finding['text']} -> {finding['next_step']}"


def test_an_engine_that_cannot_be_imported_from_here_is_left_alone(tmp_path: Path) -> None:
    """The package of another name is there, and its metadata is not."""
    write_engine(tmp_path, VLLM, TESTED, point=POINT)
    for file in (tmp_path / f"vllm-{TESTED}.dist-info").glob("METADATA"):
        file.unlink()
    started = stub_engines.run(tmp_path, "import mxfp4_moe.integrations.vllm as v; v.register(); print('started')")
    assert started.stdout == "started\n", started.stderr
    assert "vLLM of unknown version was not tested" in started.stderr


def test_register_does_not_raise_where_stderr_is_closed(tmp_path: Path) -> None:
    write_engine(tmp_path, VLLM, "7.0.0", point=POINT)
    code = "import sys; sys.stderr.close(); " + START.format(module="vllm", group="vllm.general_plugins").strip()
    started = stub_engines.run(tmp_path, code.replace("; import importlib", "\nimport importlib"))
    assert (started.returncode, started.stdout) == (0, "started\n")


def test_the_wheel_has_the_entry_point() -> None:
    """pyproject.toml's; the installed wheel of a test run may be older than this tree."""
    text = (Path(__file__).parents[2] / "pyproject.toml").read_text(encoding="utf-8")
    group, _, value = POINT.partition(" = ")
    assert f'[project.entry-points."{group}"]\nmxfp4_moe = "{value}"\n' in text


# ---- hooks -----------------------------------------------------------------------------------------------------------

MODULE = """
import os.path
from typing import Any as Whatever
if True:
    CONSTANT: int = 1
try:
    import nothing_of_this_name as maybe
except ImportError:
    maybe = None
def function(): ...
class Class:
    attribute = 1
    def method(self): ...
    class Inner:
        def deep(self): ...
first, second = 1, 2
Class.method.marked = True  # writes to what Class is, and does not bind it anew
"""
THERE = ["os", "Whatever", "CONSTANT", "maybe", "function", "Class", "Class.method", "Class.Inner.deep", "second"]
NOT_THERE = ["gone", "Class.gone", "Class.Inner.gone", "function.gone_too"]


def test_hooks_are_found_in_a_running_engine_and_in_its_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "stub_hooks").mkdir()
    (tmp_path / "stub_hooks" / "__init__.py").write_text("")
    (tmp_path / "stub_hooks" / "module.py").write_text(MODULE)
    monkeypatch.syspath_prepend(str(tmp_path))
    hooks = [f"stub_hooks.module:{name}" for name in (*THERE, *NOT_THERE)]
    absent = [f"stub_hooks.module:{name}" for name in NOT_THERE]
    assert missing_in_files(hooks) == absent
    assert missing_hooks(hooks) == absent
    for search in (missing_in_files, missing_hooks):
        assert search(["stub_hooks.other:x", "no_package_has_this_name:x"]) == [
            "stub_hooks.other:x",
            "no_package_has_this_name:x",
        ]


def test_files_are_read_and_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "stub_broken").mkdir()
    (tmp_path / "stub_broken" / "__init__.py").write_text("raise SystemError('do not import me')\nname = 1\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert missing_in_files(["stub_broken:name"]) == []
    assert missing_hooks(["stub_broken:name"]) == ["stub_broken:name"]


# ---- versions and settings -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("version", "tested"),
    [("0.32", True), ("0.32.0", True), ("0.33.9+cu130", True), ("0.34.0", False), ("0.31.9", False), ("", False)],
)
def test_ranges_are_half_open(version: str, tested: bool) -> None:
    engine = _engines.Engine(**{**vars(VLLM), "tested": (("0.32", "0.34"),)})
    assert standing.is_tested(engine, version) is tested


def test_settings_have_defaults_and_refuse_what_they_do_not_know() -> None:
    default = Settings.read({})
    assert default == Settings(engines=tuple(engine.name for engine in _engines.ENGINES))
    assert (default.activations, default.verify, default.selftest, default.untested, default.cpu) == (
        *("engine", False, True, False, False),
    )
    given = Settings.read(
        {
            "MXFP4_MOE_ENGINES": " vLLM, sglang",
            "MXFP4_MOE_ACTIVATIONS": "MXFP8",
            "MXFP4_MOE_VERIFY": "1",
            "MXFP4_MOE_SELFTEST": "skip",
            "MXFP4_MOE_CPU": "1",
        }
    )
    assert given == Settings(
        engines=("vllm", "sglang"), activations="mxfp8", verify=True, selftest=False, cpu=True, untested=False
    )
    for name, value in {
        "MXFP4_MOE_ENGINES": "vlm",
        "MXFP4_MOE_ACTIVATIONS": "w4a8",
        "MXFP4_MOE_VERIFY": "yes",
        "MXFP4_MOE_SELFTEST": "no",
        "MXFP4_MOE_CPU": "true",
    }.items():
        with pytest.raises(SettingsError, match=f"{name}: expected .*, got '{value}'"):
            Settings.read({name: value})


# ---- activations: what the engine would have, unless asked for -------------------------------------------------------


@pytest.mark.parametrize(
    ("asked", "formats", "dtype", "engine_default", "expected", "words"),
    [
        ("engine", ("mxfp8",), "bf16", "", "", "as vLLM computes"),
        ("engine", ("mxfp8", "bf16", "fp16"), "bf16", "", "bf16", "bfloat16 activations (W4A16), as vLLM computes"),
        ("engine", ("mxfp8", "bf16", "fp16"), "fp16", "", "fp16", "float16 activations (W4A16), as vLLM computes"),
        ("engine", ("mxfp8", "bf16"), "fp16", "", "", "no kernels with float16 activations (W4A16) on this device"),
        ("fp16", ("mxfp8", "bf16", "fp16"), "fp16", "mxfp8", "fp16", "float16 activations (W4A16), as MXFP4_MOE_ACTIV"),
        (
            "bf16",
            ("mxfp8", "bf16", "fp16"),
            "fp16",
            "",
            "bf16",
            "bfloat16 activations (W4A16), as MXFP4_MOE_ACTIVATIONS",
        ),
        ("engine", ("mxfp8",), "bf16", "mxfp8", "mxfp8", "MXFP8 activations (W4A8), as vLLM computes"),
        ("mxfp8", ("mxfp8", "bf16"), "bf16", "", "mxfp8", "as MXFP4_MOE_ACTIVATIONS says"),
        ("bf16", ("mxfp8",), "bf16", "mxfp8", "", "as MXFP4_MOE_ACTIVATIONS says"),
    ],
)
def test_activations_are_the_engines_unless_asked_for(
    asked: str, formats: tuple[str, ...], dtype: str, engine_default: str, expected: str, words: str
) -> None:
    settings = Settings(engines=("vllm",), activations=asked)
    choice = choose_activations(VLLM, settings, formats, dtype=dtype, engine_default=engine_default)
    assert choice.format == expected
    assert words in choice.reason
    offers = "MXFP4_MOE_ACTIVATIONS=mxfp8" in choice.next_step
    assert offers is (not expected)


def test_float16_activations_are_for_float16_models() -> None:
    settings, formats = Settings(engines=("vllm",), activations="fp16"), ("mxfp8", "bf16", "fp16")
    choice = choose_activations(VLLM, settings, formats, dtype="bf16")
    assert choice.format == ""
    assert "take a float16 model, and this one is computed in bfloat16" in choice.reason
    assert choice.next_step == "MXFP4_MOE_ACTIVATIONS=bf16 takes it as it is"
    choice = choose_activations(VLLM, Settings(engines=("vllm",)), ("mxfp8", "bf16"), dtype="fp16")
    assert choice.next_step.startswith(
        "MXFP4_MOE_ACTIVATIONS=bf16 rounds to bfloat16 ones; MXFP4_MOE_ACTIVATIONS=mxfp8"
    )


# ---- SM12x waits for the self-test -----------------------------------------------------------------------------------

CARD = Gpu(index=0, name="NVIDIA GeForce RTX 5090", capability=(12, 0))
SETTINGS = Settings(engines=("vllm",))


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MXFP4_MOE_CACHE_DIR", str(tmp_path))


def remember(passed: int) -> None:
    remembered.write(CARD.name, CARD.capability, passed=passed, tiles=26, driver="580.82", torch="2.13.0")


@pytest.mark.usefixtures("cache")
def test_sm12x_waits_for_a_passed_selftest_of_this_wheel(monkeypatch: pytest.MonkeyPatch) -> None:
    def gate(settings: Settings = SETTINGS) -> str:
        found = _engines.selftest_gate(CARD.name, CARD.capability, settings)
        return "" if found is None else " -> ".join(found)

    assert _engines.selftest_gate("NVIDIA H200", (9, 0), SETTINGS) is None
    assert gate().startswith("the self-test has not been run on NVIDIA GeForce RTX 5090 -> run `mxfp4-moe doctor")
    assert gate(Settings(engines=("vllm",), selftest=False)) == ""
    remember(25)
    assert gate().startswith("1 of 26 tiles failed the self-test")
    remember(26)
    assert gate() == ""
    monkeypatch.setattr(wheel, "fingerprint", lambda: "another wheel")
    assert "of another wheel" in gate()


@pytest.mark.usefixtures("cache")
def test_the_doctor_says_that_an_engine_waits() -> None:
    there = _engines.Standing(engine=VLLM, version=TESTED, is_in=True, reason=VLLM.how)
    waits = finding_of(there, (CARD,))
    assert "mxfp4-moe waits, the self-test has not been run" in waits.text
    assert "doctor --selftest" in waits.next_step
    remember(26)
    assert finding_of(there, (CARD,)).text.startswith(f"vLLM {TESTED}: mxfp4-moe is in, by entry point")


def test_the_doctor_names_engines_where_none_is_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(standing, "installed_version", lambda engine: "")
    (finding,) = engine_findings()
    assert finding.text == "none of vLLM, SGLang, transformers is installed"


# ---- one fact, one place ---------------------------------------------------------------------------------------------

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("engine", [row for row in _engines.ENGINES if row.tested], ids=lambda row: row.name)
def test_the_page_has_the_tested_versions(engine: _engines.Engine) -> None:
    page = (ROOT / "docs" / "engines.md").read_text(encoding="utf-8")
    assert f"| {engine.title} | {standing.ranges(engine)} | {', '.join(engine.tested_with)} |" in page


def test_the_page_has_every_setting() -> None:
    page = (ROOT / "docs" / "engines.md").read_text(encoding="utf-8")
    variables = [value for name, value in vars(settings).items() if name.endswith("_VARIABLE")]
    assert len(variables) == 5
    assert [variable for variable in variables if f"| `{variable}` |" not in page] == []


@pytest.mark.parametrize(
    "path", sorted((ROOT / "ci" / "engines").glob("*-requirements.txt")), ids=lambda path: path.stem
)
def test_ci_runs_an_engine_whose_version_is_in_the_range(path: Path) -> None:
    engine = _engines.engine(path.name.removesuffix("-requirements.txt"))
    lines = [line for line in path.read_text(encoding="utf-8").splitlines() if not line.startswith("#")]
    pins = dict(line.lower().split("==") for line in lines)
    (version,) = [pins[name] for name in engine.distributions if name in pins]
    assert standing.is_tested(engine, version)
    workflow = (ROOT / ".github" / "workflows" / "engines.yml").read_text(encoding="utf-8")
    assert f"ci/engines.sh {engine.name}\n" in workflow
