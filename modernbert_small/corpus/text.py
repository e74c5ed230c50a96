"""Normalising texts, and splitting those that are longer than a model's window."""

import json
import re
import unicodedata
from collections.abc import Iterator, Sequence
from itertools import islice

from tokenizers import Encoding, Tokenizer
from transformers import PreTrainedTokenizerBase

from modernbert_small.run.errors import UserError

# A text with fewer letters and digits holds no content: list markers, "--", "1.", stray table cells.
MIN_ALPHANUMERIC = 3

# These are removed: control characters that are no white space, lone surrogates, byte-order marks, non-characters.
_UNWANTED = re.compile("[\x00-\x08\x0e-\x1b\x7f-\x84\x86-\x9f\ud800-\udfff\ufeff\ufffe\uffff]")
_CARRIAGE_RETURN = re.compile(r"\r\n?")
_MANY_NEWLINES = re.compile(r"\n{3,}")

# Normalisers of tokenizers that never turn NFC text into more code points than it has UTF-8 bytes.
_NOT_EXPANDING = ("NFC", "BertNormalizer")
# BPE takes more than linear time: 0.8 s for 100,000 letters without a space, 20 s for 400,000. So very long texts are
# cut into pieces of this many characters a token first.
_PIECE_CHARACTERS_PER_TOKEN = 32
# Prose has four to five characters a token. A text with more characters than this for each token of the window is
# surely too long, and is tokenised with offsets at once instead of being counted first.
_SURELY_LONG_CHARACTERS_PER_TOKEN = 6
# Where a chunk may end, the best place first: after a paragraph, a line, a sentence, a word.
_BOUNDARIES = [re.compile(pattern) for pattern in (r"\n\n", r"\n", r"(?<=[.!?\u3002])\s", r"\s")]
# A word may take more tokens without the space before it, so chunks are cut this many tokens shorter.
_SLACK = 4
# An encoding holds about 100 bytes a token; this many characters at a time keep it below 200 MB.
_CHARACTERS_AT_ONCE = 4_000_000


def normalise(text: str) -> str:
    r"""Bring a text into the one form that the corpus holds, so that equal texts become equal strings.

    The result is Unicode NFC. Control characters and lone surrogates are removed, and line ends become \n. Other white
    space becomes one space between words and none at the ends of lines. There is at most one empty line in a row.
    Indentation is lost: prose does not need it, but code does. Normalising twice changes nothing more.
    """
    if "\r" in text:
        text = _CARRIAGE_RETURN.sub("\n", text)
    text = unicodedata.normalize("NFC", _UNWANTED.sub("", text))
    lines = (" ".join(line.split()) for line in text.split("\n"))
    return _MANY_NEWLINES.sub("\n\n", "\n".join(lines)).strip()


def is_trivial(text: str) -> bool:
    """Whether a text has fewer than `MIN_ALPHANUMERIC` letters and digits."""
    return len(list(islice(filter(str.isalnum, text), MIN_ALPHANUMERIC))) < MIN_ALPHANUMERIC


