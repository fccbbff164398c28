"""Scoring against brute force: each token given exactly the tokens before it in its window."""

import copy
import json
import math
import sys
import types
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

import gpt
from gpt.command_line import parse_flags
from gpt.config import ModelConfig
from gpt.data.tokenizers import ByteTokenizer, CharTokenizer
from gpt.errors import UserError, run_command
from gpt.evaluation.command import Arguments, main, read_questions
from gpt.evaluation.lm_eval import harness_model
from gpt.evaluation.scoring import Question, Row, continuation, multiple_choice, score, score_texts, windows, with_shots
from gpt.interop.export import export
from gpt.model import GPT

BYTE = ByteTokenizer()
TEXT = "The quick brown fox, naïve as ever, jumps over 13 dogs.\n"


@pytest.fixture(scope="module")
def model() -> GPT:
    torch.manual_seed(0)
    model = GPT(ModelConfig(n_layer=1, n_head=2, n_embd=32, seq_len=16, vocab_size=260))
    with torch.no_grad():
        for weight in model.parameters():
            weight.normal_(std=0.3)
    return model.eval()


def log_prob(model: GPT, before: list[int], token: int) -> float:
    """Compute the log-probability of one token after exactly these, alone in a batch."""
    with torch.no_grad():
        return float(model(torch.tensor([before]))[0, -1].double().log_softmax(-1)[token])


def summed(model: GPT, before: list[int], ids: list[int]) -> float:
    return sum(log_prob(model, (before + ids[:i])[-16:], token) for i, token in enumerate(ids))


# Texts.


@pytest.mark.parametrize("n", [2, 16, 17, 18, 31, 50])
@pytest.mark.parametrize("stride", [1, 5, 8, 16])
def test_windows_score_each_token_once_with_enough_before_it(n, stride):
    tokens, seen = list(range(100, 100 + n)), []
    for row in windows(tokens, 16, stride):
        assert len(row.tokens) <= 17
        assert list(row.tokens) == tokens[row.tokens[0] - 100 :][: len(row.tokens)]
        for token in row.tokens[len(row.tokens) - row.scored :]:
            before = token - row.tokens[0]
            assert before >= min(token - 100, 16 - stride + 1)
            seen.append(token)
    assert seen == tokens[1:]


@pytest.mark.parametrize("stride", [1, 6, 16])
def test_text_is_scored_as_by_brute_force(model, stride):
    ids = [256, *TEXT.encode()]
    nats = 0.0
    for j in range(1, len(ids)):
        # The window of j ends at 16 plus the first multiple of stride that reaches j, or at the text's end.
        end = 16 if j <= 16 else min(16 + math.ceil((j - 16) / stride) * stride, len(ids) - 1)
        nats -= log_prob(model, ids[end - 16 : j], ids[j])
    found = score_texts(model, BYTE, [TEXT], stride=stride, batch_size=3)
    size = len(TEXT.encode())
    assert found["tokens"] == found["bytes"] == size
    assert found["loss"] == pytest.approx(nats / size, rel=1e-6)
    assert found["perplexity"] == pytest.approx(math.exp(nats / size), rel=1e-5)
    assert found["bits_per_byte"] == pytest.approx(nats / math.log(2) / size, rel=1e-6)


def test_texts_are_scored_apart(model):
    parts = ["first text", "and another one, longer than the context is", "x"]
    alone = [score_texts(model, BYTE, [part]) for part in parts]
    together = score_texts(model, BYTE, parts, batch_size=2)
    assert together["documents"] == 3
    assert together["tokens"] == sum(len(part) for part in parts)
    nats = sum(one["loss"] * one["tokens"] for one in alone)
    assert together["loss"] * together["tokens"] == pytest.approx(nats, rel=1e-6)


def test_without_a_document_token_the_first_token_is_not_scored(model):
    tokenizer = CharTokenizer("".join(sorted(set(TEXT))))
    found = score_texts(model, tokenizer, [TEXT, "T"])
    assert found["tokens"] == len(TEXT) - 1
    assert found["bytes"] == len(TEXT.encode()) - 1
    with pytest.raises(UserError, match="no token to score"):
        score_texts(model, tokenizer, ["T"])


def test_padding_changes_nothing(model):
    rows = [Row(list(TEXT[:5].encode()), 2), Row(list(TEXT[:17].encode()), 16), Row([65, 66], 1)]
    together = list(score(model, rows, 3))
    for row, (found, _) in zip(rows, together):
        assert found == pytest.approx(next(score(model, [row]))[0], rel=1e-5)


# Questions.

QUESTIONS = [
    Question("a b", ("c", "a much longer ending"), 0),
    Question("the sun", ("is hot", "is cold", "naïve"), 2),
    Question("one two three four five six", ("seven", "eight"), 1),
    Question("x", ("y", "z"), 1),
]


