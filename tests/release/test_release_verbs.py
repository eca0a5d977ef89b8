"""The scripts that make a release, on the wheel in dist/: repair, audit, test, sdist, index, and what each refuses.

The same scripts run in the release's containers. A wheel here has been built by ci/build.sh."""

from __future__ import annotations

import contextlib
import hashlib
import html.parser
import json
import re
import subprocess
import sys
import time
import urllib.request
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from release_cases import built_wheel, changed
from release_tools import run, tool, verb

from wheelbuild import ROOT, BuildError
from wheelbuild.release.audit import audit
from wheelbuild.release.index import read_file, write_index
from wheelbuild.release.repair import highest, policy
from wheelbuild.release.sdist import compare, names
from wheelbuild.thresholds import load_thresholds


def test_the_wheel_gets_the_tag_that_torch_has_and_says_why(repaired: Path) -> None:
    said = (repaired.parent / "said").read_text(encoding="utf-8")
    assert re.search(r"-cp310-abi3-manylinux_2_28_\w+\.whl$", repaired.name)
    assert re.search(r"its symbols allow manylinux_2_\d\d; tagged manylinux_2_28_\w+", said)
    assert "warning" not in said
    floors = dict(re.findall(r"^  (\w+)_([\d.]+): \w", said, re.MULTILINE))
    assert [int(part) for part in floors["GLIBC"].split(".")] <= [2, 28]
    assert [int(part) for part in floors["GLIBCXX"].split(".")] <= [3, 4, 24]


def test_repair_changes_tags_and_nothing_else(repaired: Path) -> None:
    with zipfile.ZipFile(built_wheel()) as before, zipfile.ZipFile(repaired) as after:
        files = {name for name in after.namelist() if not name.endswith("/")}
        assert files == set(before.namelist())
        differing = {name.split("/")[-1] for name in files if before.read(name) != after.read(name)}
    assert differing <= {"WHEEL", "RECORD"}


def test_the_verdict_names_what_holds_it_higher() -> None:
    found = [("GLIBC_2.14", "memcpy"), ("GLIBC_2.4", "x"), ("GLIBC_2.14", "a"), ("libcudart.so.13", "cudaFree")]
    assert highest(found) == {"GLIBC": ("GLIBC_2.14", ["a", "memcpy"])}
    show = 'This constrains the platform\ntag to "manylinux_2_34_x86_64". In order'
    assert policy(show) == ((2, 34), "x86_64")
    with pytest.raises(BuildError, match="auditwheel found no manylinux policy for the wheel: nothing"):
        policy("nothing")


def test_a_wheel_for_newer_systems_is_tagged_so_with_a_warning(tmp_path: Path) -> None:
    """A library that needs what glibc 2.34 has: the tag says so, and the symbol is named."""
    source = tmp_path / "new.c"
    source.write_text(
        '__asm__(".symver new_dlopen,dlopen@GLIBC_2.34");\nvoid *new_dlopen(const char *, int);\n'
        "void *PyInit_moe(void) { return new_dlopen(0, 1); }\n",
        encoding="utf-8",
    )
    library = tmp_path / "moe.abi3.so"
    made = run("gcc", "-shared", "-fPIC", "-o", library, source)
    if "undefined" in made.stdout:
        pytest.fail("this machine's glibc is older than 2.34, and the test needs a newer one")
    assert made.returncode == 0, made.stdout
    with zipfile.ZipFile(built_wheel()) as archive:
        (record,) = [name for name in archive.namelist() if name.endswith("/RECORD")]
    newer = changed(built_wheel(), tmp_path, "_ext/moe.abi3.so", lambda _: library.read_bytes())
    assert record
    said = verb("repair", newer, tmp_path / "out")
    assert re.search(r"its symbols allow manylinux_2_3[4-9]; tagged manylinux_2_3[4-9]", said)
    assert "GLIBC_2.34: dlopen" in said
    assert "warning: older systems that torch supports (manylinux_2_28) cannot load this wheel" in said


