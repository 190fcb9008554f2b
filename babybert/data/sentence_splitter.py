"""Where sentences end in a text.

A sentence ends after a run of sentence ends (`?!`, `. . .`) and the quotes and brackets that close there. It goes on

- after a full stop that is inside a number or a name: before a digit or a lower-case letter without a space (`3.5`,
  `imdb.com`), but not between a letter and a digit (`the end.10 points`);
- after an abbreviation that always has something after it (`Mr.`, `e.g.`), or an initial (`J. R. R. Tolkien`);
- before a lower-case letter, after a closing quote or bracket (`"Why?" she asked`), an ellipsis, an abbreviation that
  may end a sentence (`etc.`, `Jr.`) or a chain of letters (`p.m.`);
- before a comma, a colon or a semicolon.

These are rules for characters and a short list of abbreviations. They do not know that `U.S.` or `Plan B.` may end a
sentence, or that `3.` may not (`am 3. Oktober`).

They need the text: its spaces and capitals are not in the tokens. Sentences that are segments by themselves
(`--segments sentences`) end by the simpler rule of `sentences.py`, as in the reference.
"""

import functools
import itertools
import re
from collections.abc import Callable, Iterable

from babybert.data.sentence_ends import SENTENCE_ENDS

LINE_BREAK = "<br />"
ELLIPSIS = "\u2026"
FULL_STOPS = ".\uff0e"
# Closing quotes and brackets of all scripts.
CLOSERS = "\"')]}\u2019\u201d\u300d\u300f\uff09\u3011\u300b\u3009\uff3d\uff63\u201c\u00bb\u00ab\u203a\u2039"
# These open in other languages, so they close only before white space: \u201c and \u00ab close in German.
OPENERS_TOO = "\u201c\u00bb\u00ab\u203a\u2039"
MOST_CLOSERS = 8  # in a row, to look for white space after them
# White space for both tokenizers. Without control characters: WordPiece deletes them.
SPACE = r"(?:[ \t\n\r\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000]|<br[ ]/>)"
# Abbreviations in lower case; in a text they have any case.
TITLES = ("mr", "mrs", "ms", "messrs", "dr", "prof", "rev", "hon", "gov", "gen", "sen", "col", "capt", "lt", "sgt",
          "st", "mme", "mlle", "sr", "sra", "srta", "dra")  # fmt: skip
BEFORE_A_WORD = (*TITLES, "ph", "vs", "cf", "e.g", "i.e", "d.h", "z.b", "bzw", "vgl", "\u0442.\u0435")
BEFORE_A_NUMBER = ("no", "nr", "vol", "fig", "p", "pp", "ch", "art")
MAY_BE_LAST = ("etc", "jr", "inc", "ltd", "co", "corp", "al", "approx", "usw", "\u0434\u0440")
# Latin, Greek, Cyrillic and Armenian, of which all versions of Python know the case.
ASCII = (range(0x80),)
CASED_BLOCKS = (range(0x590), range(0x1E00, 0x2000))


class SentenceSplitter:
    """Finds the sentence ends of texts, for a tokenizer.

    Args:
        isolated: which of `SENTENCE_ENDS` and `CLOSERS` the tokenizer makes tokens of their own. Others do not end a
            sentence, and close one only before white space: a cut at another place would be inside a token.
    """

    def __init__(self, isolated: Iterable[str]) -> None:
        self._isolated = frozenset(isolated)

    def ends(self, text: str) -> list[int]:
        """Return the index after each sentence end of a text. After the last one there may be text without an end.

        Ends at the start of a text belong to its first sentence (`... and then`).
        """
        pattern, leading_pattern = self._ascii_patterns if text.isascii() else self._patterns
        ends = [match.end() for match in pattern.finditer(text) if match.lastindex]
        leading = leading_pattern.match(text)
        if ends and leading and ends[0] <= leading.end() < len(text):
            ends = [end for end in ends if end > leading.end()]
        return ends

    def split(self, text: str) -> list[str]:
        """Cut a text after each sentence end. The last part is what comes after the last one; it may be empty."""
        return [text[start:end] for start, end in itertools.pairwise([0, *self.ends(text), len(text)])]

    @functools.cached_property
    def _patterns(self) -> tuple[re.Pattern[str], re.Pattern[str]]:
        return _compile(self._isolated, CASED_BLOCKS)

    @functools.cached_property
    def _ascii_patterns(self) -> tuple[re.Pattern[str], re.Pattern[str]]:
        """For ASCII, which has few of the characters, so that it is searched faster."""
        return _compile(frozenset(filter(str.isascii, self._isolated)), ASCII)


