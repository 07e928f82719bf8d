"""WordPiece for captions and every modality written as text; ids laid out as released.

    0 1 2 3                 [PAD] [UNK] [SOS] [EOS]
    4 ... 203               sentinels [S_0] ... [S_199] of span masking
    then bins x 4           coordinates v0=0 ..., v1=0 ..., v2=0 ..., v3=0 ...
    then                    class names in alphabetical order
    then                    ordinary pieces

Class names are added tokens that also match inside captions, so "dog" in a sentence and the class
of a box are one token and share what is learned about it. The released vocabulary has 1000 bins,
80 COCO names and 30,000 entries; fewer bins suit small images.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from tokenizers_vq.sequences.words import name_words, without_special

if TYPE_CHECKING:
    from tokenizers import AddedToken
    from tokenizers import Tokenizer as HFTokenizer

PAD, UNK, SOS, EOS = 0, 1, 2, 3
FIRST_SENTINEL, NUM_SENTINELS = 4, 200
FIRST_COORDINATE = FIRST_SENTINEL + NUM_SENTINELS
AXES = 4
RELEASED_BINS, RELEASED_SIZE = 1000, 30_000
FILE = "tokenizer.json"

_SPECIAL = ("[PAD]", "[UNK]", "[SOS]", "[EOS]")


def folded(text: str) -> str:
    """What tokens keep of the letters of a text: neither capitals nor accents."""
    letters = unicodedata.normalize("NFD", text.lower())
    return "".join(letter for letter in letters if not unicodedata.combining(letter))


class TextTokenizer:
    """Strings to ids and back; wraps a `tokenizers.Tokenizer` of the layout above."""

    def __init__(self, inner: HFTokenizer) -> None:
        self.inner = inner
        if [inner.id_to_token(i) for i in range(4)] != list(_SPECIAL):
            raise ValueError(f"not a 4M text tokenizer: ids 0..3 must be {' '.join(_SPECIAL)}")

    @property
    def vocab_size(self) -> int:
        """Number of ids."""
        return self.inner.get_vocab_size()

    @cached_property
    def bins(self) -> int:
        """Coordinate bins per axis."""
        count = 0
        while self.inner.token_to_id(f"v0={count}") is not None:
            count += 1
        return count

    @cached_property
    def class_names(self) -> tuple[str, ...]:
        """Class names that are tokens, in the order of their ids."""
        first = FIRST_COORDINATE + AXES * self.bins
        added = self.inner.get_added_tokens_decoder()
        return tuple(added[i].content for i in sorted(added) if i >= first)

    def coordinate_id(self, axis: int, value: int) -> int:
        """Id of `v{axis}={value}`."""
        return FIRST_COORDINATE + axis * self.bins + value

    def encode(self, text: str) -> list[int]:
        """Ids of a text, without [EOS]; what looks like a special token in it is words."""
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of several texts, each as `encode` gives them."""
        # Half a character, as of a broken argument of a command, is none that can be looked up.
        plain = [without_special(text).encode("utf-8", "replace").decode() for text in texts]
        return [encoding.ids for encoding in self.inner.encode_batch(plain)]

    def decode(self, ids: Iterable[int]) -> str:
        """Text of ids; special tokens stay visible."""
        return self.inner.decode([int(i) for i in ids], skip_special_tokens=False)

    def to_bytes(self) -> bytes:
        """The tokenizer as the JSON of the `tokenizers` library."""
        return self.inner.to_str().encode()

    def save(self, path: str | Path) -> None:
        """Writes the JSON to a local file."""
        Path(path).write_bytes(self.to_bytes())

    @classmethod
    def from_bytes(cls, data: bytes) -> TextTokenizer:
        """The inverse of `to_bytes`; also reads the released file.

        Raises:
            ValueError: it is no such file, or its vocabulary cannot write any text.
        """
        from tokenizers import Tokenizer as HFTokenizer

        try:
            inner = HFTokenizer.from_str(data.decode())
            _require_letters(inner)
            found = cls(inner)
            found.encode("an unheard-of word")
        except Exception as error:
            raise ValueError(f"not a text tokenizer: {error}") from error
        return found

    @classmethod
    def load(cls, path: str | Path) -> TextTokenizer:
        """Reads a local file."""
        return cls.from_bytes(Path(path).read_bytes())


