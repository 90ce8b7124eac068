"""The options that say what is tuned or built: names, flags, model files, and what they refuse."""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import replace

import pytest

from kivi_tvm.cli.geometry import add_geometry_options, workloads
from kivi_tvm.config import KiviConfig
from kivi_tvm.errors import UserError
from kivi_tvm.workloads import DTYPE_SLUGS, MODELS, TUNED

LLAMA = {"hidden_size": 512, "num_attention_heads": 8, "num_key_value_heads": 2}
GEMMA_TEXT = LLAMA | {"head_dim": 256, "num_attention_heads": 4}
# What a config.json tells, and the (H, H_kv, D, dtype) in it.
CONFIGS = {
    "llama": (LLAMA | {"torch_dtype": "float16"}, [(8, 2, 64, "float16")]),
    "old llama": ({"hidden_size": 512, "num_attention_heads": 8}, [(8, 8, 64, "float32")]),
    "mistral": (LLAMA | {"head_dim": None, "dtype": "bfloat16"}, [(8, 2, 64, "bfloat16")]),
    "qwen3": (LLAMA | {"head_dim": 128}, [(8, 2, 128, "float32")]),
    "gemma3": (
        {"text_config": GEMMA_TEXT, "vision_config": {"hidden_size": 9}, "dtype": "bfloat16"},
        [(4, 2, 256, "bfloat16")],
    ),
    "omni": (
        {"thinker_config": {"text_config": LLAMA | {"head_dim": 64}}},
        [(8, 2, 64, "float32")],
    ),
    "gpt2": ({"n_embd": 768, "n_head": 12}, [(12, 12, 64, "float32")]),
    "falcon": (
        {"hidden_size": 4544, "num_attention_heads": 71, "multi_query": True, "num_kv_heads": 71},
        [(71, 1, 64, "float32")],
    ),
    "openelm": (
        {"num_query_heads": [12, 12, 16], "num_kv_heads": [3, 3, 4], "head_dim": 64},
        [(12, 3, 64, "float32"), (16, 4, 64, "float32")],
    ),
    "linear layers": (LLAMA | {"num_key_value_heads": [0, 2, 0, 2]}, [(8, 2, 64, "float32")]),
}


def parse(*words):
    parser = argparse.ArgumentParser()
    add_geometry_options(parser)
    return workloads(parser.parse_args([str(word) for word in words]))


def told(found):
    return [(w.num_heads, w.num_kv_heads, w.head_dim, w.dtype) for w in found]


def refused(*words):
    with pytest.raises(UserError) as error:
        parse(*words)
    message = str(error.value)
    assert "\n" not in message
    return message


@pytest.fixture
def write(tmp_path):
    def write(config, name="config.json"):
        (tmp_path / name).write_text(config if isinstance(config, str) else json.dumps(config))
        return tmp_path

    return write


def test_default_is_what_the_demo_compiles():
    [found] = parse()
    demo = KiviConfig(head_dim=64, num_heads=9, num_kv_heads=3, dtype="float32")
    assert found.cfg.kernel_key() == demo.kernel_key()
    assert parse("--model", "smollm2-135m") == [found]


def test_named_workloads_are_named_after_their_kernels():
    for name, workload in TUNED.items():
        w = workload.cfg
        assert f"D{w.D}-M{w.M}-b{w.key_bits}-{DTYPE_SLUGS[workload.dtype]}" == name
        assert (workload.compute, workload.key_bits) == ("auto", workload.value_bits)
    names = ["D64-M1-b2-fp16", "D128-M8-b4-fp32"]
    assert parse("--workloads", *names) == [TUNED[name] for name in names]
    assert len(TUNED) == 36 == len({w.cfg.kernel_key() for w in TUNED.values()})


