"""SGLang on GPUs with our kernels and CUDA graphs, beside its own: a program, for a machine without pytest.

    python tests/engines/sglang_gpu.py [--cases ours,own,http,tp,ep] [--out FILE.json] [--model FOLDER]
                                       [--activations mxfp8] [--keywords JSON] [--seconds 300] [--logs FOLDER]

Each case is a server in processes of its own: `ours` on one GPU, `own` with SGLang's kernels, `http` by
`sglang.launch_server`, `tp` and `ep` over two GPUs. Checked is that our layer ran in every rank, that the first layer
has the bits of `fused_moe`, and that the prompts' tokens are as likely as with `ours`, within what differs. The tokens
that were decoded are read again as a prompt: how far their log-probabilities then move is compared with SGLang's own
kernels. Exit status 1 where one of these does not hold.

--out keeps what the cases said, tokens/s too; a case in there that is not named again is compared with as it is, so
that the cases can be run one call after the other.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "helpers"))

import torch
from printed_checks import Checks

CASES = ("ours", "own", "http", "tp", "ep")
PROMPTS = [[(7 * i + 3 * j) % 500 + 3 for i in range(n)] for j, n in enumerate((5, 17, 40, 130, 300))]
TOKENS, TIMED, BATCHES = 32, 256, (1, 16)
COMMON: dict[str, Any] = {
    "skip_tokenizer_init": True,
    "attention_backend": "triton",
    "sampling_backend": "pytorch",
    "grammar_backend": "none",
    "mem_fraction_static": 0.3,
    "context_length": 1024,
    "max_running_requests": max(BATCHES),
    "cuda_graph_max_bs_decode": max(BATCHES),
    "cuda_graph_max_bs_prefill": 512,
    "random_seed": 0,
    "log_level": "info",  # of an engine it is "error" otherwise
}
# Ranks add up by NCCL: the other ways want FlashInfer or multicast, and what is summed is the same.
TWO = {"tp_size": 2, "disable_custom_all_reduce": True, "enforce_disable_flashinfer_allreduce_fusion": True}
KEYWORDS: dict[str, dict[str, Any]] = {"tp": TWO, "ep": {**TWO, "ep_size": 2}}
# Mean |d log p| of a prompt's token, in a random model, which amplifies: as vllm_gpu.py has them.
SAME_MEAN, OWN_MEAN = 0.25, 0.5
# How far decoded tokens may be from the same tokens as a prompt: this many times SGLang's own kernels, and a bit.
AGAIN_TIMES, AGAIN_MORE = 2.0, 0.1

Generate = Callable[..., list[dict[str, Any]]]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", default="ours,own,http", help=f"of {','.join(CASES)}, with commas")
    parser.add_argument("--out", type=Path, help="JSON of all answers; what is in there already can be compared with")
    parser.add_argument("--model", type=Path, help="a gpt-oss in MXFP4; without one, two layers of gpt-oss-20b's size")
    parser.add_argument("--activations", default="engine", help="MXFP4_MOE_ACTIVATIONS: engine, bf16 or mxfp8")
    parser.add_argument("--keywords", default="{}", help="JSON for SGLang's arguments, such as an attention backend")
    parser.add_argument("--seconds", type=float, default=300, help="time limit of a case")
    parser.add_argument("--logs", type=Path, help="a folder that keeps each case's log")
    parser.add_argument("--engine", nargs=2, metavar=("MODEL", "OUT"), help=argparse.SUPPRESS)  # a case's own process
    arguments = parser.parse_args()
    if arguments.engine:
        run_engine(arguments.engine[0], arguments.engine[1], json.loads(arguments.keywords))
        return 0
    cases = arguments.cases.split(",")
    if unknown := set(cases) - set(CASES):
        parser.error(f"--cases: expected some of {','.join(CASES)}, got {','.join(sorted(unknown))}")
    data: dict[str, Any] = {}
    if arguments.out and arguments.out.exists():
        data = json.loads(arguments.out.read_text(encoding="utf-8"))
    if "ours" not in data:
        cases.append("ours")
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        logs = arguments.logs or work
        logs.mkdir(parents=True, exist_ok=True)
        model = arguments.model or random_model(work / "model")
        checks = Checks()
        for case in (name for name in CASES if name in cases):
            keywords = {**COMMON, **KEYWORDS.get(case, {}), **json.loads(arguments.keywords)}
            running = Case(case, model, keywords, logs / f"{case}.log", arguments.seconds)
            started = time.monotonic()
            answers = running.run(settings(case, arguments.activations), work / f"{case}.json")
            seconds = time.monotonic() - started
            checks(case, f"{'answered' if answers else 'did not answer'}, {seconds:.0f} s", answers is not None)
            said = running.said()
            for line in dict.fromkeys(ours_of(said)):
                print(f"       {line}")
            if answers is None:
                print(*said.splitlines()[-40:], sep="\n", flush=True)
                data.pop(case, None)
                continue
            data[case] = answers
            check_log(checks, case, said)
            check_answers(checks, case, answers)
            compare(checks, case, data)
            if arguments.out:
                arguments.out.write_text(json.dumps(data), encoding="utf-8")
        compare_again(checks, data)
        for case, answers in data.items():
            print(f"       {case}:", ", ".join(f"{rate:.0f} tokens/s at {n}" for n, rate in answers["rates"].items()))
    return checks.status


def settings(case: str, activations: str) -> dict[str, str]:
    """What a case says to us."""
    if case == "own":
        return {"MXFP4_MOE_ENGINES": "off"}
    return {"MXFP4_MOE_ACTIVATIONS": activations, "MXFP4_MOE_VERIFY": "1"}


def random_model(folder: Path) -> Path:
    from mxfp4_moe.bench.engine.random_model import Sizes, write_gpt_oss

    return write_gpt_oss(folder, Sizes(layers=2))


def ours_of(said: str) -> list[str]:
    return [line[line.index("mxfp4-moe") :] for line in said.splitlines() if "mxfp4-moe" in line]


def check_log(checks: Checks, case: str, said: str) -> None:
    """Who computed the experts, by what each rank wrote."""
    if case == "own":
        checks(case, "our backend was not chosen", "mxfp4-moe runs this model's experts" not in said)
        checks(case, "SGLang chose its triton_kernels", "enabling triton_kernels MOE kernel" in said)
    else:
        checks(case, "our backend was chosen", "mxfp4-moe runs this model's experts" in said)
        ranks, verdict = KEYWORDS.get(case, {}).get("tp_size", 1), "cannot verify" if case == "ep" else "verified"
        lines = sum(f"mxfp4-moe {verdict} " in line for line in said.splitlines())
        checks(case, f"{lines} of {ranks} ranks have our layer, and say: {verdict}", lines == ranks)
    checks(case, "decoding was captured as CUDA graphs", "Capture target decode CUDA graph" in said)


def check_answers(checks: Checks, case: str, answers: dict[str, Any]) -> None:
    lengths = [len(text["tokens"]) for text in answers["texts"]]
    checks(case, f"{len(lengths)} prompts were answered", lengths == [TOKENS] * len(PROMPTS))
    values = flat(answers["given"])
    checks(case, "log-probabilities are numbers", bool(values.isfinite().all()) and float(values.max()) <= 0)


def compare(checks: Checks, case: str, data: dict[str, Any]) -> None:
    """A case with `ours`: the prompts' tokens, the same for all; and over HTTP also what was decoded."""
    if case == "ours" or "ours" not in data:
        return
    given, ours = flat(data[case]["given"]), flat(data["ours"]["given"])
    name = "SGLang's own kernels against ours" if case == "own" else "the engine with ours on one GPU"
    checks.mean(case, f"prompts, {name}", given, ours, OWN_MEAN if case == "own" else SAME_MEAN)
    pairs = zip(data[case]["texts"], data["ours"]["texts"], strict=True)
    same = sum(a == b for one, other in pairs for a, b in zip(one["tokens"], other["tokens"], strict=True))
    print(f"       {case}: {same} of {TOKENS * len(PROMPTS)} decoded tokens are those of ours")


