"""Profiling: which experts a model uses on a corpus, recorded as a RoutingTrace.

Every rank reads the corpus and makes the same batches; it runs those that are its own, and keeps
each as a part next to the output. When all are done, rank 0 joins the parts.
"""

from __future__ import annotations

import logging
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import numpy as np

from exflow.assets import resolve_model
from exflow.profiling.batches import Batch, Budget, TokenizedText, make_batches
from exflow.profiling.checkpoint import fingerprint, load_model, load_tokenizer
from exflow.profiling.parts import PartsFolder
from exflow.profiling.passes import Mode, RecordedTokens, run_decode, run_teacher_forced
from exflow.profiling.recorder import RoutingRecorder
from placement.errors import UserError
from placement.trace import RoutingTrace

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from tqdm import tqdm
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

MAX_SUBSETS = 256
DTYPES = ("auto", "float32", "bfloat16", "float16")
MODES: tuple[Mode, ...] = ("teacher-forced", "decode")

logger = logging.getLogger(__name__)


class ProfileError(UserError):
    """Options or a corpus that cannot be profiled."""


@dataclass(frozen=True, kw_only=True)
class ProfileOptions:
    """What to record. These settle the trace; the number of ranks and the device do not.

    Attributes:
        mode: "teacher-forced" records every token of the texts; "decode" takes their beginnings as
            prompts and records the tokens the model goes on with.
        subsets: Only these Pile subsets; all if empty.
        tokens: Stop after so many recorded tokens; None for no limit.
        tokens_per_subset: Stop after so many in each subset; None for no limit.
        max_length: Tokens of a text that are read, from its beginning.
        prompt_tokens: Tokens of a prompt, in mode "decode".
        new_tokens: Tokens to record after each prompt, in mode "decode".
        batch_size: Texts that run together.
        dtype: Number format; "auto" is float32 on a CPU and the checkpoint's own on a GPU.
        skip_bad_lines: Pass over lines of the corpus that cannot be read.
    """

    mode: Mode = "teacher-forced"
    subsets: tuple[str, ...] = ()
    tokens: int | None = None
    tokens_per_subset: int | None = None
    max_length: int = 512
    prompt_tokens: int = 64
    new_tokens: int = 64
    batch_size: int = 8
    dtype: str = "auto"
    skip_bad_lines: bool = False

    def __post_init__(self) -> None:
        for name, choices in (("mode", MODES), ("dtype", DTYPES)):
            if getattr(self, name) not in choices:
                msg = f"--{name} must be one of {', '.join(choices)}; got {getattr(self, name)!r}"
                raise ProfileError(msg)
        counts = ("tokens", "tokens_per_subset", "max_length", "prompt_tokens", "new_tokens")
        for name in (*counts, "batch_size"):
            value = getattr(self, name)
            if value is not None and value < 1:
                msg = f"--{name.replace('_', '-')} must be at least 1, got {value}"
                raise ProfileError(msg)

    @property
    def tokens_read(self) -> int:
        """Tokens of a text that the model is given."""
        return self.prompt_tokens if self.mode == "decode" else self.max_length


def profile(
    model_name: str,
    corpus: Sequence[str],
    output: Path,
    *,
    options: ProfileOptions,
    device: str = "cpu",
    rank: int = 0,
    world_size: int = 1,
    agree: Callable[[UserError | None], None] | None = None,
) -> RoutingTrace | None:
    """Records the routing of a corpus and writes it to `output`.

    Args:
        model_name: A bundled model, a folder or a hub id.
        corpus: Files, folders or globs of Pile-format shards.
        output: The trace to write; parts are kept in `<output>.parts` until it is whole.
        options: What to record.
        device: Where the model runs.
        rank: This process.
        world_size: Processes that share the work.
        agree: Waits for all ranks and raises on each if any met an error.

    Returns:
        The trace on rank 0, None on the others.

    Raises:
        UserError: What is wrong with the model, the corpus, the options or the parts.
    """
    parts = PartsFolder(output)
    error: UserError | None = None
    num_batches = 0
    try:
        num_batches = _record_share(
            model_name, corpus, parts, options=options, device=device, rank=rank, world=world_size
        )
    except UserError as caught:
        error = caught
    if agree is not None:
        agree(error)
    if error is not None:
        raise error
    if rank != 0:
        return None
    trace = parts.merge(num_batches)
    trace.save(output)
    parts.remove()
    return trace


def _record_share(
    model_name: str,
    corpus: Sequence[str],
    parts: PartsFolder,
    *,
    options: ProfileOptions,
    device: str,
    rank: int,
    world: int,
) -> int:
    """Records this rank's batches that are not finished yet; the number of all batches."""
    from exflow.corpus import find_shards

    folder = resolve_model(model_name)
    shards = find_shards(corpus)
    tokenizer = load_tokenizer(folder)
    model = load_model(folder, device=device, dtype=options.dtype)
    recorder = RoutingRecorder(model)
    parts.open(_manifest(model_name, folder, shards, options))
    num_batches = 0
    with recorder, _progress(options, world, show=rank == 0) as progress:
        for batch in make_batches(_texts(shards, tokenizer, options), options.batch_size):
            num_batches += 1
            if batch.number % world != rank:
                continue
            if not parts.has(batch.number):
                recorded = _run(model, recorder, batch, options)
                parts.save(batch.number, _trace(batch, recorded, recorder, model_name, options))
            progress.update(sum(_cost(text, options) for text in batch.texts))
    if num_batches == 0:
        only = f" in the subsets {', '.join(options.subsets)}" if options.subsets else ""
        msg = f"no text to profile in {', '.join(corpus)}{only}"
        raise ProfileError(msg)
    return num_batches