def test_flags_and_several_dtypes():
    found = parse(
        *("--head-dim", 128, "--num-heads", 32, "--num-kv-heads", 8, "--bits", 4, 2),
        *("--group-size", 64, "--dtype", "float32", "float16", "float32"),
    )
    assert [w.dtype for w in found] == ["float32", "float16"]
    cfg = found[0].cfg
    assert (cfg.M, cfg.key_bits, cfg.value_bits, cfg.group_size) == (4, 4, 2, 64)
    [same] = parse("--head-dim", 64, "--num-heads", 3, "--tokens", 77, "--batch-size", 5)
    assert (same.num_kv_heads, same.tokens, same.batch_size) == (3, 77, 5)


def test_options_change_a_named_model():
    [found] = parse("--model", "llama3-8b", "--dtype", "bfloat16", "--residual-length", 64)
    assert found == replace(MODELS["llama3-8b"], dtype="bfloat16", residual_length=64)


@pytest.mark.parametrize("name", CONFIGS)
def test_config(write, name):
    config, expected = CONFIGS[name]
    folder = write(config)
    assert told(parse("--model", folder)) == expected
    assert told(parse("--model", folder / "config.json")) == expected
    assert parse("--model", folder, "--dtype", "float16")[0].dtype == "float16"


def test_phi_has_80_channels(write):
    folder = write({"hidden_size": 2560, "num_attention_heads": 32})
    assert refused("--model", folder).endswith(
        "`--group-size` must divide head_dim=80, got 32; use 16"
    )
    assert told(parse("--model", folder, "--group-size", 16)) == [(32, 32, 80, "float32")]


def test_nested_defaults_come_from_transformers(tmp_path):
    """As in the files of Gemma 3: fields at their model type's defaults are left out."""
    transformers = pytest.importorskip("transformers")
    text = {"model_type": "gemma3_text", "hidden_size": 2560, "num_hidden_layers": 1}
    config = transformers.Gemma3Config(text_config=text)
    config.save_pretrained(tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())
    for name in ("num_attention_heads", "num_key_value_heads", "head_dim"):
        written["text_config"].pop(name, None)
    (tmp_path / "config.json").write_text(json.dumps(written))
    assert told(parse("--model", tmp_path))[0][:3] == (8, 4, 256)
    other = (tmp_path / "config.json").rename(tmp_path / "other.json")
    assert "num_attention_heads, num_key_value_heads, head_dim" in refused("--model", other)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("{", "is not JSON"),
        ("[1]", "must hold a JSON object, got list"),
        ("\0", "is not JSON"),
        ({}, "must tell num_attention_heads, head_dim or hidden_size; or pass --head-dim"),
        (LLAMA | {"num_attention_heads": "8"}, "a positive int as num_attention_heads, got '8'"),
        (LLAMA | {"num_key_value_heads": -1}, "a positive int as num_key_value_heads, got -1"),
        (LLAMA | {"num_key_value_heads": []}, "a positive int as num_key_value_heads, got []"),
        (LLAMA | {"num_attention_heads": [8, 8], "num_key_value_heads": [1, 2, 1]}, "one length"),
        (LLAMA | {"num_attention_heads": 7}, "a multiple of 7 heads, got 512"),
        (LLAMA | {"num_key_value_heads": 3}, "multiple of num_kv_heads=3, got 8"),
        (LLAMA | {"global_head_dim": 512}, "`head_dim` must be one of"),
        (LLAMA | {"kv_lora_rank": 512, "model_type": "mla"}, "got kv_lora_rank=512 ('mla')"),
        (LLAMA | {"is_encoder_decoder": True}, "must be a decoder-only model"),
        (LLAMA | {"dtype": "float8_e4m3fn"}, "`--dtype` must be given"),
    ],
)
def test_bad_configs(write, content, words):
    message = refused("--model", write(content))
    assert words in message
    assert "--model" in message or "--dtype" in message


def test_missing_files(tmp_path):
    assert "cannot be read: No such file" in refused("--model", tmp_path)
    message = refused("--model", "llama3-8")
    for words in ("one of llama3-8b, ", "did you mean llama3-8b", "or a local folder"):
        assert words in message


