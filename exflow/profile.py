"""Profiling: which experts a model uses on a corpus, recorded as a RoutingTrace.

Every rank reads the corpus and makes the same batches; it runs those that are its own, and keeps
each as a part next to the output. When all are done, rank 0 joins the parts.

The trace does not depend on the number of ranks, nor on interruptions. Another batch size rounds
differently: the last bit of gate weights, and the choice where two experts are as good as tied.
"""

from __future__ import annotations

import logging
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import numpy as np
import torch

from exflow.assets import resolve_model
from exflow.corpus import CorpusStats, find_shards, read_documents
from exflow.models.foretelling import can_tell_apart, sample_vocabulary
from exflow.profiling.batches import Batch, Budget, TokenizedText, make_batches
from exflow.profiling.checkpoint import choose_device, fingerprint, load_model, load_tokenizer
from exflow.profiling.parts import PartsFolder
from exflow.profiling.passes import (
    Mode,
    foretell,
    run_decode,
    run_teacher_forced,
    vocabulary_of,
)
from exflow.profiling.recorder import RoutingRecorder
from exflow.runtime.ranks import Ranks
from placement.errors import UserError
from placement.output import check_writable
from placement.trace import RoutingTrace

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from tqdm import tqdm
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

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
    device: str = "auto",
    overwrite: bool = False,
    ranks: Ranks | None = None,
) -> RoutingTrace | None:
    """Records the routing of a corpus and writes it to `output`.

    Args:
        model_name: A bundled model, a folder or a hub id.
        corpus: Files, folders or globs of Pile-format shards.
        output: The trace to write; parts are kept in `<output>.parts` until it is whole.
        options: What to record.
        device: Where the model runs: "auto", "cpu", "cuda" or "cuda:N".
        overwrite: Replace the output if it is there, and parts of a run with other arguments.
        ranks: The processes that share the work, as torchrun tells if None.

    Returns:
        The trace on rank 0, None on the others.

    Raises:
        UserError: What is wrong with the model, the corpus, the options or the parts; on all ranks.
    """
    ranks = ranks or Ranks.from_environment()
    here = torch.device("cpu")
    with ranks.connected(here):
        with ranks.agreeing(here):
            _check_output(output, overwrite=overwrite)
            run = _open(
                model_name, corpus, output, options, choose_device(device, ranks.local_rank)
            )
            if ranks.is_first:
                check_writable(output)
                run.parts.open(run.manifest, overwrite=overwrite)
        try:
            with ranks.agreeing(here):
                run.parts.open(run.manifest)
                num_batches = _record_share(run, ranks)
        except UserError:
            if ranks.is_first and run.parts.is_empty():  # nothing to go on with: bind nobody
                run.parts.remove()
            raise
        if not ranks.is_first:
            return None
        trace = run.parts.merge(num_batches)
        if not _can_tell_apart(run):
            trace = replace(trace, foretold_ids=None)
        trace.save(output)
        run.parts.remove()
        return trace


@dataclass(frozen=True, kw_only=True)
class _Run:
    """All that recording needs, checked and open."""

    name: str
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    shards: Sequence[Path]
    recorder: RoutingRecorder
    parts: PartsFolder
    options: ProfileOptions
    manifest: Mapping[str, Any]
    stats: CorpusStats = field(default_factory=CorpusStats)


def _check_output(output: Path, *, overwrite: bool) -> None:
    if output.exists() and not overwrite:
        msg = f"{output} is there already; give --overwrite to replace it, or another -o"
        raise ProfileError(msg)


def _open(
    model_name: str, corpus: Sequence[str], output: Path, options: ProfileOptions, device: str
) -> _Run:
    folder = resolve_model(model_name)
    model = load_model(folder, device=device, dtype=options.dtype)
    shards = find_shards(corpus)
    name = _short_name(model_name)
    return _Run(
        name=name,
        model=model,
        tokenizer=load_tokenizer(folder),
        shards=shards,
        recorder=RoutingRecorder(model),
        parts=PartsFolder(output),
        options=options,
        manifest=_manifest(name, fingerprint(folder), shards, options),
    )