def _texts(
    shards: Sequence[Path], tokenizer: PreTrainedTokenizerBase, options: ProfileOptions
) -> Iterator[TokenizedText]:
    """The texts to run, the same on every rank: whole documents until the budget is spent."""
    from exflow.corpus import read_documents

    documents = read_documents(
        shards, subsets=options.subsets or None, skip_bad_lines=options.skip_bad_lines
    )
    budget = Budget(total=options.tokens, per_subset=options.tokens_per_subset)
    for document in documents:
        if budget.is_spent(options.subsets):
            return
        left = budget.left(document.subset)
        if left == 0:
            continue
        token_ids = tokenizer(
            document.text, truncation=True, max_length=options.tokens_read
        ).input_ids
        text = TokenizedText(
            index=document.index, subset=document.subset, token_ids=tuple(token_ids)
        )
        if options.mode == "teacher-forced":
            text = text.shortened(left)
        if text.token_ids:
            budget.spend(text.subset, _cost(text, options))
            yield text


def _cost(text: TokenizedText, options: ProfileOptions) -> int:
    """Tokens a text adds to the trace (at most, when decoding)."""
    return options.new_tokens if options.mode == "decode" else len(text.token_ids)


def _run(
    model: PreTrainedModel, recorder: RoutingRecorder, batch: Batch, options: ProfileOptions
) -> RecordedTokens:
    if options.mode == "decode":
        return run_decode(model, recorder, batch, new_tokens=options.new_tokens)
    return run_teacher_forced(model, recorder, batch)


def _trace(
    batch: Batch,
    recorded: RecordedTokens,
    recorder: RoutingRecorder,
    model_name: str,
    options: ProfileOptions,
) -> RoutingTrace | None:
    """A batch's part of the trace; None if it recorded no token."""
    if len(recorded.text) == 0:
        return None
    domains = tuple(sorted({text.subset for text in batch.texts}))
    sequence_of_text = np.array([text.index for text in batch.texts], dtype=np.int32)
    domain_of_text = np.array([domains.index(text.subset) for text in batch.texts], dtype=np.uint8)
    return RoutingTrace(
        expert_ids=recorded.expert_ids,
        sequence_ids=sequence_of_text[recorded.text],
        num_experts=recorder.num_experts,
        model=_short_name(model_name),
        layer_ids=recorder.layer_ids,
        positions=recorded.positions,
        expert_weights=recorded.expert_weights,
        domain_ids=domain_of_text[recorded.text],
        domains=domains,
        phase=options.mode,
    )


def _short_name(model_name: str) -> str:
    """A folder's last name, else the name as given: a trace tells nothing of this machine."""
    path = Path(model_name).expanduser()
    return path.resolve().name if path.exists() else model_name


def _manifest(
    model_name: str, folder: str, shards: Sequence[Path], options: ProfileOptions
) -> dict[str, Any]:
    return {
        "format": "exflow.parts/1",
        "model": _short_name(model_name),
        "checkpoint": fingerprint(folder),
        "corpus": [[shard.name, shard.stat().st_size] for shard in shards],
        **{name: list(v) if isinstance(v, tuple) else v for name, v in asdict(options).items()},
    }


def _progress(options: ProfileOptions, world: int, *, show: bool) -> tqdm[NoReturn]:
    """A bar over this rank's share of tokens: on rank 0, and only on a terminal."""
    from tqdm import tqdm

    total = options.tokens // world if options.tokens else None
    return tqdm(total=total, unit="token", desc="profile", disable=None if show else True)


def profile_here(
    model_name: str, corpus: Sequence[str], output: Path, *, options: ProfileOptions, device: str
) -> RoutingTrace | None:
    """Profiles with the processes that torchrun started, or alone: `profile` with this rank."""
    import os

    import torch.distributed as dist

    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    local_rank = int(os.environ.get("LOCAL_RANK", 0))

    def agree(error: UserError | None) -> None:
        from datetime import timedelta

        if world == 1:
            return
        if not dist.is_initialized():
            dist.init_process_group("gloo", timeout=timedelta(days=30))
        errors: list[str | None] = [None] * world
        dist.all_gather_object(errors, None if error is None else str(error))
        if error is None and any(errors):
            raise ProfileError(next(e for e in errors if e))

    from exflow.profiling.checkpoint import choose_device

    trace = profile(
        model_name,
        corpus,
        output,
        options=options,
        device=choose_device(device, local_rank),
        rank=rank,
        world_size=world,
        agree=agree,
    )
    if trace is not None:
        logger.info(
            "%s: %d tokens of %d documents, %d MoE layers, top-%d of %d experts",
            output,
            trace.num_tokens,
            trace.num_sequences,
            trace.num_layers,
            trace.top_k,
            trace.num_experts,
        )
    return trace