def test_the_wheel_passes_the_audit(repaired: Path) -> None:
    said = verb("audit", repaired)
    count = len(json.loads(zipfile.ZipFile(repaired).read("mxfp4_moe/build_report.json"))["tiles"])
    assert re.search(r"Torch ABI: +STABLE", said)
    assert re.search(r"CPython ABI: +abi3", said)
    assert re.search(r"Min torch: +2\.10\.0", said)
    assert f"Extensions:  {count + 1}" in said
    assert "errors found while checking: 0" in said
    assert f"{repaired.name}: {count} tiles, " in said
    hazards = (
        rf"{re.escape(repaired.name)}: (\d+) kernels for sm_120, .* dependencies: no error, \d+ warnings of \d+ kinds"
    )
    found = re.search(hazards, said)
    assert found is not None
    assert int(found[1]) > count, "a kernel for each tile, and those of moe"


@pytest.mark.parametrize(
    ("name", "edit", "sentence"),
    [
        ("METADATA", lambda data: data.replace(b"torch>=2.10", b"torch>=2.10,<3"), "expected torch>=2.10 and no ceil"),
        (
            "METADATA",
            lambda data: data.replace(b"Name: mxfp4-moe", b"Name: mxfp4-moa"),
            "Name is 'mxfp4-moa', ",
        ),
        ("METADATA", lambda data: data.replace(b"License-File: LICENSE\n", b""), "LICENSE is not among the License-"),
        ("METADATA", lambda data: re.sub(rb"Project-URL: .*\n", b"", data), "expected project URLs in the metadata"),
        ("licenses/LICENSE", lambda data: data[1:], "LICENSE in the wheel is not the source tree's"),
        ("WHEEL", lambda data: data.replace(b"cp310-abi3", b"cp311-abi3"), "WHEEL has the tags"),
        (
            "_ext/moe.abi3.so",
            lambda data: data + b"0",
            "moe.abi3.so is not the library that the build report",
        ),
        ("_ext/moe.abi3.so", lambda _: None, "missing from the wheel: mxfp4_moe/_ext/moe.abi3.so"),
        ("mxfp4_moe/py.typed", lambda _: None, "missing from the wheel: mxfp4_moe/py.typed"),
        (".cdx.json", lambda data: data.replace(b'"CUTLASS"', b'"CUTLESS"'), "does not name CUTLASS"),
        (".cdx.json", lambda data: data.replace(b"BSD-3-Clause", b"MIT"), "has no licence of CUTLASS"),
        (".cdx.json", lambda data: re.sub(rb'"content": "\w', b'"content": "x', data), "differ about the libraries"),
        ("build_report.json", lambda data: data.replace(b'"cuda": "13.', b'"cuda": "14.'), "not in ci/cuda-versions"),
    ],
)
def test_what_is_wrong_with_a_wheel_is_one_sentence(
    name: str, edit: Callable[[bytes], bytes | None], sentence: str, repaired: Path, tmp_path: Path
) -> None:
    with pytest.raises(BuildError, match=re.escape(sentence)):
        audit(changed(repaired, tmp_path, name, edit))


def test_a_stranger_in_the_wheel_and_a_wrong_name_are_refused(repaired: Path, tmp_path: Path) -> None:
    copy = changed(repaired, tmp_path, "none", lambda data: data)
    with zipfile.ZipFile(copy, "a") as archive:
        archive.writestr("mxfp4_moe/notes.txt", "x")
    with pytest.raises(BuildError, match=r"unexpected in the wheel: mxfp4_moe/notes\.txt"):
        audit(copy)
    other = copy.rename(tmp_path / repaired.name.replace("cp310", "cp312"))
    with pytest.raises(BuildError, match="expected mxfp4_moe"):
        audit(other)


def test_a_wheel_that_is_too_large_is_refused(repaired: Path, tmp_path: Path) -> None:
    profile = json.loads(zipfile.ZipFile(repaired).read("mxfp4_moe/build_report.json"))["profile"]
    limit = load_thresholds().wheel_bytes[profile]
    copy = changed(repaired, tmp_path, "WHEEL", lambda data: data)
    with copy.open("r+b") as stream:  # zip readers allow anything before the archive
        data = stream.read()
        stream.seek(0)
        stream.write(bytes(limit) + data)
    with pytest.raises(BuildError, match=rf"at most {limit:,} allowed"):
        audit(copy)