def compare_again(checks: Checks, data: dict[str, Any]) -> None:
    """Decoded tokens read again as a prompt: attention sums in another order, and the model amplifies."""
    means = {}
    for case, answers in data.items():
        change = (flat(answers["decoded"]) - flat(answers["again"])).abs()
        means[case] = float(change.mean())
        print(f"       {case}: decoded tokens read as a prompt: mean {means[case]:.4f}, largest {change.max():.3f}")
    if "own" in means:
        limit = AGAIN_TIMES * means["own"] + AGAIN_MORE
        for case in (name for name in means if name != "own"):
            words = f"decoded and read differ by {means[case]:.4f} <= {limit:.4f}, from own's {means['own']:.4f}"
            checks(case, words, means[case] <= limit)


def flat(texts: list[list[float]]) -> torch.Tensor:
    return torch.tensor([value for text in texts for value in text], dtype=torch.float64)


class Case:
    """One start of SGLang in a process group of its own, which ends with it."""

    def __init__(self, name: str, model: Path, keywords: dict[str, Any], log: Path, seconds: float) -> None:
        self.name, self.model, self.keywords, self.log = name, model, keywords, log
        self.deadline = time.monotonic() + seconds

    def run(self, environment: dict[str, str], out: Path) -> dict[str, Any] | None:
        """The answers; None where there are none, and `said` tells why."""
        port = free_port()
        with self.log.open("w", encoding="utf-8") as log:
            kept = {name: value for name, value in os.environ.items() if not name.startswith("MXFP4_MOE_")}
            process = subprocess.Popen(
                self._server(port) if self.name == "http" else self._engine(out),
                env=kept | environment,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
            try:
                if self.name == "http":
                    return self._ask(process, f"http://127.0.0.1:{port}")
                ended = process.wait(max(1.0, self.deadline - time.monotonic()))
                return json.loads(out.read_text(encoding="utf-8")) if ended == 0 else None
            except (subprocess.TimeoutExpired, TimeoutError, OSError, ValueError, KeyError) as error:
                log.write(f"\n{self.name}: {type(error).__name__}: {error}\n")
                return None
            finally:
                end(process)

    def said(self) -> str:
        return self.log.read_text(encoding="utf-8", errors="replace")

    def _engine(self, out: Path) -> list[str]:
        here = [sys.executable, str(Path(__file__).resolve())]
        return [*here, "--engine", str(self.model), str(out), "--keywords", json.dumps(self.keywords)]

    def _server(self, port: int) -> list[str]:
        command = [sys.executable, "-m", "sglang.launch_server", "--model-path", str(self.model), "--port", str(port)]
        for name, value in self.keywords.items():
            if value is not False:
                command += [f"--{name.replace('_', '-')}", *([] if value is True else [str(value)])]
        return command

    def _ask(self, process: subprocess.Popen[bytes], address: str) -> dict[str, Any]:
        """The answers of a server that is starting.

        Raises:
            OSError: it ended, did not get ready in time, or answered with an error.
        """
        while True:
            if process.poll() is not None:
                raise OSError(f"the server ended with exit status {process.returncode}")
            if time.monotonic() > self.deadline:
                raise TimeoutError("the server did not get ready")
            with suppress(OSError), urllib.request.urlopen(f"{address}/health", timeout=5) as answer:
                if answer.status == 200:
                    break
            time.sleep(1)

        def generate(**given: Any) -> list[dict[str, Any]]:
            request = urllib.request.Request(
                f"{address}/generate", json.dumps(given).encode(), {"Content-Type": "application/json"}
            )
            with urllib.request.urlopen(request, timeout=max(1.0, self.deadline - time.monotonic())) as answer:
                answers: list[dict[str, Any]] = json.load(answer)
            return answers

        return ask(generate)


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port: int = found.getsockname()[1]
    return port


def end(process: subprocess.Popen[bytes], patience: float = 8) -> None:
    """Ends a process that leads its group and all of the group, so that their GPU memory is free for the next."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        until = time.monotonic() + patience
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, number)
            while time.monotonic() < until:
                process.poll()
                os.killpg(process.pid, 0)
                time.sleep(0.2)
    process.wait()


def run_engine(model: str, out: str, keywords: dict[str, Any]) -> None:
    """In a case's own process: SGLang's engine, which starts more."""
    import sglang

    engine = sglang.Engine(model_path=model, **keywords)
    answers = ask(engine.generate)
    Path(out).write_text(json.dumps(answers), encoding="utf-8")
    engine.shutdown()


def ask(generate: Generate) -> dict[str, Any]:
    """What a server decodes, how likely texts are to it, and its tokens/s.

    Args:
        generate: takes the fields of SGLang's /generate by name.
    """

    def sampling(tokens: int) -> dict[str, Any]:
        return {"temperature": 0, "max_new_tokens": tokens, "ignore_eos": True}

    def read(texts: list[list[int]]) -> list[list[float]]:
        """Log-probabilities of each text's tokens from the second on."""
        logs = {"return_logprob": True, "logprob_start_len": 0}
        answers = generate(input_ids=texts, sampling_params=sampling(1), **logs)
        found = [[entry[0] for entry in answer["meta_info"]["input_token_logprobs"][1:]] for answer in answers]
        for values, text in zip(found, texts, strict=True):
            if len(values) != len(text) - 1:
                raise ValueError(f"expected {len(text) - 1} log-probabilities of a prompt, got {len(values)}")
        return found

    answers = generate(input_ids=PROMPTS, sampling_params=sampling(TOKENS), return_logprob=True)
    chosen = [answer["meta_info"]["output_token_logprobs"] for answer in answers]
    texts = [{"prompt": p, "tokens": [entry[1] for entry in c]} for p, c in zip(PROMPTS, chosen, strict=True)]
    whole = read([prompt + text["tokens"] for prompt, text in zip(PROMPTS, texts, strict=True)])
    rates = {}
    for batch in BATCHES:
        prompts = [[(11 * i + 5 * j) % 900 + 3 for i in range(16)] for j in range(batch)]
        taken = {}
        for tokens in (1, TIMED + 1, 1, TIMED + 1):  # the first two warm up
            began = time.perf_counter()
            generate(input_ids=prompts, sampling_params=sampling(tokens))
            taken[tokens] = time.perf_counter() - began
        rates[str(batch)] = batch * TIMED / (taken[TIMED + 1] - taken[1])
    return {
        "texts": texts,
        "given": read(PROMPTS),
        "decoded": [[entry[0] for entry in c] for c in chosen],
        "again": [values[len(p) - 1 :] for values, p in zip(whole, PROMPTS, strict=True)],
        "rates": rates,
    }


if __name__ == "__main__":
    sys.exit(main())