def _require_letters(inner: HFTokenizer) -> None:
    """Refuses tokens of which the normalizer leaves nothing: looking for them never ends."""
    for number, token in inner.get_added_tokens_decoder().items():
        normalizer = inner.normalizer if token.normalized else None
        if not (normalizer.normalize_str(token.content) if normalizer else token.content):
            raise ValueError(f"its token {number}, {token.content!r:.40}, holds no letter")


def _layout(bins: int, class_names: Iterable[str]) -> list[AddedToken]:
    from tokenizers import AddedToken

    normal = _empty().normalizer
    told = {name_words(name).lower() for name in class_names}
    # Matching what the tokenizer keeps nothing of would never end.
    names = sorted(name for name in told if normal.normalize_str(name).strip())
    reserved = [
        *_SPECIAL,
        *(f"[S_{i}]" for i in range(NUM_SENTINELS)),
        *(f"v{axis}={value}" for axis in range(AXES) for value in range(bins)),
    ]
    return [
        *(AddedToken(token, special=True, normalized=False) for token in reserved),
        *(AddedToken(name, special=True, single_word=True, normalized=True) for name in names),
    ]


def _empty(vocab: dict[str, int] | None = None) -> HFTokenizer:
    from tokenizers import Tokenizer as HFTokenizer
    from tokenizers import decoders, models, normalizers, pre_tokenizers

    model = models.WordPiece(vocab or {}, unk_token="[UNK]", max_input_chars_per_word=100)
    inner = HFTokenizer(model)
    inner.normalizer = normalizers.BertNormalizer(
        clean_text=True, handle_chinese_chars=True, strip_accents=None, lowercase=True
    )
    inner.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    inner.decoder = decoders.WordPiece(prefix="##", cleanup=True)
    return inner


def _pieces(corpus: list[str], size: int, min_frequency: int) -> list[str]:
    """Learned pieces in the order of their merges.

    The trainer numbers inner letters in the order of a hash table and settles ties between pairs
    by these numbers. Declaring the letters beforehand, sorted, makes the outcome reproducible.
    """
    from tokenizers import trainers

    inner = _empty()
    letters: set[str] = set()
    for sentence in corpus:
        normal = inner.normalizer.normalize_str(sentence)
        for word, _ in inner.pre_tokenizer.pre_tokenize_str(normal):
            letters.update(word[1:])
    trainer = trainers.WordPieceTrainer(
        vocab_size=size,
        min_frequency=min_frequency,
        special_tokens=[f"##{letter}" for letter in sorted(letters)],
        show_progress=False,
    )
    inner.train_from_iterator(corpus, trainer)
    vocab = inner.get_vocab()
    return sorted(vocab, key=vocab.__getitem__)


def train_text_tokenizer(
    corpus: Iterable[str],
    *,
    class_names: Iterable[str] = (),
    bins: int = RELEASED_BINS,
    vocab_size: int = RELEASED_SIZE,
    min_frequency: int = 2,
    words: Iterable[str] = (),
) -> TextTokenizer:
    """Learns ordinary pieces from a corpus; the same corpus gives the same bytes.

    Args:
        corpus: Sentences; their order does not matter.
        class_names: Names that become one token each.
        bins: Coordinate bins per axis.
        vocab_size: Upper bound of the vocabulary, layout included.
        min_frequency: Least count of a pair of pieces that is merged.
        words: Ordinary words in lower case that become one piece each, whatever the corpus.

    Raises:
        ValueError: if the layout leaves no room for words.
    """
    layout = _layout(bins, class_names)
    tokens = dict.fromkeys(token.content for token in layout)
    own = sorted(set(words) - tokens.keys())
    room = vocab_size - len(layout) - len(own)
    if bins < 2 or room <= 0:
        reserved = len(layout) + len(own)
        raise ValueError(
            f"vocab_size={vocab_size} must exceed the {reserved} reserved ids of bins={bins}"
        )
    tokens.update(dict.fromkeys(_pieces(sorted(corpus), room, min_frequency)))
    tokens.update(dict.fromkeys(own))
    inner = _empty({token: i for i, token in enumerate(tokens)})
    inner.add_special_tokens(layout)
    return TextTokenizer(inner)