def test_the_bill_of_materials_is_valid_cyclonedx(repaired: Path) -> None:
    with zipfile.ZipFile(repaired) as archive:
        (name,) = [name for name in archive.namelist() if "/sboms/" in name and not name.endswith("/")]
        data = json.loads(archive.read(name))
    assert name.endswith(".dist-info/sboms/mxfp4-moe.cdx.json")
    parts = {part["name"]: part for part in data["components"]}
    assert set(parts) == {"CUTLASS", "CCCL", "CUDA-Toolkit", "PyTorch"}
    assert all(part["licenses"] and part["version"] and part["purl"].startswith("pkg:") for part in parts.values())
    references = [part["bom-ref"] for part in data["components"]]
    assert sorted(data["dependencies"][0]["dependsOn"]) == sorted(references)
    assert len(set(references)) == len(references)
    table = (ROOT / "3rdparty" / "README.md").read_text(encoding="utf-8")
    compiled_in = [line for line in table.splitlines() if line.startswith("|") and "compiled in" in line]
    assert len(compiled_in) == len(parts), "people and machines are told of the same parts"


def test_the_sdist_is_what_git_knows(tmp_path: Path) -> None:
    said = verb("sdist", tmp_path / "first")
    verb("sdist", tmp_path / "second")
    (first,), (second,) = ((tmp_path / folder).glob("*.tar.gz") for folder in ("first", "second"))
    assert str(first) in said
    assert re.fullmatch(r"mxfp4_moe-\d+\.\d+\.\d+\.tar\.gz", first.name), "no CUDA version: a source has none"
    assert first.read_bytes() == second.read_bytes()
    assert {"setup.py", "tile_manifest.toml", "ci/build.sh", "csrc/tile/tile.cu", "tests/conftest.py"} <= names(first)


def test_an_sdist_that_lacks_or_adds_something_is_refused() -> None:
    compare({"a", "PKG-INFO", "setup.cfg", "python/mxfp4_moe.egg-info/SOURCES.txt"}, {"a"})
    with pytest.raises(BuildError, match=r"not in the sdist, and git knows it \(MANIFEST\.in\): b, c"):
        compare({"a"}, {"a", "b", "c"})
    with pytest.raises(BuildError, match=r"in the sdist, and git does not know it \(MANIFEST\.in\): b"):
        compare({"a", "b"}, {"a"})


