"""Importers, on recordings made here from the engines' documented schemas (fixtures)."""

import base64
import io
import json

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file
from safetensors.torch import save_file as torch_save_file

from placement.interop.errors import ConfigError, RecordError
from placement.interop.importers import read_trace
from placement.interop.model_shape import ModelShape
from placement.traffic import TrafficError, require_routing

SHAPE = ModelShape(num_layers=4, moe_layers=(1, 2, 3), num_experts=8, top_k=2)


def routing(tokens, *, layers=4, experts=8, top_k=2, dense=(0,), seed=0):
    """(tokens, layers, top_k) distinct experts; dense layers are zeros, as engines return them."""
    rng = np.random.default_rng(seed)
    ids = np.argsort(rng.random((tokens, layers, experts)), axis=2)[:, :, :top_k]
    ids[:, list(dense)] = 0
    return ids


def npy_text(array):
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=False)
    return base64.b64encode(buffer.getvalue()).decode()


def raw_text(array):
    return base64.b64encode(array.astype("<i4").tobytes()).decode()


def vllm_answer(name, array, *, model="toy", prompt_tokens=2):
    return {
        "id": name,
        "model": model,
        "choices": [{"index": 0, "text": "", "routed_experts": npy_text(array)}],
        "usage": {"prompt_tokens": prompt_tokens, "completion_tokens": len(array)},
    }


def write_lines(path, bodies):
    path.write_text("".join(json.dumps(body) + "\n" for body in bodies))
    return path


def test_vllm_responses_become_a_trace_without_the_dense_layer(tmp_path):
    first, second = routing(3, seed=1).astype(np.uint8), routing(5, seed=2).astype(np.uint8)
    file = write_lines(tmp_path / "r.jsonl", [vllm_answer("a", first), vllm_answer("b", second)])
    trace = read_trace("vllm", [file], SHAPE)
    assert np.array_equal(trace.expert_ids, np.concatenate([first, second])[:, 1:])
    assert trace.layer_ids == (1, 2, 3)
    assert trace.sequence_ids.tolist() == [0] * 3 + [1] * 5
    assert trace.positions.tolist() == [0, 1, 2, 0, 1, 2, 3, 4]
    assert (trace.model, trace.num_experts, trace.top_k) == ("toy", 8, 2)


def test_without_a_config_vllms_dense_layers_are_known_by_their_zeros(tmp_path):
    file = write_lines(tmp_path / "r.jsonl", [vllm_answer("a", routing(9, dense=(0, 2)))])
    assert read_trace("vllm", [file], ModelShape(num_experts=8)).layer_ids == (1, 3)


def test_without_the_number_of_experts_the_option_that_gives_it_is_named(tmp_path):
    file = write_lines(tmp_path / "r.jsonl", [vllm_answer("a", routing(9))])
    with pytest.raises(RecordError, match=r"r\.jsonl: .*--num-experts"):
        read_trace("vllm", [file], ModelShape())


def test_the_phase_is_told_by_the_prompts_tokens(tmp_path):
    ids = routing(6)
    file = write_lines(tmp_path / "r.jsonl", [vllm_answer("a", ids, prompt_tokens=4)])
    prefill, decode = (read_trace("vllm", [file], SHAPE, phase=p) for p in ("prefill", "decode"))
    assert np.array_equal(prefill.expert_ids, ids[:4, 1:])
    assert np.array_equal(decode.expert_ids, ids[4:, 1:])
    assert decode.positions.tolist() == [4, 5]
    assert (prefill.phase, decode.phase) == ("prefill", "decode")


@pytest.mark.parametrize("place", ["meta_info", "sglext", "choices", "record"])
def test_sglangs_raw_int32_is_found_wherever_a_release_puts_it(tmp_path, place):
    ids = routing(4)
    text = raw_text(ids)
    body = {
        "meta_info": {"meta_info": {"id": "x", "routed_experts": text, "prompt_tokens": 2}},
        "sglext": {"id": "x", "sglext": {"routed_experts": text}},
        "choices": {"id": "x", "choices": [{"sgl_ext": {"routed_experts": text}}]},
        "record": {"id": "x", "routed_experts": text, "domain": "Github"},
    }[place]
    trace = read_trace("sglang", [write_lines(tmp_path / "r.jsonl", [body])], SHAPE)
    assert np.array_equal(trace.expert_ids, ids[:, 1:])
    assert trace.domains == (("Github",) if place == "record" else ())


