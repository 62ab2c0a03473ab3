"""`exflow run` on two ranks: resuming, and mistakes that every rank reports without hanging."""

import json
import os
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from exflow.assets import BUNDLED_MODELS, resolve_model
from exflow.runtime.engine import EngineOptions
from exflow.runtime.job import Job, run_job
from exflow.runtime.kv_budget import KvBudget
from exflow.runtime.model import ModelOptions, routing_for
from exflow.runtime.protocol_choice import rank_protocols
from exflow.runtime.requests import SamplingParams
from harness import run_ranks
from placement.plan import PlacementPlan, Strategy
from placement.timing import Links, Shape
from placement.topology import Topology
from placement.trace import RoutingTrace
from tiny_checkpoints import decode_with_transformers, qwen3_moe, save_byte_tokenizer

pytestmark = pytest.mark.distributed

LINES = [
    {"id": "a", "prompt": "The quick brown fox"},
    {"text": "In the beginning", "meta": {"pile_set_name": "Books"}},
    {"id": 17, "text": "x" * 300},
    {"prompt": "2 + 2 ="},
]

FINISHED = (
    json.dumps(
        {
            "id": "a",
            "prompt": "The quick brown fox",
            "text": "",
            "token_ids": [1],
            "finish_reason": "length",
        }
    )
    + "\n"
)

REFUSED = (
    json.dumps(
        {"id": 3, "prompt": "2 + 2 =", "text": "", "token_ids": [], "finish_reason": "refused"}
    )
    + "\n"
)

PLAN = {
    "format": "exflow.plan/1",
    "model": "tiny",
    "num_experts": 8,
    "layer_ids": [0, 1],
    "topology": {"num_nodes": 1, "ranks_per_node": 2},
    "strategy": {"name": "test"},
    "slots": [[[0, 1, 2, 3], [4, 5, 6, 7]]] * 2,
}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("job") / "tiny"
    qwen3_moe(folder, vocab_size=256, num_hidden_layers=2)
    save_byte_tokenizer(folder)
    return folder


@pytest.fixture
def job(model, tmp_path):
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps(line) + "\n" for line in LINES))

    def make_job(**changes):
        options = {"model": str(model)}
        for name in ("model", "plan", "engine", "dtype", "routing", "links"):
            if name in changes:
                options[name] = changes.pop(name)
        defaults = {
            "prompts": prompts,
            "output": tmp_path / "out" / "completions.jsonl",
            "sampling": SamplingParams(max_tokens=4),
        }
        return Job(model=ModelOptions(**options), **(defaults | changes))

    return make_job


def try_jobs(jobs):
    """What each job ends with on this rank: None, or the error's class and message."""
    return [try_job(job) for job in jobs]


def try_job(job):
    try:
        run_job(job)
    except ValueError as error:
        return type(error).__name__, str(error)
    return None


def read(path):
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


def test_a_job_writes_completions_metrics_and_a_trace(job, tmp_path):
    """Then it is run again with a torn output, as a killed run leaves it."""
    job = job(metrics=tmp_path / "metrics.json", trace=tmp_path / "trace.safetensors")
    assert run_ranks(2, try_jobs, [job]) == [[None]] * 2
    lines = {line["id"]: line for line in read(job.output)}
    assert set(lines) == {"a", 1, 17, 3}
    refused = lines.pop(17)
    assert refused["finish_reason"] == "refused"
    assert "300 tokens, the model takes 256" in refused["reason"]
    for line in lines.values():
        assert len(line["token_ids"]) == 4
        assert line["finish_reason"] == "length"
    metrics = json.loads(job.metrics.read_text())
    assert metrics["measured_equals_predicted"] is True
    assert metrics["requests"] == {"finished": 3, "refused": 1, "skipped": 0}
    assert metrics["tokens"] == {"prompt": 19 + 16 + 7, "generated": 12}
    trace = RoutingTrace.load(job.trace)
    assert sorted(set(trace.sequence_ids.tolist())) == [0, 1, 3]
    assert trace.num_tokens == 3 * 3

    whole = job.output.read_text()
    first = whole.splitlines(keepends=True)[:2]
    job.output.write_text("".join(first) + '{"id": "a", "pro')
    assert run_ranks(2, try_jobs, [job]) == [[None]] * 2
    assert sorted(job.output.read_text().splitlines()) == sorted(whole.splitlines())
    skipped = {json.loads(line)["id"] for line in first}
    metrics = json.loads(job.metrics.read_text())
    assert metrics["requests"]["skipped"] == len(skipped)
    assert metrics["requests"]["finished"] == len({"a", 1, 3} - skipped)


