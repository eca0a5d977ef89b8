"""The checks: each a pure function from an `Environment` to findings, with the next step for whatever is not well.

A check whose part of the environment is None finds nothing: `examine` has said why that part could not be looked at.

Levels: an error where nothing works on a GPU that is here, or where a file is not what was built; a warning where
something is worse than it could be, such as no GPU, a tile that gives way to another, a list that is ignored.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

from .._cache import CACHE_DIR_VARIABLE
from .._troubles import REINSTALL, TORCH_FLOOR, Versions, major, recognize, release
from .._wheel import arch_for, emulation_words
from ..blocklist import REMEDY
from .environment import Environment, Library, Remembered, WheelFacts
from .findings import Finding, Level

SELFTEST = "`mxfp4-moe doctor --selftest` runs every tile on the GPU"
_ISSUE = "open an issue with what `mxfp4-moe doctor` prints"
_SLOWLY = "CPU tensors work, slowly"
_SHOWN = 3

Check = Callable[[Environment], Iterator[Finding]]


def examine(env: Environment) -> list[Finding]:
    """All checks, in the order in which a reader wants them. Never raises: a check that does is a finding."""
    findings: list[Finding] = []
    for subject, check in CHECKS:
        if subject in env.faults:
            text, step = explained(env, env.faults[subject], REINSTALL)
            findings.append(error(subject, f"cannot be examined: {text}", step))
            continue
        try:
            findings.extend(check(env))
        except Exception as reason:
            findings.append(error(subject, f"cannot be examined: {type(reason).__name__}: {reason}", _ISSUE))
    return findings


def ok(subject: str, text: str, next_step: str = "") -> Finding:
    return Finding(level=Level.OK, subject=subject, text=text, next_step=next_step)


def warning(subject: str, text: str, next_step: str) -> Finding:
    return Finding(level=Level.WARNING, subject=subject, text=text, next_step=next_step)


def error(subject: str, text: str, next_step: str) -> Finding:
    return Finding(level=Level.ERROR, subject=subject, text=text, next_step=next_step)


def versions(env: Environment) -> Versions:
    cuda = env.wheel.cuda or env.wheel.cudart.rpartition(".so.")[2] if env.wheel else ""
    return Versions(wheel_cuda=cuda, torch_cuda=env.torch.cuda if env.torch else "")


def explained(env: Environment, message: str, otherwise: str, *, importing_torch: bool = False) -> tuple[str, str]:
    """A message with what it means, and the next step; the message alone and `otherwise` where it is not known."""
    here = replace(versions(env), importing_torch=importing_torch)
    trouble = recognize(message, here)
    if trouble is None:
        return message, otherwise
    means, remedy = trouble.words(here)
    return f"{means} ({message})", remedy


def some(sentences: Sequence[str]) -> str:
    """The first few; where every tile has the same trouble, the rest says nothing new."""
    shown = "; ".join(sentences[:_SHOWN])
    return shown if len(sentences) <= _SHOWN else f"{shown}; and {len(sentences) - _SHOWN} more"


# ---- the system ------------------------------------------------------------------------------------------------------


def check_python(env: Environment) -> Iterator[Finding]:
    python = env.python
    if python is None:
        return
    text = f"{python.implementation} {python.version}, {python.executable}"
    floor = env.wheel.python_floor if env.wheel else ""
    remedy = f"use an ordinary build of CPython {floor or '3.10'} or newer"
    if python.implementation != "CPython" or python.free_threaded:
        kind = "free-threaded, " if python.free_threaded else ""
        yield error("Python", f"{text}: {kind}does not load libraries of the stable ABI, which the wheel's are", remedy)
    elif release(python.version) < release(floor):
        yield error("Python", f"{text}: the wheel needs {floor} or newer", remedy)
    else:
        yield ok("Python", text)


def check_glibc(env: Environment) -> Iterator[Finding]:
    if env.python is None:
        return
    name, version = env.python.libc
    here = " ".join(filter(None, env.python.libc)) or "unknown"
    floor = env.wheel.glibc_floor if env.wheel else ""
    remedy = "use a newer Linux, or build the wheel on this one: ./ci/build.sh in the sources"
    if not floor:
        yield ok("glibc", here)
    elif name != "glibc":
        yield warning("glibc", f"{here}: the wheel needs glibc {floor} or newer, not another C library", remedy)
    elif release(version) < release(floor):
        yield error("glibc", f"{version}: the wheel's libraries need {floor} or newer", remedy)
    else:
        yield ok("glibc", f"{version}; the wheel's libraries need {floor} or newer")


def check_driver(env: Environment) -> Iterator[Finding]:
    driver = env.driver
    if driver is None:
        return
    if driver.cuda == "none" and not driver.error:
        yield warning(
            "driver", "no NVIDIA driver here", f"{_SLOWLY}; for a GPU install its driver (in a container: --gpus all)"
        )
        return
    text = f"{driver.version}, which serves CUDA {driver.cuda}"
    needed = versions(env).wheel_cuda
    if driver.error:
        words, step = explained(env, driver.error, "check the driver with nvidia-smi")
        yield error("driver", f"{text}: {words}", step)
    elif needed and driver.cuda != "none" and release(driver.cuda)[:1] < release(needed)[:1]:
        step = f"update the NVIDIA driver to one that serves CUDA {major(needed)} (nvidia-smi shows it as CUDA Version)"
        yield error("driver", f"{text}: too old for the wheel, which is for CUDA {major(needed)}", step)
    else:
        yield ok("driver", text)


def check_gpus(env: Environment) -> Iterator[Finding]:
    """Which machine code each GPU would run, and whether torch sees what the driver shows."""
    driver, wheel, torch = env.driver, env.wheel, env.torch
    if driver is None or driver.cuda == "none" or driver.error:
        return  # the driver's finding says it
    if not driver.gpus:
        step = f"{_SLOWLY}; check nvidia-smi and CUDA_VISIBLE_DEVICES"
        yield warning("GPU", "the driver shows this process none", step)
        return
    archs, on = (wheel.archs, wheel.emulated_on) if wheel else ((), "")
    usable = [gpu for gpu in driver.gpus if arch_for(gpu.capability, archs, on)]
    for gpu in driver.gpus:
        text = f"cuda:{gpu.index}, {gpu.name}, compute capability {gpu.capability[0]}.{gpu.capability[1]}"
        if wheel is None:
            yield ok("GPU", text)
            continue
        if arch := arch_for(gpu.capability, archs, on):
            cubin = f"sm_{arch}, emulated on sm_{on}" if on else f"sm_{arch}"
            yield ok("GPU", f"{text}: runs the cubin for {cubin}")
            continue
        make = warning if usable else error
        step = f"this wheel runs on {f'sm_{on}' if on else ', '.join(f'sm_{arch}' for arch in archs)}" + (
            "" if usable else f"; {_SLOWLY}"
        )
        yield make("GPU", f"{text}: no cubin in the wheel is for it", step)
    if torch and torch.cuda and not _too_old(env) and len(torch.gpus) < len(driver.gpus):
        words, step = explained(env, torch.gpu_error or "torch gives no reason", "check CUDA_VISIBLE_DEVICES")
        text = f"torch sees {len(torch.gpus)} of {len(driver.gpus)}: {words}"
        yield (warning if torch.gpus else error)("GPU", text, step)


# ---- the wheel -------------------------------------------------------------------------------------------------------


def check_wheel(env: Environment) -> Iterator[Finding]:
    wheel = env.wheel
    if wheel is None:
        return
    if wheel.conflict:
        text, _, step = wheel.conflict.partition(": ")
        yield error("wheel", text, step)
    if not wheel.has_report:
        text = f"{wheel.version} at {wheel.path} has no build report: a source tree, or a damaged install"
        yield error("wheel", text, REINSTALL)
        return
    archs = ", ".join(f"sm_{arch}" for arch in wheel.archs)
    yield ok(
        "wheel",
        f"{wheel.version}, profile {wheel.profile}, {wheel.tiles} tiles for {archs}, built with CUDA "
        f"{wheel.cuda or 'unknown'} and torch {wheel.torch or 'unknown'}"
        + (f"; {words}" if (words := emulation_words(wheel.archs, wheel.emulated_on)) else ""),
    )


def check_libraries(env: Environment) -> Iterator[Finding]:
    """Whether the files are there and whole."""
    wheel = env.wheel
    if wheel is None:
        return
    broken = [library for library in wheel.libraries if library.fault]
    whole = len(wheel.libraries) - len(broken)
    if broken:
        make = error if _nothing_left(broken, wheel) else warning
        yield make("libraries", some([library.fault for library in broken]), REINSTALL)
    if whole:
        hint = "" if env.verified else "; --verify compares their hashes with the build's"
        yield ok("libraries", f"{whole} of {len(wheel.libraries)} are whole{hint}")


def _nothing_left(lost: Sequence[Library], wheel: WheelFacts) -> bool:
    """Whether no call can run without these: the layer's own library is among them, or every tile is."""
    modules = {library.module for library in lost}
    return "moe" in modules or len(modules) == len(wheel.libraries) - 1