def test_a_json_array_of_responses_reads_like_json_lines(tmp_path):
    (tmp_path / "r.json").write_text(json.dumps([vllm_answer("a", routing(3))]))
    assert read_trace("vllm", [tmp_path / "r.json"], SHAPE).num_tokens == 3


def break_base64(answer):
    answer["choices"][0]["routed_experts"] = "QUJ*" + answer["choices"][0]["routed_experts"]


def break_npy(answer):
    answer["choices"][0]["routed_experts"] = base64.b64encode(b"not an array").decode()


def break_shape(answer):
    answer["choices"][0]["routed_experts"] = npy_text(np.zeros((3, 8), dtype=np.uint8))


def break_layers(answer):
    answer["choices"][0]["routed_experts"] = npy_text(routing(3, layers=2))


def break_top_k(answer):
    answer["choices"][0]["routed_experts"] = npy_text(routing(3, top_k=3))


def break_range(answer):
    answer["choices"][0]["routed_experts"] = npy_text(routing(3) + 5)


def break_distinct(answer):
    answer["choices"][0]["routed_experts"] = npy_text(np.zeros((3, 4, 2), dtype=np.uint8))


def break_model(answer):
    answer["model"] = "other"


def break_field(answer):
    del answer["choices"][0]["routed_experts"]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (break_base64, "not valid base64"),
        (break_npy, "not a .npy array"),
        (break_shape, r"shape \(3, 8\)"),
        (break_layers, "2 layers, too few"),
        (break_top_k, "3 experts a token, those before 2"),
        (break_range, "expected 0 to 7"),
        (break_distinct, "names an expert twice"),
        (break_model, "of model other, those before of toy"),
        (break_field, "--enable-return-routed-experts"),
    ],
)
def test_a_broken_response_is_named_by_its_request_and_line(tmp_path, damage, message):
    bad = vllm_answer("cmpl-7", routing(3))
    damage(bad)
    file = write_lines(tmp_path / "r.jsonl", [vllm_answer("cmpl-6", routing(3)), bad])
    with pytest.raises(RecordError, match=message) as error:
        read_trace("vllm", [file], SHAPE)
    assert "cmpl-7" in str(error.value)
    assert "line 2" in str(error.value)


def test_a_torn_line_is_named(tmp_path):
    file = tmp_path / "r.jsonl"
    file.write_text(json.dumps(vllm_answer("a", routing(3))) + '\n{"id": "b", "choi')
    with pytest.raises(RecordError, match="line 2: not JSON"):
        read_trace("vllm", [file], SHAPE)


def test_sglang_bytes_that_do_not_fit_the_config_are_refused(tmp_path):
    body = {"id": "x", "routed_experts": raw_text(np.zeros(7))}
    with pytest.raises(RecordError, match=r"request x .* 28 bytes .* 4 layers x 2 experts"):
        read_trace("sglang", [write_lines(tmp_path / "r.jsonl", [body])], SHAPE)


def sglang_pass(number, ids, positions, lengths=None, top=8):
    """A `per_token` pass: (layers, tokens, 8) physical experts, -1 where there is none."""
    topk = np.full((ids.shape[1], len(ids), top), -1, dtype=np.int32)
    topk[:, :, : ids.shape[2]] = ids.transpose(1, 0, 2)
    topk[0] = -1
    return {
        "forward_pass_id": number,
        "rank": 0,
        "gatherer_key": "primary",
        "input_ids": list(range(100 + number, 100 + number + len(ids))),
        "positions": positions,
        "extend_seq_lens": lengths,
        "forward_mode": 1 if lengths else 2,
        "topk_ids_of_layer": torch.from_numpy(topk),
        "misc_objects": [],
        "global_physical_count": torch.zeros(ids.shape[1], 10, dtype=torch.int32),
    }


def save_dump(path, passes, physical_to_logical):
    torch.save(
        {"records": passes, "last_physical_to_logical_map": torch.tensor(physical_to_logical)}, path
    )
    return path