def test_endings_are_scored_as_by_brute_force(model):
    rows = [(q, e) for q in QUESTIONS for e in q.endings if len(e) < 16]
    made = [continuation(BYTE, q.context, f" {e}", 16) for q, e in rows]
    assert any(cut for _, cut in made) and not all(cut for _, cut in made)
    for (q, e), (row, _), (found, _) in zip(rows, made, score(model, [row for row, _ in made])):
        before, ids = [256, *q.context.encode()], list(f" {e}".encode())
        tokens = (before + ids)[-17:]
        assert list(row.tokens) == tokens
        kept = tokens[: len(tokens) - len(ids)]
        expected = sum(log_prob(model, kept + ids[:i], token) for i, token in enumerate(ids))
        assert found.sum() == pytest.approx(expected, rel=1e-5)


def test_accuracy_raw_and_per_byte(model):
    """For each of the two rules, labels that agree with brute force give 1 and others 0."""
    plain = [q for q in QUESTIONS if q is not QUESTIONS[0]]

    def best(question: Question, normalised: bool) -> int:
        sums = []
        for ending in question.endings:
            ids = list(f" {ending}".encode())
            tokens = [256, *question.context.encode(), *ids][-17:]
            kept = tokens[: len(tokens) - len(ids)]
            total = sum(log_prob(model, kept + ids[:i], token) for i, token in enumerate(ids))
            sums.append(total / len(ids) if normalised else total)
        return sums.index(max(sums))

    pairs = [(best(q, False), best(q, True)) for q in plain]
    for rule, key in enumerate(("accuracy", "accuracy_normalised")):
        right = [Question(q.context, q.endings, pair[rule]) for q, pair in zip(plain, pairs)]
        contexts = [q.context for q in right]
        assert multiple_choice(model, BYTE, right, contexts, batch_size=3)[key] == 1.0
        wrong = [Question(q.context, q.endings, (q.label + 1) % len(q.endings)) for q in right]
        assert multiple_choice(model, BYTE, wrong, contexts)[key] == 0.0
    with pytest.raises(UserError, match="has 21 tokens, not 1 to 16"):
        multiple_choice(model, BYTE, QUESTIONS, [q.context for q in QUESTIONS])


def test_length_matters_to_one_rule_only():
    """Under uniform probabilities the shorter ending is likelier; per byte both are equal, and the first counts."""
    model = GPT(ModelConfig(n_layer=1, n_head=2, n_embd=32, seq_len=16, vocab_size=257)).eval()  # a head of zeros
    found = multiple_choice(
        model, BYTE, [Question("a", ("longer", "b"), 1), Question("a", ("longer", "b"), 0)], ["a", "a"]
    )
    assert found == {"questions": 2, "accuracy": 0.5, "accuracy_normalised": 0.5, "cut": 0}
    one = multiple_choice(model, BYTE, [Question("a", ("longer", "b"), 1)], ["a"])
    assert (one["accuracy"], one["accuracy_normalised"]) == (1.0, 0.0)


def test_shots_come_from_the_other_rows():
    contexts = with_shots(QUESTIONS, QUESTIONS, 2, seed=0)
    for question, context in zip(QUESTIONS, contexts):
        *shots, last = context.split("\n\n")
        assert last == question.context
        assert len(set(shots)) == 2
        assert set(shots) <= {q.answered for q in QUESTIONS if q is not question}
    assert QUESTIONS[1].answered == "the sun naïve"
    assert contexts == with_shots(QUESTIONS, QUESTIONS, 2, seed=0) != with_shots(QUESTIONS, QUESTIONS, 2, seed=1)
    assert with_shots(QUESTIONS, QUESTIONS, 0, seed=0) == [q.context for q in QUESTIONS]
    # Equal questions are recognised, too.
    assert with_shots([replace(q) for q in QUESTIONS], QUESTIONS, 2, seed=0) == contexts
    with pytest.raises(UserError, match="k is 4, but there are only 3 other shots"):
        with_shots(QUESTIONS, QUESTIONS, 4, seed=0)


# The harness: a stand-in with its interface.


