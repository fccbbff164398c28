"""A decoder's step as a CUDA graph, with a stand-in that replays operations on fixed addresses, as graphs do."""

import contextlib
import itertools

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from gpt.inference import decoder as decode
from gpt.inference import step_graph
from gpt.inference.decoder import Decoder
from gpt.inference.generation import generate
from gpt.inference.sampling import SamplingConfig
from tests.test_decode import OPTIONS, assert_near, model_of, text_of, uncached
from tests.test_generate import model_of as model_of_text
from tests.test_generate import tokenizer_of

FORBIDDEN = {
    torch.ops.aten._local_scalar_dense.default,  # a number read from the device
    torch.ops.aten.lift_fresh.default,  # a tensor made of numbers on the host
    torch.ops.aten.nonzero.default,  # a shape that depends on values
}


class Tape(TorchDispatchMode):
    """Records calls with their numbers and addresses, as a CUDA graph does."""

    def __init__(self):
        super().__init__()
        self.calls, self.replays = [], 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert func not in FORBIDDEN, f"{func} cannot be recorded on a GPU"
        result = func(*args, **(kwargs or {}))
        self.calls.append((func, args, kwargs or {}, result))
        return result

    def replay(self) -> None:
        self.replays += 1
        for func, args, kwargs, result in self.calls:
            again = func(*args, **kwargs)
            for old, new in zip(tree_leaves(result), tree_leaves(again)):
                if (
                    isinstance(old, torch.Tensor)
                    and old.untyped_storage().data_ptr() != new.untyped_storage().data_ptr()
                ):
                    old.copy_(new)


@pytest.fixture
def tapes(monkeypatch) -> list[Tape]:
    """Recorded graphs, oldest first."""
    found = []

    def record(run):
        with Tape() as tape:
            result = run()
        found.append(tape)
        result.fill_(float("nan"))  # what recording left there must not be used
        return tape.replay, result

    monkeypatch.setattr(step_graph, "record", record)
    monkeypatch.setattr(decode, "can_record", lambda device: True)
    monkeypatch.setattr(decode, "decode_impl", lambda device: "triton")
    return found


@pytest.mark.parametrize("name", ["modern", "window-pattern", "gelu-odd"])
def test_replayed_steps_equal_the_uncached_model(name, tapes):
    """Rows of different lengths, steps of two shapes in turn, a cut, a copy, and dropped rows."""
    model = model_of(**({"n_layer": 1} | OPTIONS[name]))
    decoder, texts = Decoder(model, 3, 48), [text_of(n, n) for n in (3, 1, 9)]
    for row, text in enumerate(texts):
        decoder.prefill(row, text)

    def step(T: int) -> None:
        new = torch.tensor([text_of(T, 7 * T + len(text)) for text in texts])
        logits = decoder.step(new)
        for row, tokens in enumerate(new.tolist()):
            texts[row] = texts[row] + tokens
            assert_near(logits[row], uncached(model, texts[row])[-T:])

    for T in (1, 1, 2, 1, 2, 1, 2):
        step(T)
    assert [tape.replays for tape in tapes] == [2, 1]  # of T = 1 from the third on, of T = 2 the third
    decoder.truncate(1, 4)
    decoder.restore(2, decoder.snapshot(1))
    texts[1:] = [texts[1][:4]] * 2
    step(1)
    assert [tape.replays for tape in tapes] == [3, 1]
    decoder.keep([2, 0])
    texts = [texts[2], texts[0]]
    for _ in range(3):
        step(1)
    decoder.keep([1, 0])
    texts = texts[::-1]
    step(1)
    assert [tape.replays for tape in tapes] == [3, 1, 1]


def test_a_sliding_window_needs_no_new_graph(tapes):
    model = model_of(n_layer=1, seq_len=1000, window=4)
    decoder, text = Decoder(model, 1, 1000), text_of(400, 1)
    decoder.prefill(0, text[:326])
    starts = set()
    for n in range(326, 340):
        logits = decoder.step(torch.tensor([[text[n]]]))[0]
        starts.add(decoder._caches[0].starts[0])
        assert_near(logits, uncached(model, text[: n + 1])[-1:])
    assert len(starts) > 1 and len(tapes) == 1


def test_returned_logits_are_not_overwritten(tapes):
    decoder = Decoder(model_of(n_layer=1), 1, 48)
    decoder.prefill(0, [1, 2, 3])
    kept = [decoder.step(torch.tensor([[5]])) for _ in range(5)]
    assert all(not torch.equal(one, other) for one, other in itertools.pairwise(kept)) and len(tapes) == 1


def test_graphs_can_be_switched_off_and_need_a_gpu(tapes, monkeypatch):
    tokenizer = tokenizer_of()
    model = model_of_text(tokenizer, n_layer=1)

    def text(**options) -> str:
        config = SamplingConfig(max_new_tokens=5, **options)
        return "".join(piece.text for piece in generate(model, tokenizer, ["the "], config))

    assert text() == text(cuda_graphs=False) == text(batch_invariant=True)
    assert len(tapes) == 1
    monkeypatch.undo()
    text()
    assert len(tapes) == 1


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["modern", "gpt2", "window-alibi-post"])
def test_graphs_on_a_gpu_equal_plain_steps(name):
    model = model_of(n_layer=2, **OPTIONS[name]).cuda()
    decoders = [Decoder(model, 2, 48, cuda_graphs=graphs) for graphs in (True, False)]
    for decoder in decoders:
        decoder.prefill(0, text_of(5))
        decoder.prefill(1, text_of(9))
    for i in range(8):
        tokens = torch.tensor([[i], [i + 1]], device="cuda")
        ours, theirs = (decoder.step(tokens) for decoder in decoders)
        assert torch.equal(ours, theirs)
    assert len(decoders[0]._graphs._recorded) == 1


def test_record_returns_a_replay_and_its_result(monkeypatch):
    """The tensor is the one that run returned during the recording."""
    calls = []

    class Graph:
        def replay(self) -> None:
            calls.append("replay")

    @contextlib.contextmanager
    def capture(graph):
        calls.append(type(graph))
        yield
        calls.append("end")

    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph", capture)
    logits = torch.zeros(2)
    replay, result = step_graph.record(lambda: calls.append("run") or logits)
    assert result is logits and calls == [Graph, "run", "end"]
    replay()
    assert calls[3:] == ["replay"]