def test_sglangs_per_token_dump_is_translated_to_logical_experts_and_sequences(tmp_path):
    logical = routing(7)
    physical_to_logical = [[*range(7, -1, -1), 0, 1]] * 4  # slot s holds expert 7 - s; two replicas
    physical = 7 - logical
    passes = [
        sglang_pass(0, physical[:4], [0, 1, 2, 0], [3, 1]),
        sglang_pass(1, physical[4:6], [3, 1]),
        sglang_pass(2, physical[6:], [2]),
    ]
    dump = save_dump(tmp_path / "d_0.pt", passes, physical_to_logical)
    trace = read_trace("sglang", [dump], SHAPE)
    assert np.array_equal(trace.expert_ids, logical[:, 1:])
    assert trace.sequence_ids.tolist() == [0, 0, 0, 1, 0, 1, 1]
    decode = read_trace("sglang", [dump], SHAPE, phase="decode")
    assert decode.num_tokens == 3


def test_a_second_rank_that_recorded_the_same_passes_is_counted_once(tmp_path):
    passes = [sglang_pass(0, routing(4), [0, 1, 2, 3], [4])]
    files = [save_dump(tmp_path / f"d_{r}.pt", passes, [list(range(8))] * 4) for r in (0, 1)]
    assert read_trace("sglang", files, SHAPE).num_tokens == 4


def test_a_per_pass_dump_is_refused_with_the_mode_to_use(tmp_path):
    record = sglang_pass(0, routing(4), [0, 1, 2, 3], [4])
    del record["topk_ids_of_layer"]
    dump = save_dump(tmp_path / "d.pt", [record], [list(range(8))] * 4)
    with pytest.raises(RecordError, match="per_token"):
        read_trace("sglang", [dump], SHAPE)


class Payload:
    """An object that a full unpickler would build."""

    def __init__(self):
        self.attack = True


def test_a_dump_that_holds_objects_is_not_unpickled(tmp_path):
    torch.save({"records": Payload()}, tmp_path / "evil.pt")
    with pytest.raises(RecordError, match="weights-only loader refuses"):
        read_trace("sglang", [tmp_path / "evil.pt"], SHAPE)


def test_sglangs_stat_dump_gives_loads_that_an_affinity_plan_refuses(tmp_path):
    counts = np.zeros((2, 4, 8), dtype=np.int32)
    counts[:, 1:] = np.arange(1, 9) * 10
    path = tmp_path / "stat.pt"
    torch.save({"rank": 0, "logical_count": torch.from_numpy(counts)}, path)
    trace = read_trace("sglang", [path], SHAPE)
    assert trace.phase == "counts"
    load = np.bincount(trace.expert_ids[:, 0].ravel(), minlength=8)
    assert np.allclose(load / load.sum(), np.arange(1, 9) / 36, atol=0.01)
    with pytest.raises(TrafficError, match="experts a token uses together"):
        require_routing(trace, "strategy affinity")


def write_trtllm(folder, ids, *, raw=True, layers=(1, 2, 3)):
    folder.mkdir()
    (folder / "meta_info.json").write_text(
        json.dumps({"num_experts": 8, "num_experts_per_token": 2})
    )
    chosen = {
        f"{it}_{layer}": np.ascontiguousarray(part[:, layer]).astype(np.int32)
        for it, part in ids.items()
        for layer in layers
    }
    counts = {k: np.bincount(v.ravel(), minlength=8).astype(np.int64) for k, v in chosen.items()}
    save_file(counts, folder / "rank0.safetensors")
    if raw:
        save_file(chosen, folder / "rank0_raw.safetensors")
    return folder


def test_tensorrts_raw_statistics_become_a_trace_with_the_models_layer_numbers(tmp_path):
    ids = {50: routing(3, seed=1), 51: routing(2, seed=2)}
    trace = read_trace("trtllm", [write_trtllm(tmp_path / "s", ids)], ModelShape())
    assert np.array_equal(trace.expert_ids, np.concatenate(list(ids.values()))[:, 1:])
    assert trace.layer_ids == (1, 2, 3)


@pytest.mark.parametrize("shape", [ModelShape(), ModelShape(moe_layers=(1, 2, 3))])
def test_tensorrts_pipeline_ranks_are_told_that_each_recorded_other_layers(tmp_path, shape):
    folder = write_trtllm(tmp_path / "s", {50: routing(3)}, layers=(1, 2))
    save_file({"50_3": routing(3)[:, 3].astype(np.int32)}, folder / "rank1_raw.safetensors")
    with pytest.raises(RecordError, match=r"rank\d_raw\.safetensors: .*each rank recorded other"):
        read_trace("trtllm", [folder], shape)