class Links(html.parser.HTMLParser):
    """The links of a page, as dictionaries of attributes, with their text."""

    def __init__(self, page: Path) -> None:
        super().__init__()
        self.found: list[dict[str, str]] = []
        self.feed(page.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag == "a":
            self.found.append({name: value or "" for name, value in attrs})

    def handle_data(self, data: str) -> None:
        if self.found and "text" not in self.found[-1] and data.strip():
            self.found[-1]["text"] = data


def label_of(wheel: Path) -> str:
    match = re.search(r"\+(cu\d+)", wheel.name)
    assert match
    return match[1]


def test_the_index_is_pep_503_and_691(site: Path, repaired: Path) -> None:
    label = label_of(repaired)
    project = site / label / "mxfp4-moe"
    assert [link["href"] for link in Links(site / "index.html").found] == [f"{label}/"]
    assert [link["href"] for link in Links(site / label / "index.html").found] == ["mxfp4-moe/"]
    digest = hashlib.sha256(repaired.read_bytes()).hexdigest()
    metadata = hashlib.sha256((project / f"{repaired.name}.metadata").read_bytes()).hexdigest()
    (link,) = Links(project / "index.html").found
    assert link == {
        "href": f"{repaired.name.replace('+', '%2B')}#sha256={digest}",
        "data-requires-python": ">=3.10",
        "data-core-metadata": f"sha256={metadata}",
        "data-dist-info-metadata": f"sha256={metadata}",
        "text": repaired.name,
    }
    data = json.loads((project / "index.json").read_text(encoding="utf-8"))
    assert (data["meta"], data["name"]) == ({"api-version": "1.1"}, "mxfp4-moe")
    (file,) = data["files"]
    assert (file["filename"], file["hashes"], file["size"]) == (
        repaired.name,
        {"sha256": digest},
        repaired.stat().st_size,
    )
    assert (site / "SHA256SUMS").read_text(encoding="utf-8") == f"{digest}  {repaired.name}\n"


def test_an_index_takes_releases_only(repaired: Path, tmp_path: Path) -> None:
    assert read_file(tmp_path / "mxfp4_moe_cu13-0.1.0-cp310-abi3-manylinux_2_28_x86_64.whl") is None
    assert read_file(tmp_path / "torch-2.13.0-cp311-cp311-manylinux_2_28_x86_64.whl") is None
    with pytest.raises(BuildError, match=r"dev1a2b marks a build that is not for release"):
        read_file(tmp_path / "mxfp4_moe-0.1.0+cu130.dev1a2b-cp310-abi3-manylinux_2_28_x86_64.whl")
    with pytest.raises(BuildError, match=r"has no manylinux tag: run ci/repair\.sh first"):
        read_file(tmp_path / "mxfp4_moe-0.1.0+cu130-cp310-abi3-linux_x86_64.whl")
    with pytest.raises(BuildError, match="no wheels for an index"):
        write_index([], tmp_path / "site")
    file = read_file(repaired)
    assert file is not None
    with pytest.raises(BuildError, match="two wheels of one name"):
        write_index([file, file], tmp_path / "site")
    with pytest.raises(BuildError, match="is not empty; the index is written afresh"):
        write_index([file], repaired.parent)


@contextlib.contextmanager
def served(site: Path, address_file: Path) -> Iterator[str]:
    server = subprocess.Popen([sys.executable, ROOT / "ci" / "serve_index.py", site, address_file])
    try:
        while not address_file.exists() or not address_file.read_text():
            assert server.poll() is None, "the server ended"
            time.sleep(0.05)
        yield address_file.read_text(encoding="utf-8")
    finally:
        server.terminate()
        server.wait()


def test_pip_installs_by_name_from_the_index_and_uninstalls_everything(
    site: Path, repaired: Path, tmp_path: Path
) -> None:
    label = label_of(repaired)
    target = tmp_path / "env"
    made = run(sys.executable, "-m", "venv", target)
    assert made.returncode == 0, made.stdout
    pip = (target / "bin" / "python", "-m", "pip", "--isolated", "--no-cache-dir", "--disable-pip-version-check")
    before = sorted(path for path in target.rglob("*") if "__pycache__" not in path.parts)
    with served(site, tmp_path / "address") as address:
        accept = {"Accept": "application/vnd.pypi.simple.v1+json"}
        request = urllib.request.Request(f"{address}/{label}/mxfp4-moe/", headers=accept)
        with urllib.request.urlopen(request) as response:
            assert response.headers["Content-Type"] == accept["Accept"]
            assert json.load(response)["name"] == "mxfp4-moe"
        index = ("--index-url", f"{address}/{label}/")
        installed = run(*pip, "install", "--no-deps", *index, "mxfp4-moe", env={"PYTHONPATH": ""})
    assert installed.returncode == 0, installed.stdout
    assert f"Successfully installed mxfp4-moe-{repaired.name.split('-')[1]}" in installed.stdout
    said = run(target / "bin" / "mxfp4-moe", "--version", env={"PYTHONPATH": ""})
    assert said.stdout.split() == ["mxfp4-moe", repaired.name.split("-")[1]]
    removed = run(*pip, "uninstall", "--yes", "mxfp4-moe", env={"PYTHONPATH": ""})
    assert removed.returncode == 0, removed.stdout
    assert sorted(path for path in target.rglob("*") if "__pycache__" not in path.parts) == before


def test_symbols_are_read_as_objdump_reads_them(repaired: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(repaired) as archive:
        library = archive.extract("mxfp4_moe/_ext/moe.abi3.so", tmp_path)
    program = (
        "import json, sys; from pathlib import Path; from wheelbuild.release.repair import symbol_versions; "
        "print(json.dumps(symbol_versions(Path(sys.argv[1]))))"
    )
    ours = {(version, name) for version, name in json.loads(tool("python", "-c", program, library))}
    listed = run("objdump", "-T", library).stdout
    theirs = set(re.findall(r"\*UND\*\s+\w+\s+\(?([\w.]+)\)?\s+(\w+)$", listed, re.MULTILINE))
    versioned = {(version, name) for version, name in theirs if version not in ("Base",)}
    assert ours
    assert ours == {(version, name) for version, name in versioned if re.search(r"\d", version)}
