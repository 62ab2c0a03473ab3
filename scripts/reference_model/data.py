"""Corpus to tokens: the byte-level BPE tokenizer, the token file, and batches as a function of a position."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor

from exflow.corpus import read_documents

if TYPE_CHECKING:
    from pathlib import Path

    from numpy.typing import NDArray

END_OF_TEXT = "<|endoftext|>"
WORD = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def train_tokenizer(texts: list[str], vocab_size: int) -> Tokenizer:
    """Byte-level BPE; every digit is a token of its own, <|endoftext|> is token 0."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(WORD), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def encode(tokenizer: Tokenizer, texts: list[str]) -> NDArray[np.uint16]:
    """All texts in one row of tokens, each after an <|endoftext|>."""
    pieces = []
    for start in range(0, len(texts), 500):
        encodings = tokenizer.encode_batch_fast(texts[start : start + 500])
        pieces += [np.array([0, *encoding.ids], dtype=np.uint16) for encoding in encodings]
    return np.concatenate(pieces)


def prepare(corpus: list[str], heldout: list[str], folder: Path, vocab_size: int) -> None:
    """Make `tokenizer.json`, `train.npy` and `heldout.npy` in `folder`, unless they are there.

    The tokenizer is trained on every other document of the corpus.
    """
    if (folder / "heldout.npy").exists():
        return
    folder.mkdir(parents=True, exist_ok=True)
    texts = [document.text for document in read_documents(corpus)]
    tokenizer = train_tokenizer(texts[::2], vocab_size)
    tokenizer.save(str(folder / "tokenizer.json"))
    np.save(folder / "train.npy", encode(tokenizer, texts))
    texts = [document.text for document in read_documents(heldout)]
    np.save(folder / "heldout.npy", encode(tokenizer, texts))


class Batches:
    """Rows of `length` + 1 tokens, in an order drawn anew for every epoch."""

    def __init__(self, tokens: NDArray[np.uint16], seed: int) -> None:
        self.tokens = tokens
        self.seed = seed
        self.drawn: tuple[int, int] | None = None

    def take(
        self, epoch: int, start: int, *, rows: int, length: int
    ) -> tuple[Tensor, tuple[int, int]]:
        """The rows at a position, and the position after them."""
        if self.drawn != (epoch, length):
            rng = np.random.default_rng((self.seed, epoch))
            self.offset = int(rng.integers(length))
            self.order = rng.permutation((len(self.tokens) - self.offset - 1) // length)
            self.drawn = (epoch, length)
        chosen = self.order[start : start + rows]
        if len(chosen) < rows:
            return self.take(epoch + 1, 0, rows=rows, length=length)
        at = self.offset + chosen[:, None] * length + np.arange(length + 1)
        return torch.from_numpy(self.tokens[at].astype(np.int64)), (epoch, start + rows)