class Chunker:
    """Splits texts that a model's window cannot hold, at paragraphs, else sentences, else words.

    Special tokens that are written in a text (`[MASK]`) count as the text they are; tokenise with
    `split_special_tokens=True` (tokenizers: `encode_special_tokens = True`) to get the same count.

    Args:
        tokenizer: a fast tokenizer.
        max_seq_length: tokens of a chunk at most, special tokens included.

    Raises:
        UserError: a slow tokenizer.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, max_seq_length: int) -> None:
        backend = getattr(tokenizer, "backend_tokenizer", None)
        if backend is None:
            raise UserError(f"tokenizer {tokenizer.name_or_path}: expected a fast tokenizer (tokenizer.json)")
        self._capacity = max_seq_length - tokenizer.num_special_tokens_to_add()
        self._tokenizer = _text_only(backend)
        normalizer = self._tokenizer.normalizer
        self._tokens_within_bytes = normalizer is None or type(normalizer).__name__ in _NOT_EXPANDING
        self._piece_characters = _PIECE_CHARACTERS_PER_TOKEN * self._capacity
        self._countable_characters = _SURELY_LONG_CHARACTERS_PER_TOKEN * self._capacity

    def count(self, texts: Sequence[str]) -> list[int]:
        """The number of tokens of each text, without special tokens."""
        return [
            len(encoding)
            for batch in _batches_by_length(texts)
            for encoding in self._tokenizer.encode_batch_fast(batch, add_special_tokens=False)
        ]

    def split(self, texts: Sequence[str]) -> list[list[str]]:
        """The chunks of each text. A text that fits the window is its own only chunk.

        Only white space at the cuts is lost. A text is tokenised only if it might not fit. A text as long as many
        windows is first cut into pieces, which keeps the time linear in its length.

        Args:
            texts: normalised texts, not empty.
        """
        chunks = [[text] for text in texts]
        unsure = [i for i, text in enumerate(texts) if self._may_exceed(text)]
        countable = [i for i in unsure if len(texts[i]) <= self._countable_characters]
        counts = dict(zip(countable, self.count([texts[i] for i in countable]), strict=True))
        too_long = [i for i in unsure if counts.get(i, self._capacity + 1) > self._capacity]
        pieces = [_pieces(texts[i], self._piece_characters) for i in too_long]
        windows = iter(self._windows([piece for of_text in pieces for piece in of_text]))
        for i, of_text in zip(too_long, pieces, strict=True):
            chunks[i] = [chunk for _ in of_text for chunk in next(windows)]
        return chunks

    def _windows(self, texts: Sequence[str]) -> Iterator[list[str]]:
        """For each text, its chunks, each of which fits the window."""
        for batch in _batches_by_length(texts):
            encodings = self._tokenizer.encode_batch(batch, add_special_tokens=False)
            cut = [list(self._cut(text, encoding)) for text, encoding in zip(batch, encodings, strict=True)]
            counts = iter(self.count([chunk for chunks in cut for chunk in chunks]))
            for chunks in cut:
                fits = [next(counts) <= self._capacity for _ in chunks]
                parts: list[str] = []
                for chunk, fit in zip(chunks, fits, strict=True):
                    # A chunk by itself may take more tokens than it did within its text. Then it is cut again.
                    parts += [chunk] if fit else next(self._windows([chunk]))
                yield parts

    def _cut(self, text: str, encoding: Encoding) -> Iterator[str]:
        """Cut a text at the best boundaries that fill at least half of each window."""
        start, first = 0, 0
        while len(encoding) - first > self._capacity:
            window = self._capacity - _SLACK
            middle, limit = (_end_of(encoding, first + n - 1) for n in (window // 2, window))
            end = _best_end(text, max(middle, start + 1), max(limit, start + 1))
            if chunk := text[start:end].strip():
                yield chunk
            start, first = end, len(encoding)
            while start < len(text):  # the next character that is in a token: white space may be in none
                if not text[start].isspace() and (token := encoding.char_to_token(start)) is not None:
                    first = token
                    break
                start += 1
        if chunk := text[start:].strip():
            yield chunk

    def _may_exceed(self, text: str) -> bool:
        """Whether a text might be longer than the window; False only if it certainly fits.

        Every byte-level, byte-fallback, WordPiece or Unigram token takes at least one byte of the normalised text. One
        token more may stand for a space before the text.
        """
        return not self._tokens_within_bytes or len(text.encode()) + 1 > self._capacity


def _text_only(tokenizer: Tokenizer) -> Tokenizer:
    """The tokenizer without special tokens, so that `[MASK]` in a text is read as ordinary text."""
    state = json.loads(tokenizer.to_str())
    state.update(truncation=None, padding=None, post_processor=None)
    state["added_tokens"] = [token for token in state["added_tokens"] if not token["special"]]
    return Tokenizer.from_str(json.dumps(state))


def _batches_by_length(texts: Sequence[str]) -> Iterator[list[str]]:
    """Batches of texts with at most `_CHARACTERS_AT_ONCE` characters together, or of one text that is longer."""
    batch: list[str] = []
    characters = 0
    for text in texts:
        if batch and characters + len(text) > _CHARACTERS_AT_ONCE:
            yield batch
            batch, characters = [], 0
        batch.append(text)
        characters += len(text)
    if batch:
        yield batch


def _pieces(text: str, size: int) -> list[str]:
    """Cut a very long text into pieces of at most `size` characters, at the best boundary in reach."""
    pieces = []
    start = 0
    while len(text) - start > size:
        end = _best_end(text, start + size // 2, start + size)
        pieces.append(text[start:end])
        start = end
    return [*pieces, text[start:]]


def _end_of(encoding: Encoding, token: int) -> int:
    """The position after the last character of a token. `encoding.offsets` would make a list for all tokens."""
    span = encoding.token_to_chars(token)
    assert span is not None
    return span[1]


def _best_end(text: str, least: int, most: int) -> int:
    """Where to end a chunk that must end between `least` and `most`: before the last of the best boundaries."""
    for boundary in _BOUNDARIES:
        ends = [match.start() for match in boundary.finditer(text, least, most)]
        if ends:
            return ends[-1]
    return most