def test_every_mistake_is_reported_on_every_rank(job, model, tmp_path):
    def write(name, content):
        path = tmp_path / name
        path.write_text(content if isinstance(content, str) else json.dumps(content))
        return path

    four = {"topology": {"num_nodes": 1, "ranks_per_node": 4}}
    two_each = [[[0, 1], [2, 3], [4, 5], [6, 7]]] * 2
    blocked = write("a-file", "")
    mistakes = {
        "for 4 ranks, this job has 2": {
            "plan": write("four.json", PLAN | four | {"slots": two_each})
        },
        "the plan was made for other": {"plan": write("other.json", PLAN | {"model": "other"})},
        "no copy of experts [7]": {
            "plan": write("missing.json", PLAN | {"slots": [[[0, 1, 2, 3], [4, 5, 6]]] * 2})
        },
        "2 MoE layers of 4 experts": {
            "plan": write("small.json", PLAN | {"num_experts": 4, "slots": [[[0, 1], [2, 3]]] * 2})
        },
        "format is 'eplb/1', expected": {"plan": write("format.json", PLAN | {"format": "eplb/1"})},
        "no such plan": {"plan": tmp_path / "nowhere.json"},
        "cannot be read as prompts": {"prompts": tmp_path / "nowhere.jsonl"},
        "no prompts": {"prompts": write("empty.jsonl", "\n")},
        "line 1: not JSON": {"prompts": write("broken.jsonl", "{\n")},
        "a coherence domain of 3 ranks does not divide 2": {
            "engine": EngineOptions(coherence_domain=3)
        },
        "use --protocol coherent without --coherence-domain": {
            "engine": EngineOptions(protocol="home", dispatch="replicated")
        },
        "the KV memory holds no page": {"engine": EngineOptions(kv_budget=KvBudget(tokens=15))},
        "cannot be written": {"output": blocked / "completions.jsonl"},
        "not a completion": {"output": write("else.jsonl", "[1]\n")},
        "line 3: not a completion": {
            "output": write("other.jsonl", FINISHED + REFUSED + '{"prompt": "a"}\n')
        },
        "of another prompt with the id 'a'": {
            "output": write(
                "same-ids.jsonl", FINISHED.replace("quick", "slow") + REFUSED + '{"id": 5, "pro'
            )
        },
        "its id holds half": {"prompts": write("id.jsonl", '{"prompt": "a", "id": "\\ud800"}\n')},
        "half a surrogate pair": {"prompts": write("half.jsonl", '{"prompt": "\\ud800"}\n')},
        "has no tokenizer files": {"model": str(without_tokenizer(model, tmp_path / "tiny"))},
        "not of a qwen3_moe model": {
            "model": str(configured(model, tmp_path / "odd", num_hidden_layers="two"))
        },
        "no model": {"model": "nowhere"},
        "no config.json": {"model": str(tmp_path)},
    }
    jobs = [job(**changes) for changes in mistakes.values()]
    files = {path: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()}
    outcomes = run_ranks(2, try_jobs, jobs)
    for rank, outcome in enumerate(outcomes):
        for expected, found in zip(mistakes, outcome, strict=True):
            assert found is not None, f"rank {rank} did not notice: {expected}"
            assert expected in found[1]
    assert files == {path: path.read_bytes() for path in files}


def copied(model, folder):
    shutil.copytree(model, folder)
    return folder


def without_tokenizer(model, folder):
    for path in copied(model, folder).glob("*token*"):
        path.unlink()
    return folder


def configured(model, folder, **changes):
    path = copied(model, folder) / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    return folder


def scaled(model, folder, factor):
    """The same model with other weights: the experts' times a factor."""
    path = copied(model, folder) / "model.safetensors"
    tensors = load_file(path)
    save_file({n: t * factor if ".experts." in n else t for n, t in tensors.items()}, path)
    return folder


def try_own(jobs_by_rank):
    """What jobs end with where each rank has one of its own."""
    return try_job(jobs_by_rank[int(os.environ["RANK"])])


