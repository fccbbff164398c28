"""Every command as a function of its words, for tests that call several."""

import gpt.evaluate
import gpt.export
import gpt.inspect_corpus
import sample
import train
from gpt.command_line import load_config, parse_flags

MAINS = {
    "train": lambda words: train.main(load_config(words)),
    "sample": lambda words: sample.main(parse_flags(sample.Arguments, words, prog="sample.py")),
    "evaluate": lambda words: gpt.evaluate.main(parse_flags(gpt.evaluate.Arguments, words, prog="gpt.evaluate")),
    "export": lambda words: gpt.export.main(parse_flags(gpt.export.Arguments, words, prog="gpt.export")),
    "inspect": gpt.inspect_corpus.main,
}