@pytest.fixture
def harness(model, monkeypatch):
    class LM:
        def __init__(self):
            self.ready = True

    for name in ("lm_eval", "lm_eval.api", "lm_eval.api.model"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    sys.modules["lm_eval.api.model"].LM = LM
    made = harness_model(model, BYTE, batch_size=2)
    assert isinstance(made, LM) and made.ready
    return made


def requests(*args):
    return [SimpleNamespace(args=each) for each in args]


def test_harness_loglikelihood(model, harness):
    found = harness.loglikelihood(requests(("ab", " cd"), ("ab ", "cd"), ("", "xyz")))
    assert found[0] == found[1]
    assert found[0][0] == pytest.approx(summed(model, [256, 97, 98], list(b" cd")), rel=1e-5)
    assert found[2][0] == pytest.approx(summed(model, [256], list(b"xyz")), rel=1e-5)
    assert found[0][1] is False
    with torch.no_grad():
        likeliest = int(model(torch.tensor([[256, 97, 98]]))[0, -1, :128].argmax())
        # A token counts as greedy only if it is the likeliest of all.
        top = int(model(torch.tensor([[256, 97, 98]]))[0, -1].argmax())
    row = Row([256, 97, 98, likeliest], 1)
    assert next(score(model, [row]))[1] is (likeliest == top)


def test_harness_rolling(model, harness):
    text = "longer than the context of sixteen"
    ids = [256, *text.encode()]
    expected = 0.0
    for j in range(1, len(ids)):
        end = 16 if j <= 16 else min(16 * math.ceil(j / 16), len(ids) - 1)
        expected += log_prob(model, ids[end - 16 : j], ids[j])
    assert harness.loglikelihood_rolling(requests((text,))) == [pytest.approx(expected, rel=1e-5)]


def test_harness_generates_until(model, harness):
    sampling = gpt.SamplingConfig(max_new_tokens=8, temperature=0)
    start = torch.tensor([[256, 97]])
    ids = []
    with torch.no_grad():
        for _ in range(sampling.max_new_tokens):
            ids.append(int(model(torch.cat((start, torch.tensor([ids], dtype=torch.int64)), 1))[0, -1, :257].argmax()))
            if ids[-1] == 256:
                break
    whole = BYTE.decode(ids)
    assert len(whole) > 1
    options = {"max_gen_toks": 8, "until": []}
    assert harness.generate_until(requests(("a", options))) == [whole]
    assert harness.generate_until(requests(("a", {**options, "until": [whole[1], "\n"]}))) == [
        whole[: whole.index(whole[1])]
    ]
    assert harness.generate_until(requests(("a" * 50, {**options, "until": "\n"})))
    assert harness.generate_until(requests(("a", {**options, "until": ["", whole[1]]})))[0] == whole[:1]


def test_harness_keeps_a_prompt_that_fits(model, harness):
    """Even if more new tokens are requested than fit after it: by default 256."""
    sampling = gpt.SamplingConfig(temperature=0, stop="\n")
    for options in ({"until": "\n"}, {"until": "\n", "max_gen_toks": 1000}):
        found = harness.generate_until(requests(("ab cd", options)))[0]
        # The document token comes before the context, as in training.
        decoded = gpt.generate(model, _after_document(BYTE), ["ab cd"], sampling)
        assert found == "".join(piece.text for piece in decoded) != ""


def test_harness_draws_as_the_task_asks(harness):
    drawn = {"do_sample": True, "temperature": 5.0, "max_gen_toks": 8}
    plain, greedy, first = (
        harness.generate_until(requests(("ab", options)))[0]
        for options in (drawn, {"max_gen_toks": 8}, {**drawn, "top_k": 1, "top_p": None})
    )
    assert first == greedy != plain
    assert harness.generate_until(requests(("ab", {**drawn, "top_p": 1e-9})))[0] == greedy
    assert harness.generate_until(requests(("ab", {**drawn, "top_k": 0})))[0] == plain  # as in transformers


def _after_document(tokenizer: ByteTokenizer) -> ByteTokenizer:
    """Make a tokenizer that puts the document token first."""
    made = copy.copy(tokenizer)
    made.encode = lambda text, **options: [tokenizer.document_token, *tokenizer.encode(text, **options)]
    return made


def test_a_missing_harness_is_reported(model, monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    monkeypatch.setitem(sys.modules, "lm_eval.api.model", None)
    with pytest.raises(UserError, match="pip install lm-eval"):
        harness_model(model, BYTE)


# The command.


def status_of(*words) -> int:
    with pytest.raises(SystemExit) as stop:
        run_command(lambda: main(parse_flags(Arguments, list(map(str, words)), prog="gpt.evaluate")))
    return stop.value.code


@pytest.fixture
def questions(tmp_path):
    path = tmp_path / "questions.jsonl"
    rows = [{"ctx": q.context[:8], "endings": [e[:9] for e in q.endings], "label": str(q.label)} for q in QUESTIONS]
    path.write_text("\n".join(map(json.dumps, rows)) + "\n\n")
    return path


def test_corpus_of_a_run_and_of_its_export(tiny_run, tmp_path, capsys):
    (tmp_path / "text.txt").write_text(TEXT * 3)
    assert status_of(tiny_run, "--corpus", tmp_path / "text.txt", "--stride", 7, "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert found == pytest.approx(score_texts(*gpt.load(tiny_run, "cpu"), [TEXT * 3], stride=7))
    export(*gpt.load(tiny_run, "cpu"), tmp_path / "hf")
    assert status_of(tmp_path / "hf", "--corpus", tmp_path / "text.txt", "--stride", 7, "--json") == 0
    assert json.loads(capsys.readouterr().out) == pytest.approx(found)
    assert status_of(tiny_run, "--corpus", tmp_path / "text.txt") == 0
    assert "bits per byte" in capsys.readouterr().out


def test_options_that_error_messages_suggest_work(tiny_run, tmp_path, capsys):
    (tmp_path / "a.txt").write_bytes(b"a\xffb\n" + TEXT.encode() * 3)
    assert status_of(tiny_run, "--corpus", tmp_path / "a.txt") == 2
    assert "give --encoding-errors replace" in capsys.readouterr().err
    words = ["--encoding-errors", "replace", "--max-corpus-bytes", 30, "--cache-dir", tmp_path / "cache"]
    assert status_of(tiny_run, "--corpus", tmp_path / "a.txt", *words, "--json") == 0
    # The byte that is not UTF-8 becomes the three of U+FFFD.
    assert json.loads(capsys.readouterr().out)["bytes"] == 30 + 2
    elsewhere = ["--cache-dir", tmp_path / "a.txt", "--max-download-bytes", 3]
    assert status_of(tiny_run, "--corpus", "http://127.0.0.1:9/x.txt", *elsewhere) == 2
    assert "a.txt" in capsys.readouterr().err


def test_questions_by_command(tiny_run, questions, capsys):
    assert status_of(tiny_run, "--multiple-choice", questions, "--few-shot", 1, "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["questions"] == 4 and found["few_shot"] == 1
    assert status_of(tiny_run, "--multiple-choice", questions, "--few-shot", 1, "--shots", questions) == 0
    assert "4 questions with 1 shot\n" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"ctx": "a", "endings": ["b", "c"]}', "line 2 is not a question .*KeyError"),
        ('{"ctx": "a", "endings": ["b", "c"], "label": ""}', "line 2 is not a question"),
        ('{"ctx": "a", "endings": ["b", "c"], "label": 1.5}', "line 2 is not a question"),
        ('{"ctx": "a", "endings": ["b", "c"], "label": true}', "line 2 is not a question"),
        ('{"ctx": "a", "endings": ["b", "c"], "label": 1e999}', "line 2 is not a question"),
        (
            '{"ctx": "a", "endings": ["b", "c"], "label": 2}',
            "line 2 is not a question: label must be .*, not 2",
        ),
        ('{"ctx": "a", "endings": ["b"], "label": 0}', "line 2 is not a question: endings must be two or more, not 1"),
        ('{"ctx": "a", "endings": "bc", "label": 0}', "line 2 is not a question: endings must be a list of texts"),
        ('{"ctx": 1, "endings": ["b", "c"], "label": 0}', "line 2 is not a question: context must be text, not 1"),
        ("[1]", "line 2 is not a question"),
        ("{", "line 2 is not a question"),
    ],
    ids=range(11),
)
def test_bad_questions_are_refused(tmp_path, line, message):
    path = tmp_path / "bad.jsonl"
    path.write_text('{"ctx": "a", "endings": ["b", "c"], "label": 1}\n' + line)
    with pytest.raises(UserError, match=message):
        read_questions(path)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "give either corpus or multiple_choice"),
        (["--corpus", "nowhere.txt"], "nowhere.txt"),
        (["--multiple-choice", "nowhere.jsonl"], "cannot read the file of questions nowhere.jsonl"),
        (["--multiple-choice", "q", "--stride", "3"], "stride goes with corpus"),
        (["--multiple-choice", "q", "--text-field", "x"], "text_field goes with corpus"),
        (["--multiple-choice", "q", "--max-corpus-bytes", "9"], "max_corpus_bytes goes with corpus"),
        (["--multiple-choice", "q", "--seed", "3"], "seed goes with few_shot"),
        (["--corpus", "x", "--batch-size", "9" * 20], "batch_size must be below 2147483648"),
        (["--corpus", "x", "--few-shot", "3"], "few_shot goes with multiple_choice"),
        (["--corpus", "README.md", "--stride", "33"], "stride must lie between 1 and the model's context of 32"),
        (["--corpus", "README.md", "--device", "tpu"], "device 'tpu' cannot be used here"),
    ],
    ids=range(11),
)
def test_bad_input_is_one_sentence(tiny_run, capsys, words, message):
    assert status_of(tiny_run, *words) == 2
    output = capsys.readouterr()
    assert output.out == "" and message in output.err
    assert len(output.err.strip().splitlines()) == 1