def test_tensorrts_counts_alone_become_loads(tmp_path):
    folder = write_trtllm(tmp_path / "s", {50: routing(40)}, raw=False)
    trace = read_trace("trtllm", [folder], ModelShape())
    assert (trace.phase, trace.layer_ids, trace.num_experts) == ("counts", (1, 2, 3), 8)


def test_a_pass_that_tensorrt_routed_in_pieces_is_refused(tmp_path):
    folder = write_trtllm(tmp_path / "s", {50: routing(3)})
    save_file({"50_1": np.full(8, 9, dtype=np.int64)}, folder / "rank0.safetensors")
    with pytest.raises(RecordError, match="moe max_num_tokens"):
        read_trace("trtllm", [folder], ModelShape())


def test_vllms_load_records_are_summed_and_other_records_passed_over(tmp_path):
    load = {"record_type": "eplb_load_stats", "version": 1, "expert_load": [[1, 3], [2, 2]]}
    file = write_lines(tmp_path / "l.jsonl", [{"record_type": "session_metadata"}, load, load])
    trace = read_trace("vllm", [file], ModelShape())
    assert trace.phase == "counts"
    assert np.bincount(trace.expert_ids[:, 0, 0]).tolist() == [2, 6]


def test_a_load_record_that_is_not_utf_8_is_named_by_its_line(tmp_path):
    file = tmp_path / "l.jsonl"
    file.write_bytes('\n{"record_type": "eplb_load_stats", "x": "\u00e9"}'.encode("latin-1"))
    with pytest.raises(RecordError, match="line 2: not a usable"):
        read_trace("vllm", [file], ModelShape())


def test_the_papers_array_is_a_top_1_trace(tmp_path):
    paths = np.random.default_rng(0).integers(0, 8, (600, 4))
    np.save(tmp_path / "p.npy", paths)
    trace = read_trace("npy", [tmp_path / "p.npy"], ModelShape(num_experts=8))
    assert np.array_equal(trace.expert_ids[:, :, 0], paths)
    assert trace.num_sequences == 3


def test_an_array_of_objects_is_not_unpickled(tmp_path):
    np.save(tmp_path / "o.npy", np.array([{}], dtype=object), allow_pickle=True)
    with pytest.raises(RecordError, match=r"not a \.npy array"):
        read_trace("npy", [tmp_path / "o.npy"], ModelShape(num_experts=8))


def test_router_logits_give_the_models_top_k_with_weights(tmp_path):
    logits = np.array([[0.0, 3.0, 1.0], [2.0, 0.0, 1.0]], dtype=np.float32)
    save_file({"0": logits, "router_logits.2": -logits}, tmp_path / "l.safetensors")
    trace = read_trace("hf", [tmp_path / "l.safetensors"], ModelShape(top_k=2, num_experts=3))
    assert trace.expert_ids.tolist() == [[[1, 2], [0, 2]], [[0, 2], [1, 2]]]
    assert trace.layer_ids == (0, 2)
    assert (trace.expert_weights[:, :, 0] > trace.expert_weights[:, :, 1]).all()


def test_deepseek_v3_logits_without_the_selection_bias_are_refused(tmp_path):
    save_file({"0": np.zeros((2, 4), dtype=np.float32)}, tmp_path / "l.safetensors")
    with pytest.raises(RecordError, match="e_score_correction_bias"):
        read_trace("hf", [tmp_path / "l.safetensors"], ModelShape(top_k=2, scoring="sigmoid"))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("routed_experts_start", "x"),
        ("routed_experts_start", 2**31),
        ("routed_experts_start", float("inf")),
        ("prompt_tokens", 1.5),
        ("prompt_tokens", [1]),
        ("model", [1]),
        ("domain", "\ud800"),
    ],
)
def test_an_odd_field_is_named_with_its_request(tmp_path, field, value):
    body = vllm_answer("a", routing(3)) | {field: value}
    with pytest.raises(RecordError, match=rf"request a .*{field} must be"):
        read_trace("vllm", [write_lines(tmp_path / "r.jsonl", [body])], SHAPE)


def test_odd_parts_of_an_answer_that_are_not_needed_are_passed_over(tmp_path):
    body = vllm_answer("a", routing(3)) | {"meta_info": "x", "usage": [1]}
    assert read_trace("vllm", [write_lines(tmp_path / "r.jsonl", [body])], SHAPE).num_tokens == 3