def test_everything_wrong_is_listed_at_once():
    message = refused(
        *("--bits", 3, "--group-size", 48, "--dtype", "float64", "--tokens", 0, "--head-dim", 64),
    )
    for words in (
        "`--bits` must be one of [2, 4, 8], got 3",
        "`--group-size` must be one of [16, 32, 64, 128], got 48",
        "`--dtype` must be one of ['float16', 'bfloat16', 'float32'], got 'float64'",
        "`--tokens` must be at least 1, got 0",
        "--num-heads must be given with --head-dim",
    ):
        assert words in message
    message = refused("--head-dim", 65, "--num-heads", 3, "--num-kv-heads", 2)
    assert "`--head-dim` must be one of" in message and "`--num-heads` must be a mul" in message
    message = refused("--head-dim", 64, "--num-heads", 3, "--residual-length", 33)
    assert "`--residual-length` must be a positive multiple" in message


def test_contradictions():
    assert "in one way, got --model and --head-dim" in refused("--model", "x", "--head-dim", 64)
    assert "`--bits` must not be given" in refused("--workloads", "D64-M1-b2-fp16", "--bits", 2)
    message = refused("--workloads", "D64-M2-b2-fp16", "D64-M1-b2-fp16")
    assert "got 'D64-M2-b2-fp16' (did you mean D64-M" in message


@pytest.fixture
def onnx_model(tmp_path):
    """A file with one attention operator per (H, H_kv, D), or with a cache as inputs only."""
    onnx = pytest.importorskip("onnx")
    from onnx import TensorProto, helper

    def write(layers, operator="GroupQueryAttention", dtype=TensorProto.FLOAT16):
        nodes, inputs = [], [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1])]
        for i, (H, H_kv, D) in enumerate(layers):
            past = [f"past_key_values.{i}.{part}" for part in ("key", "value")]
            shape = ["batch", H_kv, "past", D]
            inputs += [helper.make_tensor_value_info(name, dtype, shape) for name in past]
            if operator:
                attributes = {"domain": "com.microsoft", "num_heads": H, "kv_num_heads": H_kv}
                nodes.append(helper.make_node(operator, ["x", "", "", *past], ["y"], **attributes))
        graph = helper.make_graph(nodes, "tiny", inputs, [])
        onnx.save(helper.make_model(graph), tmp_path / "model.onnx")
        return tmp_path / "model.onnx"

    return write


def test_onnx_attention(onnx_model):
    layers = [(32, 8, 128), (32, 8, 128), (16, 4, 64)]
    expected = [(32, 8, 128, "float16"), (16, 4, 64, "float16")]
    assert told(parse("--model", onnx_model(layers))) == expected
    message = refused("--model", onnx_model(layers), "--num-heads", 32)
    assert "`--num-heads` must not be given" in message


def test_onnx_with_a_cache_as_inputs(onnx_model):
    file = onnx_model([(32, 8, 128)], operator=None, dtype=1)
    assert "`--num-heads` must be given" in refused("--model", file)
    assert told(parse("--model", file, "--num-heads", 32)) == [(32, 8, 128, "float32")]


def test_bad_onnx(onnx_model, tmp_path, monkeypatch):
    assert "must state the head dim" in refused("--model", onnx_model([(8, 2, "D")]))
    assert "got neither" in refused("--model", onnx_model([]))
    for content in (b"garbage", b"", b"\xff" * 100):
        (tmp_path / "bad.onnx").write_bytes(content)
        message = refused("--model", tmp_path / "bad.onnx")
        assert "is not an ONNX file" in message or "got neither" in message
    (tmp_path / "folder.onnx").mkdir()
    assert "cannot be read: Is a directory" in refused("--model", tmp_path / "folder.onnx")
    monkeypatch.setitem(sys.modules, "onnx", None)
    assert "run: pip install 'kivi-tvm[onnx]'" in refused("--model", tmp_path / "bad.onnx")