def check_hashes(env: Environment) -> Iterator[Finding]:
    """Only when asked for. A stripped library is not what was built either: that is for the user to know."""
    if not env.verified or env.wheel is None:
        return
    present = [library for library in env.wheel.libraries if library.sha256]
    unknown = [library for library in present if not library.built_sha256]
    changed = [library for library in present if library.built_sha256 not in ("", library.sha256)]
    if changed:
        names = some([f"{library.module}.abi3.so" for library in changed])
        text = f"{len(changed)} of {len(present)} libraries are not what was built: {names}"
        yield error("hashes", text, f"{REINSTALL}; where they were changed on purpose, {SELFTEST}")
    if unknown:
        text = f"{len(unknown)} of {len(present)} libraries have no hash in the build report to be compared with"
        yield warning("hashes", text, REINSTALL)
    if present and not changed and not unknown:
        yield ok("hashes", f"{len(present)} libraries are byte for byte what was built (SHA-256)")


# ---- torch and the CUDA runtime --------------------------------------------------------------------------------------


def _floor(env: Environment) -> str:
    return (env.wheel.torch_floor if env.wheel else "") or TORCH_FLOOR


def _too_old(env: Environment) -> bool:
    return bool(env.torch) and release(env.torch.version) < release(_floor(env))  # type: ignore[union-attr]


