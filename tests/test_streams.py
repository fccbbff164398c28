"""Text that the encoding of standard output cannot represent."""

import io

import pytest

from gpt.streams import LostOutput, Outlet


@pytest.mark.parametrize(
    ("encoding", "chosen", "expected"),
    [
        ("ascii", None, "é ☃ \\udcff".encode()),
        ("ANSI_X3.4-1968", None, "é ☃ \\udcff".encode()),
        ("ascii", "ascii", b"\\xe9 \\u2603 \\udcff"),
        ("latin-1", None, b"\xe9 \\u2603 \\udcff"),
        ("utf-8", None, "é ☃ \\udcff".encode()),
    ],
)
def test_ascii_becomes_utf_8_unless_requested(encoding, chosen, expected, monkeypatch):
    monkeypatch.delenv("PYTHONIOENCODING", raising=False)
    if chosen:
        monkeypatch.setenv("PYTHONIOENCODING", chosen)
    raw = io.BytesIO()
    outlet = Outlet(io.TextIOWrapper(raw, encoding=encoding), is_needed=True)
    outlet.write("é ☃ \udcff")
    outlet.flush()
    assert raw.getvalue() == expected and outlet.error is None


def test_a_result_cannot_be_written_to_a_closed_stream():
    with pytest.raises(LostOutput, match="standard output is closed"):
        Outlet(None, is_needed=True).write("x")
    assert Outlet(None, is_needed=False).write("x") == 1
