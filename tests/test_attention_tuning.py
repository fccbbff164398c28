"""Tuning by timing, with a stub timer: tables, refused candidates and the winner."""

import hashlib
import json
import logging
from types import SimpleNamespace

import pytest
import torch

from benchmarks import tune_attention as tuning
from benchmarks.attention import Setting
from kernels import attention_forward, configs
from kernels.configs import Config, Key
from tests.attention_checks import Case
from tests.test_attention_mutations import one_partial_less

ENTRY = {"arch": "sm_90", "dtype": "bfloat16", "head_dim": 128, "kernel": "forward"}
ENTRY |= {"block_m": 128, "block_n": 128, "num_warps": 8, "num_stages": 2, "tma": True}
CHOICE = "sm_90", torch.bfloat16, 80, 128, "forward"
SMALL = Setting(16, 32, "causal", "forward", tokens=32, width=16)


@pytest.fixture(autouse=True)
def read_anew(monkeypatch):
    monkeypatch.delenv("KERNELS_TUNED_TABLE", raising=False)
    configs.tuned.cache_clear()
    yield
    configs.tuned.cache_clear()


@pytest.fixture
def table(tmp_path, monkeypatch):
    """table(entries) makes these the tuned table."""

    def table(content) -> str:
        path = tmp_path / "tuned.json"
        path.write_text(content if isinstance(content, str) else json.dumps(content))
        monkeypatch.setenv("KERNELS_TUNED_TABLE", str(path))
        configs.tuned.cache_clear()
        return str(path)

    return table


def test_a_tuned_entry_overrides_the_default(table, caplog):
    default = configs.choose(*CHOICE)
    other = configs.choose("sm_90", torch.float16, 80, 128, "forward")
    path = table({"entries": [ENTRY | {"milliseconds": 1.0}]})
    with caplog.at_level(logging.INFO, logger="kernels"):
        assert configs.choose(*CHOICE) == Config(128, 128, 8, 2, True) != default
        assert configs.choose("sm_90", torch.float16, 80, 128, "forward") == other
    (record,) = caplog.records
    assert record.name == "kernels" and path in record.message and "bits may differ" in record.message


def test_the_default_table_is_pinned():
    """Other tiles give other bits. Change the digest only after reading the compile report of the new table."""
    entries = sorted((*key, [(limit, *config) for limit, config in row]) for key, row in configs.TABLE.items())
    digest = hashlib.sha256(repr(entries).encode()).hexdigest()
    assert (len(entries), digest[:16]) == (48, "558588a9bfc7671c")
    # KiB; CUDA reserves one of 164, 100 and 228
    kib = {"sm_80": 163, "sm_89": 99, "sm_90": 227, "sm_100": 227, "sm_120": 99, "gfx942": 64}
    assert {arch: n / 1024 for arch, n in configs.SHARED_MEMORY.items()} == kib
    assert Config(64, 64, 4, 1) == configs.INTERPRETER


