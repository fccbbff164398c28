"""Models for EleutherAI's lm-evaluation-harness, which is imported only on use.

model = gpt.evaluation.lm_eval.harness_model(*gpt.load("runs/x"))
lm_eval.simple_evaluate(model=model, tasks=["hellaswag", "lambada_openai"])
"""

from typing import Any

import torch

from gpt.arguments import checked, shown
from gpt.data.tokenizers import Tokenizer
from gpt.errors import UserError, require
from gpt.evaluation.scoring import Row, continuation, score, windows
from gpt.inference.decoder import Decoder
from gpt.inference.sampling import SamplingConfig, pick, uniforms
from gpt.inference.text_stream import TextStream
from gpt.model import GPT


@checked
def harness_model(model: GPT, tokenizer: Tokenizer, *, batch_size: int = 8) -> Any:
    """Wrap a model in eval mode as an lm_eval.api.model.LM. Raises UserError if lm_eval is not installed.

    Long contexts lose their start. As in the harness's own models, rolling likelihoods use consecutive windows of the
    model's context.
    """
    require(batch_size >= 1, f"batch_size must be at least 1, not {shown(batch_size)}")
    try:
        from lm_eval.api.model import LM
    except ImportError:
        raise UserError("lm-evaluation-harness is not installed: pip install lm-eval") from None

    tokenizer.check_table(model.config.vocab_size, "this model")

    class Harness(LM):
        def loglikelihood(self, requests: list[Any]) -> list[tuple[float, bool]]:
            rows = [_row(tokenizer, *request.args, model.config.seq_len) for request in requests]
            return [(float(found.sum()), greedy) for found, greedy in score(model, rows, batch_size)]

        def loglikelihood_rolling(self, requests: list[Any]) -> list[float]:
            return [_rolling(model, tokenizer, request.args[0], batch_size) for request in requests]

        def generate_until(self, requests: list[Any]) -> list[str]:
            return [_generate(model, tokenizer, *request.args) for request in requests]

    return Harness()


def _row(tokenizer: Tokenizer, context: str, text: str, seq_len: int) -> Row:
    """Make a row to score, moving spaces from the context's end to the text: tokens begin with spaces."""
    bare = context.rstrip()
    return continuation(tokenizer, bare, context[len(bare) :] + text, seq_len)[0]


def _rolling(model: GPT, tokenizer: Tokenizer, text: str, batch_size: int) -> float:
    """Compute the log-likelihood of a text."""
    tokens = [tokenizer.start_token, *tokenizer.encode(text)]
    rows = windows(tokens, model.config.seq_len, model.config.seq_len)
    return float(sum(found.sum() for found, _ in score(model, rows, batch_size)))


def _generate(model: GPT, tokenizer: Tokenizer, context: str, options: dict[str, Any]) -> str:
    """Continue a context. A long one loses its start, to leave half the model's context to new tokens if need be."""
    until, T = options.get("until") or [], model.config.seq_len
    until = [stop for stop in ([until] if isinstance(until, str) else until) if stop]
    start = [] if tokenizer.document_token is None else [tokenizer.document_token]
    prompt = start + tokenizer.encode(context) or [tokenizer.start_token]
    count = max(1, min(int(options.get("max_gen_toks") or 256), max(T - len(prompt), T // 2)))
    prompt = prompt[-max(1, T - count) :]
    names = ("temperature", "top_k", "top_p", "min_p") if options.get("do_sample") else ()
    given = options | {"top_k": options.get("top_k") or None}  # 0 means no top-k, as in transformers
    drawn = {"temperature": 0.0} | {name: given[name] for name in names if given.get(name) is not None}
    sampling = SamplingConfig(max_new_tokens=count, **drawn)
    device, stream, text = model.embed.weight.device, TextStream(tokenizer, until), ""
    decoder = Decoder(model, 1, len(prompt) + count)
    logits, seed, token = decoder.prefill(0, prompt), torch.tensor([sampling.seed]), None
    for position in range(len(prompt), len(prompt) + count):
        if token is not None:
            logits = decoder.step(torch.tensor([[token]], device=device))[0, -1]
        uniform = uniforms(seed, torch.tensor([position]))
        token = int(pick(logits[None, : tokenizer.vocab_size].cpu(), uniform, sampling))
        if token == tokenizer.document_token:
            break
        text += stream.push(token)
        if stream.ended:
            break
    return text + stream.flush()
