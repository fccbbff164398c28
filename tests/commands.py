"""Every command as a function of its arguments, for tests that run several."""

import gpt.data.inspect
import gpt.evaluation.command
import gpt.interop.export
import sample
import train
from gpt.command_line import parse_flags
from gpt.training.command import load_config

MAINS = {
    "train": lambda words: train.main(load_config(words)),
    "sample": lambda words: sample.main(parse_flags(sample.Arguments, words, prog="sample.py")),
    "evaluate": lambda words: gpt.evaluation.command.main(
        parse_flags(gpt.evaluation.command.Arguments, words, prog="gpt.evaluate")
    ),
    "export": lambda words: gpt.interop.export.main(
        parse_flags(gpt.interop.export.Arguments, words, prog="gpt.export")
    ),
    "inspect": gpt.data.inspect.main,
}