@pytest.mark.parametrize(
    ("capability", "arch"),
    [
        ((8, 0), "sm_80"), ((8, 7), "sm_80"), ((8, 6), "sm_89"), ((8, 9), "sm_89"), ((9, 0), "sm_90"),
        ((10, 0), "sm_100"), ((10, 3), "sm_100"), ((11, 0), "sm_120"), ((12, 0), "sm_120"), ((12, 1), "sm_120"),
    ],
)  # fmt: skip
def test_a_device_uses_the_tiles_of_its_architecture(monkeypatch, capability, arch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert configs.architecture(torch.device("cuda", 1)) == arch
    assert configs.architecture(torch.device("cpu")) == "interpreter"
    monkeypatch.setattr(torch.version, "hip", "6.4")
    assert configs.architecture(torch.device("cuda", 1)) == "gfx942"


def test_dbias_never_takes_descriptors(table):
    table({"entries": [ENTRY | {"kernel": "dq"}]})
    assert configs.choose(*CHOICE[:4], "dbias") == Config(128, 32, 8, 1, False)


BAD = {
    "not JSON": "tiles: 64",
    "a list": [ENTRY],
    "no entries": {"benchmark": "attention"},
    "entries of another kind": {"entries": ["sm_90"]},
    "no tma": {"entries": [{name: value for name, value in ENTRY.items() if name != "tma"}]},
    "an odd tile": {"entries": [ENTRY | {"block_m": 100}]},
    "too large a tile": {"entries": [ENTRY | {"block_n": 512}]},
    "a tile of text": {"entries": [ENTRY | {"block_n": "64"}]},
    "no stages": {"entries": [ENTRY | {"num_stages": 0}]},
    "true for a number": {"entries": [ENTRY | {"num_stages": True}]},
    "a number for true": {"entries": [ENTRY | {"tma": 1}]},
    "TMA before sm_90": {"entries": [ENTRY | {"arch": "sm_80"}]},
    "another dtype": {"entries": [ENTRY | {"dtype": "float64"}]},
    "another head dim": {"entries": [ENTRY | {"head_dim": 80}]},
    "another kernel": {"entries": [ENTRY | {"kernel": "decode"}]},
    "a list for a name": {"entries": [ENTRY | {"arch": []}]},
    "two of one": {"entries": [ENTRY, ENTRY | {"block_m": 64}]},
}


@pytest.mark.parametrize("why", BAD)
def test_an_invalid_table_is_refused(why, table):
    path = table(BAD[why])
    for _ in range(2):
        with pytest.raises(ValueError) as caught:
            configs.choose(*CHOICE)
        assert path in str(caught.value) and "\n" not in str(caught.value)


def test_a_missing_table_is_refused(monkeypatch, tmp_path):
    monkeypatch.setenv("KERNELS_TUNED_TABLE", str(tmp_path / "none.json"))
    with pytest.raises(ValueError, match=r"none\.json"):
        configs.choose(*CHOICE)


def test_trying_a_config_is_undone_afterwards():
    key = Key("sm_90", torch.float16, 64, "dq")
    before = configs.choose("sm_90", torch.float16, 64, 64, "dq")
    with configs.trying(key, Config(16, 16, 4, 1)):
        with configs.trying(key, Config(32, 16, 4, 1)):
            assert configs.choose("sm_90", torch.float16, 64, 64, "dq") == (32, 16, 4, 1, False)
        assert configs.choose("sm_90", torch.float16, 64, 64, "dq") == (16, 16, 4, 1, False)
    assert configs.choose("sm_90", torch.float16, 64, 64, "dq") == before


@pytest.mark.parametrize("kernel", configs.TUNED_KERNELS)
def test_candidates_are_valid_and_start_with_the_default(kernel):
    """They have TMA only where the chip has it, no duplicates, and are valid table entries."""
    for arch in configs.SHARED_MEMORY:
        key = Key(arch, torch.bfloat16, 128, kernel)
        found = tuning.candidates(key)
        assert found[0] == configs.choose(arch, torch.bfloat16, 128, 128, kernel)
        assert len(found) == len(set(found))
        assert any(config.tma for config in found) == (arch in configs.HAS_TMA)
        assert not any(config.tma for config in tuning.candidates(key._replace(dtype=torch.float32)))
        outcome = tuning.Outcome(key, found[0], milliseconds=dict.fromkeys(found, 1.0))
        for outcome.winner in found:
            assert configs._entry(json.loads(json.dumps(outcome.entry()))) == (key, outcome.winner)


def test_a_config_with_too_much_shared_memory_is_refused():
    """A config with TMA must also fit without it; a config that does not compile is refused too."""
    bench = SimpleNamespace(key=Key("sm_120", torch.float16, 64, "forward"), launch=lambda config: config)

    def shared(config):
        if config.num_stages == 5:
            raise RuntimeError("PassManager::run failed\nand more of it")
        return (40 << 10 if config.tma else 60 << 10) * config.num_stages // 2

    def why(*config):
        return tuning.why_not_compiled(bench, Config(*config), shared)

    assert why(64, 64, 4, 3) is None
    assert "122880 bytes of shared memory of 101376" in why(64, 64, 4, 4)
    assert why(64, 64, 4, 3, True) is None
    assert shared(Config(64, 64, 4, 4, True)) < 101376 and "122880 bytes" in why(64, 64, 4, 4, True)
    assert why(64, 64, 4, 5) == "does not compile: PassManager::run failed"


def test_a_config_must_beat_the_default_by_the_margin():
    default, hardly, much, slower = (Config(2**n, 16, 4, 1) for n in range(4, 8))
    times = {default: 1.0, hardly: 0.995, much: 0.9, slower: 1.1}
    assert tuning.fastest(times, default) == [much, default, hardly, slower]
    assert tuning.fastest({much: 0.9, hardly: 0.8}, default) == [hardly, much]


class StubTimer:
    """A timer that runs the call and returns a millisecond for each row of its tile."""

    def __call__(self, run) -> float:
        run()
        return float(run.__self__.args["BLOCK_M"])


@pytest.mark.parametrize("kernel", configs.TUNED_KERNELS)
def test_the_fastest_correct_config_wins(kernel, device, monkeypatch):
    """A wrong config is not timed; one that fails a thorough case is timed but loses; a too large one is skipped."""
    key = Key(configs.architecture(torch.device(device)), torch.float32, 64, kernel)
    default, wrong, faulty, right, too_large = (Config(*tile, 4, 1) for tile in
        ((64, 32), (16, 16), (16, 32), (32, 32), (32, 64)))  # fmt: skip
    checked = []

    def check(case, device, slack):
        config = configs.choose(key.arch, key.dtype, 64, 64, kernel)
        checked.append(config)
        if config == wrong or (config == faulty and case.features):
            raise AssertionError("out: error 1.0")

    monkeypatch.setattr(tuning, "check", check)
    bench = tuning.Bench(key, SMALL, device)
    tried = [default, wrong, faulty, right, too_large]
    monkeypatch.setitem(configs.SHARED_MEMORY, key.arch, 100)

    def shared(launch):
        return 101 if launch.args["BLOCK_N"] == 64 else 100

    outcome = tuning.tune(bench, tried, StubTimer(), 2, device, shared)
    assert outcome.winner == right
    assert outcome.milliseconds == {default: 64.0, faulty: 16.0, right: 32.0}
    assert set(outcome.refused) == {wrong, faulty, too_large} and too_large not in checked
    assert outcome.entry()["default_milliseconds"] == 64.0


def test_without_a_correct_config_the_table_is_empty(device, monkeypatch, tmp_path, capsys):
    key = Key(configs.architecture(torch.device(device)), torch.float32, 64, "forward")
    monkeypatch.setattr(tuning, "why_wrong", lambda *_: "all wrong")
    outcome = tuning.tune(tuning.Bench(key, SMALL, device), [Config(16, 16, 4, 1)], StubTimer(), 1, device, lambda _: 0)
    assert outcome.winner is None
    tuning.show(outcome)
    assert "no candidate was right" in capsys.readouterr().out
    tuning.write([outcome], "stub", {}, tmp_path / "new" / "table.json")
    assert configs.read_tuned(tmp_path / "new" / "table.json") == {}


def test_a_wrong_config_is_found(device, monkeypatch):
    """The check runs the kernel with the tried config."""
    key = Key(configs.architecture(torch.device(device)), torch.float32, 64, "forward")
    cases = [Case(40, 40, H=1)]
    assert tuning.why_wrong(key, Config(16, 32, 4, 1), cases, device) is None
    if device == "cpu":
        monkeypatch.setattr(attention_forward, "count_partial", one_partial_less)
        assert "out" in tuning.why_wrong(key, Config(16, 32, 4, 1), cases, device)


@pytest.mark.gpu
def test_tuning_on_a_gpu_writes_a_table(monkeypatch, tmp_path):
    real, path = tuning.candidates, tmp_path / "table.json"
    monkeypatch.setattr(tuning, "candidates", lambda key: real(key)[:3])
    assert tuning.main(["--head-dims", "64", "--length", "1024", "--rounds", "2", "--write", str(path)]) == 0
    assert len(configs.read_tuned(path)) == 3


@pytest.mark.skipif(torch.cuda.is_available(), reason="tests a machine without a GPU")
def test_without_a_gpu_it_tunes_nothing(capsys):
    assert tuning.main([]) == 0
    assert capsys.readouterr().out.count("\n") == 1