@pytest.mark.parametrize(
    "difference",
    ["plan", "weights", "prompts", "max_tokens", "temperature", "batch_size", "protocol", "dtype",
     "metrics"],
)  # fmt: skip
def test_ranks_that_were_given_different_things_say_so(difference, job, model, tmp_path):
    shuffled = tmp_path / "shuffled.json"
    shuffled.write_text(json.dumps(PLAN | {"slots": [[[0, 1, 2, 7], [4, 5, 6, 3]]] * 2}))
    shorter = tmp_path / "shorter.jsonl"
    shorter.write_text(json.dumps(LINES[0]) + "\n")
    changes, named = {
        "plan": ({"plan": shuffled}, "plan"),
        "weights": ({"model": str(scaled(model, tmp_path / "tiny", 2))}, "model"),
        "prompts": ({"prompts": shorter}, "prompts"),
        "max_tokens": ({"sampling": SamplingParams(max_tokens=3)}, "max_tokens"),
        "temperature": ({"sampling": SamplingParams(max_tokens=4, temperature=1)}, "temperature"),
        "batch_size": ({"engine": EngineOptions(batch_size=2)}, "batch_size"),
        "protocol": ({"engine": EngineOptions(protocol="home")}, "protocol"),
        "dtype": ({"dtype": "bfloat16"}, "dtype"),
        "metrics": ({"metrics": tmp_path / "metrics.json"}, "metrics"),
    }[difference]
    outcomes = run_ranks(2, try_own, [job(), job(**changes)])
    for outcome in outcomes:
        assert outcome is not None
        assert outcome[0] == "AgreementError"
        assert f"rank 1 was not given the same {named} as rank 0" in outcome[1]
    assert not job().output.exists()


def test_a_copy_of_the_model_in_another_folder_is_the_same_model(job, model, tmp_path):
    copy = copied(model, tmp_path / "other-name")
    assert run_ranks(2, try_own, [job(), job(model=str(copy))]) == [None, None]


def test_more_memory_lets_a_refused_request_run(job):
    tight = job(
        engine=EngineOptions(kv_budget=KvBudget(tokens=32)), sampling=SamplingParams(max_tokens=40)
    )
    assert run_ranks(1, try_jobs, [tight]) == [[None]]
    refused = {line["id"]: line["reason"] for line in read(tight.output)}
    assert "there are 2; grant more" in refused["a"]
    assert len(refused) == len(LINES)
    assert run_ranks(1, try_jobs, [job()]) == [[None]]
    again = {line["id"]: line["finish_reason"] for line in read(tight.output)}
    assert again == {"a": "length", 1: "length", 17: "refused", 3: "length"}
    assert len(read(tight.output)) == len(LINES)


def test_what_cannot_run_is_refused_once_and_metrics_of_the_others_stay(job, tmp_path):
    """Nor does a run take out the refusals of prompts that are not its own."""
    first = job(metrics=tmp_path / "metrics.json")
    assert run_ranks(1, try_jobs, [first, first]) == [[None, None]]
    assert json.loads(first.metrics.read_text())["requests"]["finished"] == 3
    before = first.output.read_text()
    others = tmp_path / "others.jsonl"
    others.write_text('{"id": "b", "prompt": "More"}\n')
    assert run_ranks(1, try_jobs, [job(prompts=others)]) == [[None]]
    assert first.output.read_text().startswith(before)
    assert read(first.output)[-1]["id"] == "b"


def test_weights_that_are_no_numbers_end_the_run_on_every_rank(job, model, tmp_path):
    broken = job(model=str(scaled(model, tmp_path / "tiny", float("nan"))))
    for outcome in run_ranks(2, try_jobs, [broken]):
        assert outcome[0][0] == "EngineError"
        assert "logits are NaN or infinite at prefill step 1" in outcome[0][1]


@pytest.mark.parametrize(
    "names", [("prompts", "output"), ("output", "metrics"), ("metrics", "trace")]
)
def test_no_file_is_written_over_another_of_the_job(names, job, tmp_path):
    path = tmp_path / "one.jsonl"
    with pytest.raises(ValueError, match="are the same file"):
        job(**dict.fromkeys(names, path))


