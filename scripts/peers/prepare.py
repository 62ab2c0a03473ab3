"""Prompts of one length from a corpus, and the unsharded model's greedy tokens for each.

python -m scripts.peers.prepare CHECKPOINT CORPUS -o prompts.jsonl --requests 64 --steps 9
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import AutoTokenizer

from exflow.corpus import read_documents
from scripts.peers.hf_decode import greedy, load_model

if TYPE_CHECKING:
    from collections.abc import Iterator

LONGEST_TEXT = 20_000


def main() -> None:
    """Write prompts with their token ids and the expected tokens."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("corpus", type=Path)
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--requests", type=int, default=64)
    parser.add_argument("--prompt-tokens", type=int, default=24)
    parser.add_argument("--steps", type=int, default=9)
    args = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(args.checkpoint)
    found = windows(tokenizer, args.corpus, args.prompt_tokens)
    chosen = [prompt for prompt, _ in zip(found, range(args.requests), strict=False)]
    if len(chosen) < args.requests:
        parser.error(f"{args.corpus} has text for {len(chosen)} prompts only")
    ids = torch.tensor([token_ids for _, token_ids in chosen])
    expected, _ = greedy(load_model(args.checkpoint), ids, args.steps)
    lines = [
        json.dumps({"id": index, "prompt": text, "token_ids": token_ids, "expected": tokens})
        for index, ((text, token_ids), tokens) in enumerate(
            zip(chosen, expected.tolist(), strict=True)
        )
    ]
    args.output.write_text("\n".join(lines) + "\n", encoding="utf-8")


def windows(tokenizer: Any, corpus: Path, length: int) -> Iterator[tuple[str, list[int]]]:
    """Pieces of text that are read as so many tokens, the first of every document first."""
    texts = [document.text[:LONGEST_TEXT] for document in read_documents([corpus])]
    documents = [tokenizer(text, verbose=False)["input_ids"] for text in texts]
    for start in range(0, max(map(len, documents)), length):
        for ids in documents:
            text = tokenizer.decode(ids[start : start + length])
            again = tokenizer(text)["input_ids"]
            if len(again) == length:
                yield text, again


if __name__ == "__main__":
    main()
