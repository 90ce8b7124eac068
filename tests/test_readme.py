"""The README's commands and examples, as written."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
MAKEFILE = (ROOT / "Makefile").read_text()


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


def example(containing):
    (found,) = (text for text in blocks("python") if containing in text)
    return found


def test_make_targets_exist():
    named = set(re.findall(r"^make (\w+)", "".join(blocks("sh")), re.MULTILINE))
    assert {"demo", "test"} <= named
    assert named <= set(re.findall(r"^(\w+):", MAKEFILE, re.MULTILINE))


def test_command_table_is_the_command_line():
    documented = set(re.findall(r"^\| `kivi-tvm (\w+)` ", README, re.MULTILINE))
    command = [Path(sys.executable).parent / "kivi-tvm", "--help"]
    shown = subprocess.check_output(command, text=True)
    assert documented == set(re.findall(r"^    (\w+) ", shown, re.MULTILINE))


def test_cache_example_runs(tmp_path):
    program = example("new_cache(batch_size=1") + example("new_cache(batch_size=2")
    program += "print(out.shape, row, cache.lengths)"
    command = [sys.executable, "-c", program]
    shown = subprocess.check_output(command, cwd=tmp_path, text=True).splitlines()
    assert shown[0].startswith("[501] ")
    assert shown[1] == "torch.Size([2, 32, 8, 128]) 2 [503, 500, 503]"
    assert (tmp_path / "kivi.so").exists()


def test_transformers_example_runs():
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        hidden_size=256,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_hidden_layers=2,
        intermediate_size=64,
        vocab_size=64,
        eos_token_id=None,  # random weights may pick any token: none of them ends the text
    )
    model = transformers.LlamaForCausalLM(config).eval()
    ids = torch.arange(40)[None] % 64
    names = {"model": model, "inputs": {"input_ids": ids, "attention_mask": torch.ones_like(ids)}}
    exec(compile(example("KiviCache"), "README.md", "exec"), names)
    assert names["out"].shape == (1, 72)


def test_attention_page_is_made_from_its_data():
    command = [sys.executable, ROOT / "tools" / "attention_page.py", "--check"]
    assert subprocess.run(command, check=False).returncode == 0
