"""Train on mutated configs, command lines, token files, checkpoints, tokenizers and corpora.

python -m tests.fuzz_inputs --cases 500 [--seed 0]

Every training must end in time: with status 0 (or 3, if a mutated rate diverges), or with one sentence on stderr and
status 2. It must not print a traceback or change a file of the user. A process that has imported everything forks one
child per case. Case i of seed s is case 0 of seed s + i, so that one line repeats a failure.
"""

import argparse
import contextlib
import gzip
import hashlib
import json
import os
import random
import resource
import shutil
import signal
import string
import struct
import sys
import tempfile
import traceback
from collections import Counter
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"  # forking is safe only before torch starts threads

import matplotlib.pyplot  # noqa: F401 - a training imports it late; import it before forking
import pyarrow.parquet
import rich.progress  # noqa: F401
import tokenizers  # noqa: F401
import tomli_w
import zstandard

import train
from gpt.config_file import TABLES
from gpt.errors import run_command
from gpt.run import load
from gpt.training.command import load_config
from tests.run_checks import FLAGS, TEXT, make_run, reseal

CPU_SECONDS = 20  # limit for a case, which normally takes less than one
WALL_SECONDS = 240
MEMORY = 3 << 30  # bytes that a case may allocate

ODD_NUMBERS = [0, -1, 1, 2**31, 2**63, 10**30, -(10**30), 0.0, -0.5, 1e300, 1e-300, float("nan"), float("inf")]
ODD_TEXTS = [
    "",
    " ",
    "none",
    "None",
    "true",
    "é",
    "\u2028",
    "a\nb",
    "\x00",
    "x" * 5000,
    "~nobody/x",
    "**",
    "[",
    "..",
    "-",
]
ODD = [*ODD_NUMBERS, *ODD_TEXTS, True, [], [1], ["a", 2], {}, {"a": 1}]
# Not mutated: options that use the network, compile for a minute, or write outside the case's folder.
LEFT_ALONE = {"wandb", "wandb_project", "compile", "max_steps", "device", "cache_dir", "run_dir", "resume_from"}
KEYS = {t: [f.name for f in fields(kind) if f.name not in LEFT_ALONE] for t, kind in TABLES.items()}
BASE = {
    "data": {"corpus": ["text.txt"]},
    "tokenizer": {"tokenizer": "char"},
    "model": {"n_layer": 1, "n_head": 2, "n_embd": 16, "seq_len": 16},
    "optim": {"learning_rate": 1e-3, "warmup_steps": 1},
    "train": {"batch_size": 4, "dtype": "float32", "eval_interval": 100},
    "log": {"sample_tokens": 0},
}
WHERE = "--max-steps 1 --device cpu --run-dir new --cache-dir cache"
PLACE = WHERE.split()
BPE = "--run-dir bpe --tokenizer bpe --bpe-vocab-size 280 --max-steps 4"
Command = Callable[[], int]


def training(words: list[str]) -> Command:
    return lambda: train.main(load_config(words))


def scrambled(draw: random.Random, data: bytes) -> bytes:
    """Change a few bytes of the data, cut or double it, or insert noise."""
    data, at = bytearray(data), draw.randrange(len(data) + 1)
    match draw.randrange(5):
        case 0:
            for _ in range(draw.choice((1, 1, 10))):
                data[draw.randrange(len(data))] = draw.randrange(256)
        case 1:
            del data[at:]
        case 2:
            data[at:at] = draw.randbytes(draw.choice((1, 8, 100)))
        case 3:
            del data[at : at + draw.choice((1, 8, 100))]
        case 4:
            data += bytes(data)
    return bytes(data)


def odd_inside(draw: random.Random, value: object) -> object:
    """Replace one part of a JSON value by something odd."""
    if isinstance(value, (dict, list)) and value and draw.random() < 0.8:
        key = draw.choice([*value] if isinstance(value, dict) else range(len(value)))
        value = value.copy()
        if draw.random() < 0.15:
            del value[key]
        else:
            value[key] = odd_inside(draw, value[key])
        return value
    return draw.choice(ODD)


def toml(draw: random.Random) -> Command:
    tables = {table: dict(values) for table, values in BASE.items()}
    for _ in range(draw.choice((1, 1, 3))):
        table = draw.choice([*KEYS])
        key = draw.choice([*KEYS[table], "n_layers"])
        usual = getattr(TABLES[table](), key, None)
        alike = [value for value in ODD if type(value) is type(usual)]
        tables[table][key] = draw.choice(alike if alike and draw.random() < 0.6 else ODD)
    text = tomli_w.dumps(tables).encode()
    Path("fuzz.toml").write_bytes(scrambled(draw, text) if draw.random() < 0.3 else text)
    return training(["fuzz.toml", *PLACE])


