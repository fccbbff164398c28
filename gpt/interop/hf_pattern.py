"""Checks that a pattern splits text alike in tiktoken (Rust's fancy-regex) and the tokenizers library (Oniguruma).

The dialects differ in ways that sample texts may not show: `{2}?`, `\\>`, or `(?i:ss)`, which matches ß in one of them.
So only syntax that is known to be alike is accepted.
"""

import re

GPT2_PATTERN = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
EACH_CHARACTER = r"[\s\S]"

# Categories and scripts that hold the same characters in both libraries.
_CATEGORIES = "L[ultmo]?|M[nce]?|N[dlo]?|P[cdseifo]?|S[mcko]?|Z[slp]?"
_SCRIPTS = "Han|Hiragana|Katakana|Hangul|Latin|Cyrillic|Greek|Arabic|Hebrew|Thai"
_CLASS = rf"[pP]\{{(?:{_CATEGORIES}|{_SCRIPTS})\}}"
# Any ASCII mark except < and >, which are word boundaries in Rust.
_ESCAPE = rf"\\(?:{_CLASS}|[sSdDrntfv]|x[0-9A-Fa-f]{{2}}|u[0-9A-Fa-f]{{4}}|[!-/:;=?@\[-`{{-~ ])"
# Case may be ignored for ASCII letters, except two in a row that also match one character (ß, ﬁ, ﬆ).
_ANY_CASE = r"\(\?i:(?![^)]*(?:[sS][sStT]|[fF][fFiIlL]))[A-Za-z'|?\[\]]*\)"
# In Oniguruma {2}? is optional and {2}+ a repetition, and ^ and $ match at the ends of any line.
_COUNT = r"\{\d+(?:\}|,\d*\}\??)(?![+?])"
_GROUP = rf"{_ANY_CASE}|\((?:\?(?:[:=!>]|<[=!])|(?!\?))"
_OUTSIDE = re.compile(rf"{_GROUP}|\[\^?(?!\])|{_COUNT}|\\z|{_ESCAPE}|[^\\([\]{{}}^$]")
_INSIDE = re.compile(rf"\[\^?(?![:\]])|{_ESCAPE}|&(?!&)|~(?!~)|-(?!-)|[^\\\[&~-]")


def unlike(pattern: str) -> str | None:
    """Return a pattern from the first part that the two engines may read differently; None if they agree."""
    at = brackets = 0
    while at < len(pattern):
        part = (_INSIDE if brackets else _OUTSIDE).match(pattern, at)
        if part is None:
            return pattern[at:]
        at = part.end()
        brackets += part[0].startswith("[") - (brackets > 0 and part[0] == "]")
    return None


def for_oniguruma(pattern: str) -> str | None:
    """Rewrite tiktoken's pattern for tokenizers, where `{1,3}+` is a repetition instead of possessive, and `$` matches
    at any line's end. None if that is impossible."""
    # At the end of an alternative, possessive or not makes no difference: nothing follows that could backtrack.
    pattern = re.sub(r"(\{\d+(?:,\d*)?\})\+(?=\||$)", r"\1", pattern)
    pattern = re.sub(r"(?<!\\)\$(?=\||\)|$)", r"\\z", pattern)
    return None if unlike(pattern) else pattern