def _torch(env: Environment) -> str:
    cuda = major(versions(env).wheel_cuda)
    return f"a torch {_floor(env)} or newer that is built for CUDA {cuda}".rstrip()


def check_torch(env: Environment) -> Iterator[Finding]:
    torch, driver = env.torch, env.driver
    if torch is None:
        return
    install = f"pip install 'torch>={_floor(env)}': {_torch(env)}"
    if torch.error:
        words, step = explained(env, torch.error, install, importing_torch=True)
        yield error("torch", f"cannot be imported: {words}", step)
        return
    if not torch.version:
        yield error("torch", f"the process that imports it {torch.ended}", f"reinstall torch: {install}")
        return
    kind = f"CUDA {torch.cuda}" if torch.cuda else f"ROCm {torch.hip}" if torch.hip else "no CUDA"
    text = f"{torch.version} with {kind}"
    if _too_old(env):
        step = f"pip install --upgrade 'torch>={_floor(env)}': {_torch(env)}"
        yield error("torch", f"{text}: older than {_floor(env)}, for which the wheel's libraries are built", step)
    elif not torch.cuda and driver and driver.gpus:
        yield error("torch", f"{text}: it sees no GPU, and there is one here", f"install {_torch(env)}")
    elif not torch.cuda:
        step = f"{_SLOWLY}; for a GPU install {_torch(env)}"
        yield warning("torch", text, step)
    else:
        yield ok("torch", f"{text}; the wheel's libraries need {_floor(env)} or newer")


def check_cudart(env: Environment) -> Iterator[Finding]:
    """The CUDA runtime that the wheel's libraries get, against the one that torch brings."""
    wheel, cudart, torch = env.wheel, env.cudart, env.torch
    if wheel is None or not wheel.cudart:
        return  # no library to need one, which is a finding
    if cudart is None:
        text = f"{wheel.cudart} was not looked for, since torch's process {torch.ended if torch else 'did not start'}"
        yield warning("CUDA runtime", text, "see what is said about torch")
        return
    here = versions(env)
    if cudart.error:
        if torch and torch.version and not torch.cuda:
            yield ok("CUDA runtime", f"no {cudart.soname} here, and CPU tensors need none")
            return
        words, step = explained(env, cudart.error, f"install {_torch(env)}")
        yield error("CUDA runtime", words, step)
        return
    text = f"{cudart.version}, {cudart.path or cudart.soname}"
    if here.majors_differ:
        text += f"; torch brings another, {torch.cudart or f'CUDA {torch.cuda}'}" if torch else ""
        yield warning("CUDA runtime", text, f"install {_torch(env)}, so that both use one")
    else:
        yield ok("CUDA runtime", text)