def command_line(draw: random.Random) -> Command:
    words = [*FLAGS, *PLACE]
    for _ in range(draw.choice((1, 1, 3))):
        flag = "--" + draw.choice([key for keys in KEYS.values() for key in keys]).replace("_", "-")
        value = draw.choice([str(value).replace("\0", "") for value in ODD] + ["\udcff", "1_000", "0x10", "9" * 5000])
        at = draw.randrange(len(words) + 1)
        match draw.randrange(4):
            case 0:
                words += [flag, value]
            case 1:
                words[at:at] = [
                    draw.choice((flag, value, flag + "=" + value, "".join(draw.choices(string.printable, k=5))))
                ]
            case 2:
                del words[at : at + 1]
            case 3:
                words += [flag]
    # The last flags win: the case stays short and in its folder.
    return training([*words, *PLACE])


def token_file(draw: random.Random) -> Command:
    path = draw.choice(sorted(Path("cache").rglob("corpora/*/*")))
    data = path.read_bytes()
    if path.suffix == ".tokens" and draw.random() < 0.5:
        at = draw.choice((0, 8, 12, 16, 23, 24, 60))
        data = data[:at] + draw.choice((b"\xff" * 8, bytes(8), draw.randbytes(8))) + data[at + 8 :]
    else:
        data = scrambled(draw, data)
    path.write_bytes(data)
    return training([*FLAGS, "--resume", "--max-steps", "5"])


def run_file(draw: random.Random) -> Command:
    path = draw.choice([path for path in sorted(Path("run").rglob("*")) if path.is_file()])
    changed_file(draw, path)
    if "checkpoints" in path.parts and draw.random() < 0.7:
        with contextlib.suppress(Exception):
            reseal(path.parent)
    return used(draw)


def tokenizer(draw: random.Random) -> Command:
    if draw.random() < 0.7:
        shutil.rmtree("run")
        shutil.copytree("bpe", "run")
    changed_file(draw, Path("run/tokenizer.json"))
    return used(draw)


def changed_file(draw: random.Random, path: Path) -> None:
    data = path.read_bytes()
    if path.suffix == ".json" and draw.random() < 0.7:
        path.write_text(json.dumps(odd_inside(draw, json.loads(data))))
    else:
        path.write_bytes(scrambled(draw, data))


def used(draw: random.Random) -> Command:
    """Return a resume, an evaluation, or the loading that sample.py does."""
    return draw.choice(
        [
            training([*FLAGS, "--resume", "--max-steps", "5"]),
            training(["--run-dir", "run", "--cache-dir", "cache", "--device", "cpu", "--eval-only"]),
            lambda: load("run", "cpu")[1].encode("and a ") and None,
        ]
    )


def corpus(draw: random.Random) -> Command:
    texts = [TEXT, "é日本🙂", "\r\n\r", "<|endoftext|>", "a" * 200_000, " " * 200_000, "e\u0301" * 100, "\n" * 1000, ""]
    pieces = [
        *map(str.encode, texts),
        "Straße".encode("latin-1"),
        "Ω text".encode("utf-16"),
        b"\xef\xbb\xbf",
        b"\xff\xfe",
    ]
    pieces += [b"\0" * 50, b"\xed\xa0\x80", draw.randbytes(300)]
    places = ["text2.txt"] if draw.random() < 0.6 else [f"texts/{i}.txt" for i in range(3)]
    for place in places:
        Path(place).parent.mkdir(exist_ok=True)
        Path(place).write_bytes(b"".join(draw.choices(pieces, k=draw.randrange(1, 5))))
    kind, errors = draw.choice(("char", "byte", "bpe")), draw.choice(("strict", "replace"))
    options = ["--corpus", places[0].split("/")[0], "--tokenizer", kind, "--encoding-errors", errors]
    options += ["--bpe-vocab-size", "300"] if kind == "bpe" else []
    return training([*FLAGS, *PLACE, *options, "--eval-tokens", "100"])


