"""A random Qwen3-MoE checkpoint whose router has planted affinity, of any size and KV ratio.

    python scripts/planted_model.py out/planted --hidden-size 512 --top-k 4 --kv-ratio 0.125

It stands in for models too large for this machine where only their shape matters: its weights are
random, and its affinity is put there. Tokens belong to clusters; a token's embedding leans towards
its cluster's direction, attention and experts change the residual stream little, and at every layer
each expert's row of the router leans towards one cluster, another grouping at every layer. A
router's logits are thus `strength` for the experts of the token's cluster, plus noise of deviation
one that is the token's own. The output layer lets every token be followed by one of two, and the
hidden state chooses, so greedy tokens wander over all clusters and depend on every expert.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen3MoeConfig, Qwen3MoeForCausalLM

if TYPE_CHECKING:
    from torch import Tensor

VOCABULARY = 256
HEAD_DIM = 32
LEANING = 0.6  # cosine of a token's embedding with its cluster's direction
ATTENTION_SCALE = 0.3
EXPERT_SCALE = 0.3


@dataclass(frozen=True, kw_only=True)
class Shape:
    """What is planted.

    Attributes:
        hidden_size: elements of a row.
        num_layers: all of them MoE layers.
        num_experts: of a layer; a multiple of `clusters`.
        top_k: experts a token.
        expert_size: inner size of an expert.
        kv_ratio: K and V elements of a token and layer, over the hidden size.
        clusters: of tokens.
        strength: how far a cluster's experts stand out of noise of deviation one.
        seed: of everything random.
    """

    hidden_size: int = 512
    num_layers: int = 6
    num_experts: int = 32
    top_k: int = 4
    expert_size: int = 64
    kv_ratio: float = 0.125
    clusters: int = 8
    strength: float = 2.0
    seed: int = 0

    def __post_init__(self) -> None:
        heads, kv_heads = self.hidden_size / HEAD_DIM, self.num_kv_heads
        wanted = self.kv_ratio * self.hidden_size
        if kv_heads < 1 or heads % kv_heads or abs(self.kv_elements - wanted) > 0.5:
            step = 2 * HEAD_DIM / self.hidden_size
            msg = f"kv_ratio must be {step:g} times a divisor of {heads:g}, got {self.kv_ratio}"
            raise SystemExit(msg)
        if self.num_experts % self.clusters or VOCABULARY % self.clusters:
            msg = f"clusters must divide experts and {VOCABULARY}, got {self.clusters}"
            raise SystemExit(msg)

    @property
    def num_kv_heads(self) -> int:
        """Heads of keys, and as many of values."""
        return round(self.kv_ratio * self.hidden_size) // (2 * HEAD_DIM)

    @property
    def kv_elements(self) -> int:
        """K and V elements of a token at a layer."""
        return 2 * HEAD_DIM * self.num_kv_heads


def write_model(folder: Path, shape: Shape) -> None:
    """Write the checkpoint, with a tokenizer of bytes and what was planted."""
    torch.manual_seed(shape.seed)
    model = Qwen3MoeForCausalLM(configuration(shape)).eval()
    with torch.no_grad():
        plant(model, shape)
    model.save_pretrained(folder)
    save_tokenizer(folder)
    note = {"planted": "random weights, planted affinity", **asdict(shape)}
    (folder / "planted.json").write_text(json.dumps(note) + "\n", encoding="utf-8")


def configuration(shape: Shape) -> Qwen3MoeConfig:
    """The model's configuration."""
    return Qwen3MoeConfig(
        vocab_size=VOCABULARY,
        hidden_size=shape.hidden_size,
        num_hidden_layers=shape.num_layers,
        num_attention_heads=shape.hidden_size // HEAD_DIM,
        num_key_value_heads=shape.num_kv_heads,
        head_dim=HEAD_DIM,
        num_experts=shape.num_experts,
        num_experts_per_tok=shape.top_k,
        moe_intermediate_size=shape.expert_size,
        intermediate_size=shape.expert_size,
        norm_topk_prob=True,
        tie_word_embeddings=False,
        max_position_embeddings=4096,
        bos_token_id=None,
        eos_token_id=0,
        pad_token_id=None,
    )


def plant(model: Qwen3MoeForCausalLM, shape: Shape) -> None:
    """Set all weights."""
    size = shape.hidden_size
    directions = torch.linalg.qr(torch.randn(size, shape.clusters))[0].T
    cluster = torch.arange(VOCABULARY) % shape.clusters
    own = torch.nn.functional.normalize(torch.randn(VOCABULARY, size), dim=1)
    embedding = LEANING * directions[cluster] + (1 - LEANING**2) ** 0.5 * own
    model.model.embed_tokens.weight.copy_(size**0.5 * embedding)
    model.lm_head.weight.copy_(followers(embedding))
    for layer in model.model.layers:
        plant_attention(layer.self_attn, size)
        layer.mlp.gate.weight.copy_(router(directions, shape))
        plant_experts(layer.mlp.experts, shape)


def followers(embedding: Tensor) -> Tensor:
    """(V, D) output rows: two permutations say which tokens may follow which."""
    rows = torch.zeros_like(embedding)
    for _ in range(2):
        rows[torch.randperm(VOCABULARY)] += embedding
    return rows


def router(directions: Tensor, shape: Shape) -> Tensor:
    """(E, D) rows: a random grouping of experts into clusters, and noise."""
    cluster = (torch.arange(shape.num_experts) % shape.clusters)[torch.randperm(shape.num_experts)]
    planted = shape.strength / (LEANING * shape.hidden_size**0.5) * directions[cluster]
    return planted + torch.randn(shape.num_experts, shape.hidden_size) / shape.hidden_size**0.5


def plant_attention(attention: torch.nn.Module, size: int) -> None:
    """Random, with a small output."""
    for name in ("q_proj", "k_proj", "v_proj"):
        attention.get_submodule(name).weight.normal_(std=size**-0.5)
    output = attention.get_submodule("o_proj").weight
    output.normal_(std=ATTENTION_SCALE * output.shape[1] ** -0.5)


def plant_experts(experts: torch.nn.Module, shape: Shape) -> None:
    """Random, with a small output: the gate's weights add up to one."""
    experts.get_parameter("gate_up_proj").normal_(std=shape.hidden_size**-0.5)
    spread = (0.36 * shape.expert_size) ** -0.5  # of silu(x) * y for normal x and y
    experts.get_parameter("down_proj").normal_(std=EXPERT_SCALE * spread)


def save_tokenizer(folder: Path) -> None:
    """One token a byte."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({letter: i for i, letter in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(folder)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    for name, value in asdict(Shape()).items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=type(value), default=value)
    options = vars(parser.parse_args())
    folder = options.pop("folder")
    write_model(folder, Shape(**options))
    print(json.dumps(json.loads((folder / "planted.json").read_text(encoding="utf-8"))))


if __name__ == "__main__":
    main()
