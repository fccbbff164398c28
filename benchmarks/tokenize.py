"""Time tokenization on any machine: `python -m benchmarks.tokenize [FILE ...]`.

"ours" is the whole way from files to token files: reading, hashing, splitting, encoding, writing. "tiktoken" is its
`encode_ordinary_batch` alone, with one thread per core, on the same documents in memory. Both run in processes of their
own, in turn, so that other work on the machine affects both. Reports medians, and medians of the paired ratios, by the
clock and by the time of all cores, which other work disturbs less. Peak memory is that of the whole process. Without a
FILE the text is the interpreter's own library, repeated. The tokenizer is gpt2 if tiktoken has cached it, else a BPE of
32,768 tokens trained on the text.
"""

import argparse
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks import positive
from gpt.data.build_tokenizer import build_tokenizer, encoding_at_hand
from gpt.data.config import DataConfig, TokenizerConfig
from gpt.data.corpus import prepare
from gpt.data.inspect import bytes_per_token
from gpt.data.sources import STDLIB, find_sources
from gpt.data.split import read_documents
from gpt.data.tokenize_corpus import cores
from gpt.data.tokenizers import Tokenizer, load_tokenizer
from gpt.errors import UserError, run_command

OURS, TIKTOKEN = "ours", "tiktoken"
SAMPLE = 2_000_000  # characters whose bytes per token are reported


def texts_of(corpus: list[str], cache: Path) -> list[str]:
    """Read the text of every document."""
    sources = find_sources(DataConfig(tuple(corpus), cache), cache / "downloads")
    return ["".join(document.chunks) for document in read_documents(sources, "replace")]


def write_text(path: Path, size: int, per_document: int) -> None:
    """Write about `size` bytes of the interpreter's library as JSON lines of about per_document characters each."""
    library = "".join(texts_of([STDLIB], path.parent))
    with open(path, "w", encoding="utf-8") as file:
        number = 0
        while file.tell() < size:
            for start in range(0, len(library), per_document):
                text = f"# {number}\n" + library[start : start + per_document]  # no document twice
                file.write(json.dumps({"text": text}, ensure_ascii=False) + "\n")
                number += 1


def run(which: str, corpus: list[str], tokenizer: Tokenizer, cache: Path) -> dict[str, float]:
    """Run one contender in this process: seconds, seconds of all cores, bytes of text, tokens, peak MiB."""
    texts = texts_of(corpus, cache) if which == TIKTOKEN else []
    start, cpu = time.perf_counter(), time.process_time()
    if which == OURS:
        made = prepare(DataConfig(tuple(corpus), cache), TokenizerConfig(), fixed_tokenizer=tokenizer)
    else:
        ids = tokenizer.encoding.encode_ordinary_batch(texts, num_threads=cores())
    spent = {"seconds": time.perf_counter() - start, "cpu": time.process_time() - cpu, "mib": peak_mib()}
    if which == OURS:
        return spent | {
            "bytes": made.train_bytes + made.val_bytes,
            "tokens": made.train_tokens + made.val_tokens,
        }
    return spent | {"bytes": sum(len(text.encode()) for text in texts), "tokens": sum(map(len, ids))}


def peak_mib() -> float:
    """Read this process's peak memory. (On Linux getrusage would give its parent's, if that is higher.)"""
    try:
        (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) / 1024
    except (OSError, ValueError):
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1 << 20 if sys.platform == "darwin" else 1 << 10)


def measure(corpus: list[str], tokenizer: Tokenizer, rounds: int) -> dict[str, list[dict[str, float]]]:
    """Run both in their own processes, in turn; the contender that starts a round alternates too."""
    found: dict[str, list[dict[str, float]]] = {OURS: [], TIKTOKEN: []}
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save(Path(folder, "tokenizer.json"))
        for i in range(rounds):
            for which in (OURS, TIKTOKEN) if i % 2 == 0 else (TIKTOKEN, OURS):
                with tempfile.TemporaryDirectory(dir=folder) as cache:
                    words = [sys.executable, "-m", "benchmarks.tokenize", "--child", which, "--cache-dir", cache]
                    words += ["--tokenizer-file", str(Path(folder, "tokenizer.json")), *corpus]
                    found[which].append(json.loads(subprocess.run(words, check=True, stdout=subprocess.PIPE).stdout))
    return found