def test_more_domains_than_a_trace_can_tell_apart_are_refused(tmp_path):
    bodies = [vllm_answer(i, routing(1)) | {"domain": f"d{i}"} for i in range(257)]
    with pytest.raises(RecordError, match="257 domains"):
        read_trace("vllm", [write_lines(tmp_path / "r.jsonl", bodies)], SHAPE)


@pytest.mark.parametrize(
    ("said", "message"),
    [
        ({"num_layers": 9}, "4 layers, expected all 9"),
        ({"moe_layers": (1, 3)}, "4 layers, expected the 2 with experts; give --num-layers"),
        ({"num_layers": 9, "moe_layers": (1, 3)}, "4 layers, expected all 9 or the 2"),
        ({"top_k": 3}, "2 experts a token, the model uses 3"),
    ],
)
def test_a_recording_of_another_model_than_was_said_is_refused(tmp_path, said, message):
    file = write_lines(tmp_path / "r.jsonl", [vllm_answer("a", routing(9))])
    with pytest.raises(RecordError, match=message):
        read_trace("vllm", [file], ModelShape(num_experts=8, **said))


def test_what_the_config_the_options_and_the_files_say_must_agree(tmp_path):
    with pytest.raises(ConfigError, match="8 and 16 experts: the config, the options and"):
        SHAPE.filled(num_experts=16)
    with pytest.raises(ConfigError, match="MoE layers 1 to 3 and 0 to 2"):
        SHAPE.filled(moe_layers=(0, 1, 2))
    save_file({"0": np.zeros((3, 8), dtype=np.float32)}, tmp_path / "l.safetensors")
    for shape in (ModelShape(top_k=2, num_experts=16), ModelShape(top_k=9)):
        with pytest.raises(RecordError, match=r"l\.safetensors: "):
            read_trace("hf", [tmp_path / "l.safetensors"], shape)
    folder = write_trtllm(tmp_path / "s", {50: routing(3)})
    for shape in (ModelShape(top_k=3), ModelShape(moe_layers=(1, 2, 5))):
        with pytest.raises(RecordError, match=r"s/.*: .*must agree$"):
            read_trace("trtllm", [folder], shape)
    np.save(tmp_path / "loads.npy", np.ones((4, 8)))
    with pytest.raises(RecordError, match="loads are of 4 layers, the model has 6"):
        read_trace("npy", [tmp_path / "loads.npy"], ModelShape(num_layers=6))
    np.save(tmp_path / "paths.npy", np.zeros((5, 4), dtype=np.int64))
    for shape in (ModelShape(), ModelShape(num_experts=8, top_k=1, num_layers=3)):
        with pytest.raises(RecordError, match=r"paths\.npy: "):
            read_trace("npy", [tmp_path / "paths.npy"], shape)


def test_an_idle_pass_of_sglang_has_no_tokens_and_ends_no_sequence(tmp_path):
    ids = routing(4)
    passes = [
        sglang_pass(0, ids[:3], [0, 1, 2], [3, 0]),
        sglang_pass(1, ids[:0], [], []),
        sglang_pass(2, ids[3:], [3]),
    ]
    dump = save_dump(tmp_path / "d.pt", passes, [list(range(8))] * 4)
    trace = read_trace("sglang", [dump], SHAPE)
    assert np.array_equal(trace.expert_ids, ids[:, 1:])
    assert trace.sequence_ids.tolist() == [0] * 4


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("positions", None),
        ("positions", "abcd"),
        ("positions", [[0], [1, 2]]),
        ("input_ids", [[0], [1, 2]]),
        ("positions", [2**40] * 4),
        ("input_ids", None),
        ("extend_seq_lens", "ab"),
        ("extend_seq_lens", [6, -2]),
        ("topk_ids_of_layer", None),
        ("topk_ids_of_layer", torch.zeros(4, 4, 2)),
    ],
)
def test_a_malformed_pass_of_sglang_is_named(tmp_path, field, value):
    record = sglang_pass(0, routing(4), [0, 1, 2, 3], [4]) | {field: value}
    dump = save_dump(tmp_path / "d.pt", [record], [list(range(8))] * 4)
    with pytest.raises(RecordError, match=rf"d\.pt, pass 0: {field}"):
        read_trace("sglang", [dump], SHAPE)