def packed_corpus(draw: random.Random) -> Command:
    """Write JSON lines, Parquet, compressed files or other programs' tokens, whole or scrambled."""
    rows = [{"text": TEXT[i : i + 300], "id": i} for i in range(0, len(TEXT), 300)]
    lines = [json.dumps(odd_inside(draw, row) if draw.random() < 0.05 else row).encode() for row in rows]
    content, name = b"\n".join(lines), draw.choice(("x.jsonl", "x.jsonl.gz", "x.txt.zst", "x.parquet", "x.bin"))
    kind = draw.choice(("char", "byte", "bpe"))
    if name.endswith(".gz"):
        content = gzip.compress(content)
    elif name.endswith(".zst"):
        content = zstandard.compress(content)
    elif name.endswith(".parquet"):
        column = pyarrow.array([row["text"] for row in rows])
        pyarrow.parquet.write_table(pyarrow.table({"text": column}), name, row_group_size=4)
        content = Path(name).read_bytes()
    elif name.endswith(".bin"):
        kind, header = "byte", struct.pack("<iii", 20240520, 1, len(TEXT)).ljust(1024, b"\0")
        content = draw.choice((b"", header)) + b"".join(struct.pack("<H", ord(c)) for c in TEXT)
    Path(name).write_bytes(scrambled(draw, content) if draw.random() < 0.8 else content)
    errors = draw.choice(("strict", "replace"))
    options = ["--corpus", name, "--tokenizer", kind, "--encoding-errors", errors]
    options += ["--bpe-vocab-size", "300"] if kind == "bpe" else []
    return training([*FLAGS, *PLACE, *options, "--eval-tokens", "100"])


KINDS = [toml, command_line, token_file, run_file, tokenizer, corpus, packed_corpus]


def hashes(folder: Path) -> dict[str, str]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def case(base: Path, seed: int) -> tuple[str, int, str, str]:
    """Run one case in its own folder; return its kind, status, fault ("" if none) and last line on stderr."""
    draw = random.Random(f"inputs:{seed}")
    kind = draw.choice(KINDS)
    with tempfile.TemporaryDirectory() as name, contextlib.chdir(name):
        folder = Path(name)
        shutil.copytree(base, folder, dirs_exist_ok=True)
        command = kind(draw)
        before = hashes(folder)
        sys.stdout.flush()
        pid = os.fork()
        if not pid:
            _child(command)
        status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        after, errors = hashes(folder), Path("stderr").read_text(errors="replace")
    lines = errors.splitlines()
    last = lines[-1] if lines else ""
    if status not in (0, 2, 3) or "Traceback" in errors:
        slow = status in (-signal.SIGXCPU, -signal.SIGALRM)
        wrong = "takes too long" if slow else f"status {status}: {last[:300]}"
    elif status == 2 and not (len(last) > 20 and [line for line in lines if line.startswith("error: ")] == [last]):
        wrong = f"no sentence: {errors[:300]!r}"
    else:
        # A run may change its files unless it was refused; no other file may change.
        mine = ("new/", "cache/", "stdout", "stderr", "run/.lock", *(("run/",) if status != 2 else ()))
        changed = [path for path in before if before[path] != after.get(path) and not path.startswith(mine)]
        wrong = f"status {status}, and {changed} changed" if changed else ""
    return kind.__name__, status, wrong, last


def _child(command: Command) -> None:
    """Run a command under the limits, in a forked child, and exit."""
    status = 1
    try:
        for number, place in ((1, "stdout"), (2, "stderr")):
            os.dup2(os.open(place, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        signal.alarm(WALL_SECONDS)
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        resource.setrlimit(resource.RLIMIT_CPU, (CPU_SECONDS, CPU_SECONDS + 5))
        size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize() + MEMORY
        resource.setrlimit(resource.RLIMIT_AS, (size, size))
        run_command(command)
    except SystemExit as stop:
        status = stop.code
    except BaseException:
        traceback.print_exc()
    finally:
        with contextlib.suppress(Exception):
            sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def make_base(folder: Path) -> None:
    """Make a text, its cache, a character run and a BPE run, in a child so that this process stays unchanged."""
    pid = os.fork()
    if not pid:
        status = 1
        try:
            with contextlib.chdir(folder), open(os.devnull, "w") as null, contextlib.redirect_stdout(null):
                make_run(folder)
                train.main(
                    load_config(
                        [
                            *FLAGS,
                            *["--run-dir", "bpe", "--tokenizer", "bpe", "--bpe-vocab-size", "280", "--max-steps", "4"],
                        ]
                    )
                )
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(status)
    assert os.waitpid(pid, 0)[1] == 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", type=int, default=500)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--verbose", action="store_true", help="print each case's status and last line")
    arguments = parser.parse_args()
    counts: Counter[tuple[str, int]] = Counter()
    failed = 0
    with tempfile.TemporaryDirectory() as base:
        make_base(Path(base))
        for seed in range(arguments.seed, arguments.seed + arguments.cases):
            kind, status, wrong, last = case(Path(base), seed)
            if arguments.verbose:
                print(seed, kind, status, last)
            counts[kind, status] += 1
            if wrong:
                failed += 1
                print(f"python -m tests.fuzz_inputs --cases 1 --seed {seed}  # {kind}: {wrong}", flush=True)
    print(", ".join(f"{kind} {status}: {count}" for (kind, status), count in sorted(counts.items())))
    print(f"{arguments.cases - failed} of {arguments.cases} cases passed")
    sys.exit(failed > 0)


if __name__ == "__main__":
    main()