def _compile(isolated: frozenset[str], blocks: Iterable[range]) -> tuple[re.Pattern[str], re.Pattern[str]]:
    """Compile the pattern of a possible sentence end, and that of what may be before the first sentence of a text.

    Where a sentence does end, the first pattern has a group. It matches everywhere else, too: if it failed after a long
    run, the search would try again within it, and the time would be quadratic. For the same reason look-aheads for
    closing characters are limited.
    """
    lower, capitals = (_letters(is_in_case, blocks) for is_in_case in (str.islower, str.isupper))
    initials = capitals.replace("I", "", 1)  # "I" is a word
    closed = _one_of(CLOSERS)
    before_space = rf"(?={SPACE}|\Z)"
    before_break = rf"(?={SPACE}|[,;:]|\Z)"  # where `,` follows, no sentence ends
    before_lower = rf"(?={SPACE}*[{lower}])"
    end = _one_of(end for end in SENTENCE_ENDS if end in isolated)
    closes = isolated - set(OPENERS_TOO)
    closer_before_space = (
        rf"{_one_of(closer for closer in CLOSERS if closer not in closes)}(?={closed}{{,{MOST_CLOSERS}}}{before_break})"
    )
    closer = f"(?:{_one_of(closer for closer in CLOSERS if closer in closes)}|{closer_before_space})"
    if blocks is not ASCII:
        closer = rf"(?:{closer}|[ \xa0\u202f]\u00bb{before_space})"  # as in French
        # `re` searches for a class of many characters above U+FFFF slowly, so it looks for all of them first.
        candidates = [*(end for end in SENTENCE_ENDS if end in isolated and end <= "\uffff"), ELLIPSIS]
        after_ellipsis = rf"(?:{end}|{ELLIPSIS}|{closed}){{,{MOST_CLOSERS}}}{before_space}"
        is_end = rf"(?:(?<={end})|(?<={ELLIPSIS})(?={after_ellipsis}))"
        end = rf"[{re.escape(''.join(candidates))}\U00010000-\U0010ffff]{is_end}"
    letter = r"[^\W\d_]"
    in_a_number_or_name = rf"(?:[{lower}]|(?<!{letter}.)\d)"
    initial = rf"(?<=(?<![\w'\u2019])[{initials}].)"
    chain_goes_on = rf"(?<=\b{letter}.)[ ]?{letter}\."
    chain_ends = rf"(?:(?<=\b{letter}\.{letter}.)|(?<=\b{letter}\.[ ]{letter}.))"
    ends_here = rf"(?![,;:]|(?<={ELLIPSIS}){before_lower})()"
    return (
        re.compile(
            rf"""{end}
            (?:
                (?:{SPACE}*{end}|{closer})++ (?:(?!(?<={closed}){before_lower}){ends_here})?
                |
                (?:
                    (?:
                        (?<![{FULL_STOPS}])
                        |
                        (?!{in_a_number_or_name}|{initial}|{chain_goes_on}|{_after(BEFORE_A_WORD)})
                        (?!(?:{chain_ends}|{_after(MAY_BE_LAST)}){before_lower}|{_after(BEFORE_A_NUMBER)}{SPACE}*\d)
                    )
                    {ends_here}
                )?
            )""",
            re.VERBOSE,
        ),
        re.compile(f"(?:{SPACE}|{end}|{closer})*+", re.VERBOSE),
    )


def _one_of(characters: Iterable[str]) -> str:
    """A pattern for one of some characters."""
    joined = re.escape("".join(characters))
    return f"[{joined}]" if joined else "(?!)"


def _letters(is_in_case: Callable[[str], bool], blocks: Iterable[range]) -> str:
    """The letters of one case in some blocks, for a character class."""
    return "".join(letter for block in blocks for letter in map(chr, block) if is_in_case(letter))


def _after(words: Iterable[str]) -> str:
    """A pattern for a place after one of these words and a full stop. A look-behind has one width."""
    words = [*words, *(word.replace(".", ". ") for word in words if "." in word)]
    by_width = {len(word): [other for other in words if len(other) == len(word)] for word in words}
    look_behinds = (rf"(?<=\b(?i:{'|'.join(map(re.escape, same))}).)" for same in by_width.values())
    return f"(?:{'|'.join(look_behinds)})"
