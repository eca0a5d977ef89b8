"""The table of troubles: what is recognized, what is cut off, and the page that is made of it."""

from __future__ import annotations

import re
from typing import Any

import pytest
from broken import PACKAGE

from mxfp4_moe._install.troubles import OWN_MESSAGES, TROUBLES, Trouble, Versions, recognize, release, words
from wheelbuild import ROOT
from wheelbuild.docs.troubleshooting import DOCUMENT, document

SAME = Versions(wheel_cuda="13.0.88", torch_cuda="13.0")
OTHER = Versions(wheel_cuda="13.0.88", torch_cuda="12.8")
CPU = Versions(wheel_cuda="13.0.88")
NO_TORCH = Versions(wheel_cuda="13.0.88", importing_torch=True)
BY_NAME = {trouble.name: trouble for trouble in TROUBLES}


def where_it_occurs(trouble: Trouble) -> Versions:
    return next(versions for versions in (SAME, OTHER, CPU, NO_TORCH) if trouble.when(versions))


@pytest.mark.parametrize("name", BY_NAME)
def test_a_row_recognizes_its_own_examples_and_says_what_to_do(name: str) -> None:
    trouble = BY_NAME[name]
    here = where_it_occurs(trouble)
    assert trouble.examples
    for example in trouble.examples:
        assert recognize(example, here) is trouble
    for sentence in trouble.words(here):
        assert not re.search(r"[{}\n]|\.$", sentence), "filled in, and to be continued with ';'"
        assert sentence


def test_names_are_headings_of_their_own() -> None:
    assert len(BY_NAME) == len(TROUBLES)


@pytest.mark.parametrize(
    ("versions", "name", "remedy"),
    [
        (SAME, "no CUDA runtime library", "reinstall torch for CUDA 13 "),
        (CPU, "no CUDA runtime library", "reinstall torch for CUDA 13 "),
        (OTHER, "a wheel for another CUDA", "built for CUDA 13, or the mxfp4-moe wheel for CUDA 12"),
        (NO_TORCH, "a torch that cannot be imported", "reinstall torch"),
        (Versions(), "no CUDA runtime library", "reinstall torch for CUDA the wheel's version"),
    ],
)
def test_one_message_means_different_things(versions: Versions, name: str, remedy: str) -> None:
    message = "libcudart.so.13: cannot open shared object file: No such file or directory"
    trouble = recognize(message, versions)
    assert trouble is not None
    assert trouble.name == name
    assert remedy in trouble.words(versions)[1]


@pytest.mark.parametrize(
    "message",
    [
        "CUDA out of memory. Tried to allocate 2 GiB",
        "hidden_states: expected bfloat16 or float16 [T, H], got float32",
        "CUDA error: an illegal memory access was encountered",
        "weights: expected MoEWeights on cuda:0",
        "libcuda.so.1: undefined symbol: cuInit",
        "",
    ],
)
def test_what_is_not_about_the_install_is_left_alone(message: str) -> None:
    for versions in (SAME, OTHER, CPU):
        assert recognize(message, versions) is None


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("Found no NVIDIA driver on your system. Please check that", "Found no NVIDIA driver on your system."),
        ("Error 36: not supported (Triggered internally at CUDAFunctions.cpp:119.)", "Error 36: not supported"),
        ("\nCUDA error: invalid\nCompile with TORCH_USE_CUDA_DSA", "CUDA error: invalid"),
        ("", ""),
    ],
)
def test_advice_is_cut_off(text: str, line: str) -> None:
    assert words(RuntimeError(text)) == (line or "RuntimeError")
    assert words(OSError(text)) == (f"OSError: {line}" if line else "OSError")


@pytest.mark.parametrize(
    ("older", "newer"), [("2.9.1+cu130", "2.10"), ("2.10.0", "2.10.1a0+git"), ("", "0.1"), ("9", "10"), ("x2.3", "1")]
)
def test_releases_are_compared_by_their_numbers(older: str, newer: str) -> None:
    assert release(older) < release(newer)


def test_the_page_is_current() -> None:
    written = (ROOT / DOCUMENT).read_text(encoding="utf-8")
    assert written == document(), "run python -m wheelbuild.docs.troubleshooting"


def test_the_page_has_every_message() -> None:
    page = document()
    sections = dict(re.findall(r"^## ([^\n]+)\n\n```\n(.+?)\n```", page, re.MULTILINE | re.DOTALL))
    for trouble in TROUBLES:
        assert sections[trouble.name[0].upper() + trouble.name[1:]].splitlines() == list(trouble.examples)
    assert "{" not in page


@pytest.mark.parametrize("own", OWN_MESSAGES, ids=lambda own: own.message[:20])
def test_the_packages_own_messages_are_in_its_source(own: Any) -> None:
    source = "".join(path.read_text(encoding="utf-8") for path in PACKAGE.rglob("*.py") if path.name != "troubles.py")
    flat = re.sub(r'"\s*\n\s*f?"', "", source)  # strings that go on on the next line
    for part in re.split(r"\.\.\.|`mxfp4-moe doctor --selftest`", own.message):
        assert part.strip(" :;,") in flat, part