@pytest.mark.parametrize(
    ("dump", "message"),
    [
        ({"records": None, "last_physical_to_logical_map": torch.zeros(4, 8).long()}, "records"),
        ({"records": [1], "last_physical_to_logical_map": torch.zeros(4, 8).long()}, "records"),
        ({"records": [], "last_physical_to_logical_map": None}, "last_physical_to_logical_map"),
        ({"logical_count": "x"}, "logical_count"),
        ({"logical_count": [[1], [1, 2]]}, "logical_count"),
        ({"logical_count": torch.zeros(0, 4, 8)}, "loads must be"),
    ],
)
def test_a_malformed_dump_of_sglang_says_what_is_wrong(tmp_path, dump, message):
    torch.save(dump, tmp_path / "d.pt")
    with pytest.raises(RecordError, match=message):
        read_trace("sglang", [tmp_path / "d.pt"], SHAPE)


def test_bfloat16_counts_are_read_and_an_empty_pt_file_is_refused(tmp_path):
    file = tmp_path / "d.pt"
    torch.save({"logical_count": torch.ones(2, 4, 8, dtype=torch.bfloat16)}, file)
    assert read_trace("sglang", [file], SHAPE).phase == "counts"
    file.write_bytes(b"")
    with pytest.raises(RecordError, match="loader refuses"):
        read_trace("sglang", [file], SHAPE)


def test_statistics_of_tensorrt_that_numpy_cannot_read_or_that_do_not_fit_are_refused(tmp_path):
    folder = write_trtllm(tmp_path / "s", {50: routing(3)})
    raw, counts = folder / "rank0_raw.safetensors", folder / "rank0.safetensors"
    for count in (np.ones(7), np.ones((2, 8)), np.full(8, np.nan)):
        save_file({"50_1": count}, counts)
        with pytest.raises(RecordError, match="50_1 must count each of 8"):
            read_trace("trtllm", [folder], ModelShape())
    raw.unlink()
    torch_save_file({"50_1": torch.ones(8, dtype=torch.bfloat16)}, counts)
    with pytest.raises(RecordError, match="no bfloat16"):
        read_trace("trtllm", [folder], ModelShape())
    save_file({}, counts)
    with pytest.raises(RecordError, match="are empty"):
        read_trace("trtllm", [folder], ModelShape())


@pytest.mark.parametrize(
    ("array", "said"),
    [
        (np.zeros((4, 8)), "loads must be"),
        (np.ones((0, 8)), "loads must be"),
        (np.zeros((4, 3, 0), dtype=int), "shape"),
        (np.zeros((4, 0), dtype=int), "shape"),
    ],
)
def test_arrays_with_nothing_in_them_are_refused(tmp_path, array, said):
    np.save(tmp_path / "a.npy", array)
    with pytest.raises(RecordError, match=said):
        read_trace("npy", [tmp_path / "a.npy"], ModelShape(num_experts=8))


@pytest.mark.parametrize(
    "tensors",
    [
        {"0": np.zeros(8)},
        {"0": np.zeros((4, 0))},
        {"0": np.zeros((4, 8)), "1": np.zeros((4, 6))},
        {"0": np.zeros((4, 8)), "e_score_correction_bias.0": np.zeros(3)},
        {"0": np.zeros((4, 8)), "sequence_ids": np.zeros(4)},
    ],
)
def test_logits_that_do_not_fit_together_are_refused(tmp_path, tensors):
    save_file({name: x.astype(np.float32) for name, x in tensors.items()}, tmp_path / "l.st")
    with pytest.raises(RecordError, match=r"l\.st: "):
        read_trace("hf", [tmp_path / "l.st"], ModelShape(top_k=2))


def test_an_unknown_engine_and_a_missing_file_are_named(tmp_path):
    with pytest.raises(RecordError, match="choose one of vllm"):
        read_trace("mlx", [tmp_path], ModelShape())
    with pytest.raises(RecordError, match=r"nothing\.jsonl"):
        read_trace("vllm", [tmp_path / "nothing.jsonl"], ModelShape())


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[" * 100_000, "too deeply nested"),
        ("[1]", "element 0: expected an object, got int"),
        ('{"id": ' + "9" * 5000 + "}", "line 1: .*too many digits"),
    ],
)
def test_responses_that_cannot_be_read_are_refused_by_name(tmp_path, text, message):
    (tmp_path / "r.jsonl").write_text(text)
    with pytest.raises(RecordError, match=rf"r\.jsonl.*{message}"):
        read_trace("sglang", [tmp_path / "r.jsonl"], SHAPE)