def test_auto_takes_the_cheapest_protocol_on_every_rank_and_never_changes_tokens(job, tmp_path):
    """On slow links, and on fast ones with long latencies, where small batches are replicated."""
    first = job(output=tmp_path / "first.jsonl", trace=tmp_path / "trace.safetensors")
    assert run_ranks(2, try_jobs, [first]) == [[None]] * 2
    arms = {}
    for name, latency, bandwidth in (("slow", 0, 1e3), ("far", 1, 1e12)):
        links = tmp_path / f"{name}.json"
        links.write_text(json.dumps({"intra_latency": latency, "intra_bandwidth": bandwidth}))
        arms[name] = job(
            output=tmp_path / f"{name}.jsonl",
            metrics=tmp_path / f"{name}.metrics",
            routing=first.trace,
            links=links,
        )
    # `exflow run --protocol auto` leaves "home" in the options until it has chosen.
    arms["asked"] = job(
        engine=EngineOptions(protocol="home", dispatch="replicated"),
        output=tmp_path / "asked.jsonl",
        metrics=tmp_path / "asked.metrics",
        routing=first.trace,
        links=tmp_path / "slow.json",
    )
    assert run_ranks(2, try_jobs, list(arms.values())) == [[None] * 3] * 2
    for name, arm in arms.items():
        assert {json.dumps(line) for line in read(arm.output)} == {
            json.dumps(line) for line in read(first.output)
        }
        metrics = json.loads(arm.metrics.read_text())
        assert metrics["measured_equals_predicted"] is True
        trace, plan = RoutingTrace.load(first.trace), linear_plan()
        shape = Shape(hidden_size=64, kv_elements=64, element_bytes=4, tokens_per_rank=8)
        if name == "asked":
            assert metrics["dispatch"] == "replicated"
            continue
        best = rank_protocols(
            trace,
            plan,
            shape=shape,
            links=Links.load(arm.model.links),
            dispatches=["flat", "replicated"],
        )[0]
        assert (metrics["protocol"], metrics["coherence_domain"], metrics["dispatch"]) == (
            best.protocol,
            best.coherence_domain,
            best.dispatch,
        )
        assert (best.dispatch == "replicated") == (name == "far")


def linear_plan():
    topology = Topology(num_nodes=1, ranks_per_node=2)
    slots = tuple(tuple(tuple(ranks) for ranks in layer) for layer in PLAN["slots"])
    return PlacementPlan(
        model="tiny", num_experts=8, layer_ids=(0, 1), topology=topology,
        strategy=Strategy(name="linear"), slots=slots,
    )  # fmt: skip


def test_auto_needs_a_trace():
    with pytest.raises(ValueError, match="give --routing TRACE"):
        routing_for("auto", None)
    assert routing_for("home", None) is None
    with pytest.raises(ValueError, match="leave it out"):
        routing_for("home", Path("trace.safetensors"))


def test_a_shard_that_only_one_rank_reads_and_cannot(job, model, tmp_path):
    """Expert 7 is rank 1's; it is in a shard of its own, which is cut short."""
    broken = tmp_path / "tiny"
    broken.mkdir()
    for file in model.iterdir():
        (broken / file.name).write_bytes(file.read_bytes())
    tensors = load_file(broken / "model.safetensors")
    shard_of = {name: f"{'.experts.7.' in name}.safetensors" for name in tensors}
    for shard in set(shard_of.values()):
        part = {name: tensor for name, tensor in tensors.items() if shard_of[name] == shard}
        save_file(part, broken / shard)
    (broken / "model.safetensors").unlink()
    index = broken / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": shard_of}))
    damaged = broken / "True.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:100])
    plan = tmp_path / "plan.json"
    plan.write_text(json.dumps(PLAN | {"slots": [[[0, 1, 2, 3, 4, 5, 6], [7]]] * 2}))
    first, second = run_ranks(2, try_jobs, [job(model=str(broken), plan=plan)])
    assert first[0][0] == "RankFailureError"
    assert first[0][1].startswith("rank 1 cannot go on")
    assert second[0][0] == "CheckpointError"
    assert "True.safetensors" in second[0][1]


@pytest.mark.reference
@pytest.mark.parametrize("name", BUNDLED_MODELS)
def test_reference_models_decode_as_in_transformers(name, job, tmp_path):
    folder = Path(resolve_model(name))
    texts = ["The history of the city begins", "def add(a, b):\n    return", "Let x = 2 and y ="]
    prompts = tmp_path / "texts.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in texts))
    params = SamplingParams(max_tokens=6, ignore_eos=True)
    arms = [
        job(model=name, prompts=prompts, output=tmp_path / f"{protocol}.jsonl", sampling=params,
            engine=EngineOptions(protocol=protocol))
        for protocol in ("home", "coherent")
    ]  # fmt: skip
    assert run_ranks(2, try_jobs, arms) == [[None, None]] * 2
    tokenizer = AutoTokenizer.from_pretrained(folder)
    token_ids = [tokenizer(text)["input_ids"] for text in texts]
    expected = decode_with_transformers(folder, token_ids, 6, ignore_eos=True).tokens
    for arm in arms:
        found = {line["id"]: line["token_ids"] for line in read(arm.output)}
        assert [found[index] for index in range(len(texts))] == expected


def test_options_are_checked_before_anything_is_read(job):
    for changes, named in (
        ({"protocol": "push"}, "protocol"),
        ({"batch_size": 0}, "batch-size"),
        ({"prefill_chunk": 0}, "prefill-chunk"),
    ):
        with pytest.raises(ValueError, match=named):
            EngineOptions(**changes)
    with pytest.raises(ValueError, match="dtype"):
        job(dtype="float8")