def report(found: dict[str, list[dict[str, float]]]) -> str:
    """Format the medians of both, and of the paired ratios."""
    lines = []
    for which, runs in found.items():
        rate, cpu = (statistics.median(r["bytes"] / r[unit] for r in runs) / 1e6 for unit in ("seconds", "cpu"))
        peak = max(r["mib"] for r in runs)
        lines.append(f"{which:9} {rate:7.2f} MB/s   {cpu:7.2f} MB per second of a core   {peak:6.0f} MiB at most")
    for unit, name in (("seconds", "speed"), ("cpu", "the same by the time of all cores")):
        ratios = [b[unit] / a[unit] for a, b in zip(found[OURS], found[TIKTOKEN])]
        spread = f"{min(ratios):.2f} to {max(ratios):.2f}, {len(ratios)} pairs"
        lines.append(f"ours / tiktoken, {name}: {statistics.median(ratios):.2f} ({spread})")
    return "\n".join(lines)


def pick(name: str | None, text: str, vocab_size: int) -> Tokenizer:
    """Build the named tokenizer; without a name, gpt2 if it is cached, else a BPE."""
    at_hand = encoding_at_hand("gpt2") if name is None else None
    if at_hand is not None:
        return at_hand
    config = TokenizerConfig(name or "bpe", vocab_size)
    start = time.perf_counter()
    tokenizer = build_tokenizer(config, lambda: [text])
    if config.tokenizer == "bpe":
        print(f"a BPE of {vocab_size:,} tokens trained on {len(text):,} characters", end=" ")
        print(f"in {time.perf_counter() - start:.1f} s")
    if tokenizer.encoding is None:
        raise UserError(
            f"tiktoken has no {name} tokenizer to compare with: give --tokenizer bpe or one of tiktoken's names"
        )
    return tokenizer


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="benchmarks.tokenize", description=__doc__.splitlines()[0])
    parser.add_argument(
        "corpus", nargs="*", help="text, as for train.py's --corpus; by default the interpreter's library"
    )
    parser.add_argument("--megabytes", type=positive, help="size of the library's text, repeated as needed (24)")
    parser.add_argument("--document", type=positive, help="characters of each of its documents (4000)")
    parser.add_argument("--tokenizer", help="bpe or one of tiktoken's; by default gpt2 if it is cached, else bpe")
    parser.add_argument("--vocab-size", type=positive, help="vocabulary of the trained BPE (32768)")
    parser.add_argument("--rounds", type=positive, default=9)
    parser.add_argument("--child", choices=(OURS, TIKTOKEN), help=argparse.SUPPRESS)
    parser.add_argument("--cache-dir", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--tokenizer-file", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.child:
        print(json.dumps(run(args.child, args.corpus, load_tokenizer(args.tokenizer_file), args.cache_dir)))
        return 0
    if args.corpus and (args.megabytes or args.document):
        parser.error("--megabytes and --document describe the library's text: leave them out when a corpus is given")
    if args.vocab_size and args.tokenizer != "bpe":
        parser.error("--vocab-size needs a trained BPE: add --tokenizer bpe")
    with tempfile.TemporaryDirectory() as folder:
        corpus = args.corpus
        if not corpus:
            corpus = [str(Path(folder, "library.jsonl"))]
            write_text(Path(corpus[0]), (args.megabytes or 24) * 1_000_000, args.document or 4000)
        text = "".join(texts_of(corpus, Path(folder)))
        tokenizer = pick(args.tokenizer, text, args.vocab_size or 32_768)
        sample = text[:SAMPLE]
        del text
        found = measure(corpus, tokenizer, args.rounds)
        first = found[OURS][0]
        print(f"{first['bytes'] / 1e6:.1f} MB of text, {first['tokens']:,.0f} tokens, {cores()} cores")
        print(report(found))
        print(bytes_per_token(sample, tokenizer))
    return 0


if __name__ == "__main__":
    run_command(lambda: main(sys.argv[1:]))