def check_loading(env: Environment) -> Iterator[Finding]:
    """Whether the whole libraries load under this torch. Not asked of a torch that cannot."""
    wheel, torch = env.wheel, env.torch
    if wheel is None or torch is None or not torch.cuda or _too_old(env):
        return
    if torch.ended:
        step = f"{REINSTALL}; where that does not help, {_ISSUE}"
        yield error("loading", f"the process that tried the libraries {torch.ended}", step)
    failed = {module: message for module, message in torch.loaded.items() if message}
    lost = [library for library in wheel.libraries if library.module in failed]
    by_words: dict[tuple[str, str], list[str]] = {}
    for module, message in failed.items():
        means, step = explained(env, message, REINSTALL)
        known = recognize(message, versions(env))
        key = (known.name if known else message, step)
        by_words.setdefault(key, []).append(f"{module}: {means}")
    for (_, step), sentences in by_words.items():
        make = error if _nothing_left(lost, wheel) else warning
        more = "" if len(sentences) == 1 else f" (and {len(sentences) - 1} more for the same reason)"
        yield make("loading", f"{sentences[0]}{more}", step)
    good = len(torch.loaded) - len(failed)
    if good:
        yield ok("loading", f"{good} of {len(wheel.libraries)} libraries load")


# ---- what is remembered ----------------------------------------------------------------------------------------------


def check_selftest(env: Environment) -> Iterator[Finding]:
    memories = env.memories
    if memories is not None and not memories:
        yield ok("self-test", "no GPU to run it on")
    for memory in memories or ():
        yield _remembered(memory)
        if memory.result and memory.same_libraries and memory.result.arithmetic:
            yield arithmetic_finding(memory.result.arithmetic, explained=memory.result.explained)


def arithmetic_finding(line: str, *, explained: bool) -> Finding:
    """Sums by another rule than the published one block nothing. By a known rule they are worth a note, else a warning.

    Args:
        line: the self-test's, to be pasted into an issue.
        explained: a rule of the family gives all of them.
    """
    step = "nothing is blocked and every tile gives the same bits; please open an issue with this line"
    return (ok if explained else warning)("arithmetic", line, step)


def _remembered(memory: Remembered) -> Finding:
    result = memory.result
    if result is None:
        return ok("self-test", f"has not been run on {memory.device}", SELFTEST)
    when = f"on {memory.device} on {result.date}, with driver {result.driver} and torch {result.torch}"
    if not memory.same_libraries:
        return ok("self-test", f"was last run {when}, of other libraries than these", SELFTEST)
    text = f"{result.passed} of {result.tiles} tiles passed {when}"
    if result.passed < result.tiles:
        return warning("self-test", text, f"calls use the tiles that passed; {SELFTEST} again, and {_ISSUE}")
    return ok("self-test", text)


def check_blocklist(env: Environment) -> Iterator[Finding]:
    if not env.cache_dir:
        step = f"set {CACHE_DIR_VARIABLE} to a folder that can be written"
        yield warning("blocklist", "no place for one: this user has no home", step)
        return
    if env.memories is not None and not env.memories:
        yield ok("blocklist", f"no GPU to have one; lists are in {env.cache_dir}")
    for memory in env.memories or ():
        if memory.blocklist_fault:
            yield warning("blocklist", memory.blocklist_fault, REMEDY)
            continue
        for tile, reason in memory.blocked.items():
            text = f"{tile} failed the self-test on {memory.device}: {reason} ({memory.path})"
            yield warning("blocklist", text, f"{SELFTEST} and writes the list anew")
        if not memory.blocked:
            yield ok("blocklist", f"no tile is blocked on {memory.device} ({memory.path} would say so)")


def check_tuned(env: Environment) -> Iterator[Finding]:
    tables = env.tuned
    if tables is None:
        return
    by_rule = "tiles are chosen by the rows per expert"
    for table in tables:
        if table.fault:
            yield warning("tuned tables", f"{table.name} cannot be read ({table.fault}) and is ignored", REINSTALL)
    names = {table.device: table.name for table in tables if not table.fault}
    devices = list(dict.fromkeys(gpu.name for gpu in env.driver.gpus)) if env.driver else []
    for device in devices:
        if device in names:
            yield ok("tuned tables", f"{names[device]} is for {device}")
        else:
            yield ok("tuned tables", f"none for {device}: {by_rule}")
    if not devices:
        listed = ", ".join(names.values()) or f"none in this wheel: {by_rule}"
        yield ok("tuned tables", listed)


# By the part of the environment that they are about, which is also their findings' subject.
CHECKS: tuple[tuple[str, Check], ...] = (
    ("Python", check_python),
    ("glibc", check_glibc),
    ("driver", check_driver),
    ("GPU", check_gpus),
    ("wheel", check_wheel),
    ("libraries", check_libraries),
    ("hashes", check_hashes),
    ("torch", check_torch),
    ("CUDA runtime", check_cudart),
    ("loading", check_loading),
    ("self-test", check_selftest),
    ("blocklist", check_blocklist),
    ("tuned tables", check_tuned),
)
