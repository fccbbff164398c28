"""Patterns that split text alike in tiktoken (Rust's fancy-regex) and in the tokenizers library (Oniguruma).

The two dialects differ where a sample of text may not show it: `{2}?`, `\\>`, or `(?i:ss)`, which one of them finds in
ß too. So only what is known to be alike is taken; everything else is refused.
"""

import re

GPT2_PATTERN = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
EACH_CHARACTER = r"[\s\S]"

# Categories, and scripts that patterns name. Both libraries have the same characters in each.
_CATEGORIES = "L[ultmo]?|M[nce]?|N[dlo]?|P[cdseifo]?|S[mcko]?|Z[slp]?"
_SCRIPTS = "Han|Hiragana|Katakana|Hangul|Latin|Cyrillic|Greek|Arabic|Hebrew|Thai"
_CLASS = rf"[pP]\{{(?:{_CATEGORIES}|{_SCRIPTS})\}}"
# Of ASCII's marks not < and >, which are the bounds of words in Rust.
_ESCAPE = rf"\\(?:{_CLASS}|[sSdDrntfv]|x[0-9A-Fa-f]{{2}}|u[0-9A-Fa-f]{{4}}|[!-/:;=?@\[-`{{-~ ])"
# A case that is ignored is one of ASCII's letters, and no two of them that are one character elsewhere (ß, ﬁ, ﬆ).
_ANY_CASE = r"\(\?i:(?![^)]*(?:[sS][sStT]|[fF][fFiIlL]))[A-Za-z'|?\[\]]*\)"
# {2}? is an option to Oniguruma, {2}+ a repetition; ^ and $ are the ends of any line to it.
_COUNT = r"\{\d+(?:\}|,\d*\}\??)(?![+?])"
_GROUP = rf"{_ANY_CASE}|\((?:\?(?:[:=!>]|<[=!])|(?!\?))"
_OUTSIDE = re.compile(rf"{_GROUP}|\[\^?(?!\])|{_COUNT}|\\z|{_ESCAPE}|[^\\([\]{{}}^$]")
_INSIDE = re.compile(rf"\[\^?(?![:\]])|{_ESCAPE}|&(?!&)|~(?!~)|-(?!-)|[^\\\[&~-]")


def unlike(pattern: str) -> str | None:
    """The rest of a pattern, from the first part that the two may read differently; None if they read it alike."""
    at = brackets = 0
    while at < len(pattern):
        part = (_INSIDE if brackets else _OUTSIDE).match(pattern, at)
        if part is None:
            return pattern[at:]
        at = part.end()
        brackets += part[0].startswith("[") - (brackets > 0 and part[0] == "]")
    return None


def for_oniguruma(pattern: str) -> str | None:
    """A pattern of tiktoken's in the dialect of tokenizers, where `{1,3}+` repeats {1,3} instead of being possessive,
    and `$` is the end of any line; None where that is not possible."""
    # At the end of an alternative there is nothing to give back for: possessive or not is the same.
    pattern = re.sub(r"(\{\d+(?:,\d*)?\})\+(?=\||$)", r"\1", pattern)
    pattern = re.sub(r"(?<!\\)\$(?=\||\)|$)", r"\\z", pattern)
    return None if unlike(pattern) else pattern