def _record_share(run: _Run, ranks: Ranks) -> int:
    """Records this rank's batches that are not finished yet; the number of all batches."""
    num_batches = 0
    with run.recorder, _progress(run.options, ranks) as progress:
        for batch in make_batches(_texts(run), run.options.batch_size):
            num_batches += 1
            if batch.number % ranks.num_ranks != ranks.rank:
                continue
            if not run.parts.has(batch.number):
                run.parts.save(batch.number, _record(run, batch))
            progress.update(sum(_cost(text, run.options) for text in batch.texts))
    if run.stats.skipped and ranks.is_first:
        logger.warning(
            "%d bad lines skipped, first: %s", len(run.stats.skipped), run.stats.skipped[0]
        )
    if num_batches == 0:
        names = ", ".join(str(shard) for shard in run.shards)
        msg = f"{names}: every document is empty; there is nothing to profile"
        raise ProfileError(msg)
    return num_batches


def _texts(run: _Run) -> Iterator[TokenizedText]:
    """The texts to run, the same on every rank: whole documents until the budget is spent."""
    options = run.options
    documents = read_documents(
        run.shards,
        subsets=options.subsets or None,
        skip_bad_lines=options.skip_bad_lines,
        stats=run.stats,
    )
    budget = Budget(total=options.tokens, per_subset=options.tokens_per_subset)
    for document in documents:
        if budget.is_spent(options.subsets):
            return
        left = budget.left(document.subset)
        if left == 0:
            continue
        token_ids = run.tokenizer(
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


def _record(run: _Run, batch: Batch) -> RoutingTrace | None:
    """Runs a batch: its part of the trace, None if it recorded no token."""
    if run.options.mode == "decode":
        recorded = run_decode(run.model, run.recorder, batch, new_tokens=run.options.new_tokens)
    else:
        recorded = run_teacher_forced(run.model, run.recorder, batch)
    if len(recorded.text) == 0:
        return None
    token_ids, index = np.unique(recorded.token_ids, return_inverse=True)
    foretold_ids = foretell(run.model, run.recorder, token_ids)[index]
    domains = tuple(sorted({text.subset for text in batch.texts}))
    sequence_of_text = np.array([text.index for text in batch.texts], dtype=np.int32)
    domain_of_text = np.array([domains.index(text.subset) for text in batch.texts], dtype=np.uint8)
    return RoutingTrace(
        expert_ids=recorded.expert_ids,
        sequence_ids=sequence_of_text[recorded.text],
        num_experts=run.recorder.num_experts,
        model=run.name,
        layer_ids=run.recorder.layer_ids,
        positions=recorded.positions,
        expert_weights=recorded.expert_weights,
        domain_ids=domain_of_text[recorded.text],
        domains=domains,
        foretold_ids=foretold_ids,
        phase=run.options.mode,
    )


def _can_tell_apart(run: _Run) -> bool:
    """Whether foretelling is any use, as the runtime judges it."""
    with run.recorder:
        sample = sample_vocabulary(vocabulary_of(run.model))
        return can_tell_apart(foretell(run.model, run.recorder, sample))


def _short_name(model_name: str) -> str:
    """A folder's last name, else the name as given: a trace tells nothing of this machine."""
    path = Path(model_name).expanduser()
    return path.resolve().name if path.exists() else model_name


def _manifest(
    name: str, checkpoint: list[list[Any]], shards: Sequence[Path], options: ProfileOptions
) -> dict[str, Any]:
    return {
        "format": "exflow.parts/2",
        "model": name,
        "checkpoint": checkpoint,
        "corpus": [[shard.name, shard.stat().st_size] for shard in shards],
        **{k: list(v) if isinstance(v, tuple) else v for k, v in asdict(options).items()},
    }


def _progress(options: ProfileOptions, ranks: Ranks) -> tqdm[NoReturn]:
    """A bar over this rank's share of tokens: on rank 0, and only on a terminal."""
    from tqdm import tqdm

    total = options.tokens // ranks.num_ranks if options.tokens else None
    return tqdm(total=total, unit="token", desc="profile", disable=None if ranks.is_first else True)
