"""`kivi-tvm tune` from outside: bad input, and real runs on functions that compile quickly."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest

from kivi_tvm import cuda
from kivi_tvm.cli import main

SMALL = ("--ops", "advance", "fill_window", "--tokens", "256", "--trials", "4")


def command(folder, *arguments):
    return [sys.executable, "-m", "kivi_tvm", "tune", "--log-dir", *map(str, (folder, *arguments))]


def environment(**variables):
    return {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path)), **variables}


def tune(folder, *arguments, **variables):
    return subprocess.run(
        command(folder, *arguments),
        capture_output=True,
        text=True,
        timeout=300,
        env=environment(**variables),
    )


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--trials", "0"], ["`--trials` must be at least 1, got 0"]),
        (["--trials", "0", "--threads", "-1"], ["`--trials`", "`--threads`"]),
        (["--seed", "-1"], ["`--seed` must not be negative, got -1"]),
        (["--time-budget", "soon"], ["such as 90s, 10m or 1h, got 'soon'"]),
        (["--runner", "rpc"], ["`--runner rpc` needs --tracker HOST:PORT and --tracker-key"]),
        (["--tracker", "localhost:9190"], ["are for `--runner rpc`"]),
        (
            ["--runner", "rpc", "--tracker", "localhost:99999", "--tracker-key", "x"],
            ["`--tracker` must be HOST:PORT, got 'localhost:99999'"],
        ),
        (["--emit", "there", "--plot", "x.png"], ["`--emit` takes no --plot"]),
        (["--list", "--bits", "4"], ["`--list` takes no --bits"]),
        (["--prune", "--trials", "9", "--runner", "rpc"], ["no --runner", "no --trials"]),
        (["--collect", "there", "--head-dim", "64"], ["`--collect` takes no --head-dim"]),
        (["--plot", "curves.doc"], ["`--plot` must end in one of"]),
        (["--plot", "absent/curves.png"], ["`--plot` must be in a folder that exists"]),
    ],
    ids=lambda x: "-".join(y.strip("-") for y in x) if x[0].startswith("--") else "",
)
def test_one_clear_line(capsys, tmp_path, options, words):
    assert main(["tune", "--log-dir", str(tmp_path / "logs"), *options]) == 2
    out, error = capsys.readouterr()
    assert not out and len(error.splitlines()) == 1
    for word in words:
        assert word in error
    assert not (tmp_path / "logs").exists()


def test_log_dir_that_cannot_be_written(capsys, tmp_path):
    (tmp_path / "file").write_text("")
    assert main(["tune", "--log-dir", str(tmp_path / "file")]) == 2
    assert "`--log-dir` must be a directory that can be written" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--ops", "attend", "attendd"], "`--ops` must be among ['advance', 'append'"),
        (["--cost-model", "mlp"], "`--cost-model` must be one of ['xgb', 'random'], got 'mlp'"),
        (["--target", "lvm"], "`target` must be one TVM knows, got 'lvm'"),
        (["--tokens", "100"], "`tokens` must exceed residual_length=128"),
        (["--model", "llama9"], "`--model` must be one of"),
    ],
    ids=lambda x: x[0].strip("-") if isinstance(x, list) else "",
)
def test_one_clear_line_before_anything_is_compiled(capfd, tmp_path, options, words):
    assert main(["tune", "--log-dir", str(tmp_path), *options]) == 2
    out, error = capfd.readouterr()
    assert not out and words in error.splitlines()[-1]
    assert not list(tmp_path.iterdir())


def test_a_compiler_is_needed(capsys, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    assert main(["tune", "--log-dir", str(tmp_path / "logs"), "--ops", "advance"]) == 2
    assert "needs a C++ compiler" in capsys.readouterr().err


@pytest.mark.skipif(shutil.which("nvidia-smi") is not None, reason="needs a machine without a GPU")
@pytest.mark.parametrize(
    ("options", "words"),
    [
        ([], "`--runner local` needs a GPU of sm_90 for this `--target`, and there is none here"),
        (["--threads", "2"], "`--threads` is for CPUs, got 2"),
        (
            ["--runner", "rpc", "--tracker", "localhost:9190", "--tracker-key", "gpu"],
            "`--runner rpc` measures on CPUs; for a GPU elsewhere, --emit candidates",
        ),
    ],
    ids=["no GPU", "threads", "rpc"],
)
def test_what_tuning_for_a_gpu_needs(capsys, tmp_path, monkeypatch, options, words):
    monkeypatch.setattr(cuda, "known_architectures", lambda: ("sm_90",))
    target = '{"kind": "cuda", "arch": "sm_90"}'
    assert main(["tune", "--log-dir", str(tmp_path), "--target", target, *options]) == 2
    error = capsys.readouterr().err
    assert words in error and "Unable to detect" not in error
    assert not list(tmp_path.iterdir())


@pytest.mark.cuda
def test_tune_on_a_gpu(tmp_path, capfd):
    command = ["tune", "--target", "cuda", "--log-dir", str(tmp_path), "--trials", "6", "--json"]
    shape = ["--num-heads", "8", "--num-kv-heads", "2", "--head-dim", "64", "--tokens", "4000"]
    ops = ["--dtype", "float16", "--ops", "attend", "combine_window"]
    assert main([*command, *shape, *ops]) == 0
    found = json.loads(capfd.readouterr().out)
    assert found["device"]["kind"] == "cuda" and found["device"]["threads"] == 0
    assert [each["function"] for each in found["functions"]] == ["attend", "combine_window"]
    for each in found["functions"]:
        assert each["error"] is None and each["default_us"] > 1 and not each["failures"]
        assert each["max_error"] <= each["error_limit"]
    assert main(["tune", "--log-dir", str(tmp_path), "--list", "--json"]) == 0
    records = json.loads(capfd.readouterr().out)["records"]
    mine = [each for each in records if each["place"] == str(tmp_path)]
    assert {each["kind"] for each in mine} <= {"measured"} and not any(e["stale"] for e in mine)


def test_nothing_to_list(capsys, tmp_path):
    assert main(["tune", "--log-dir", str(tmp_path), "--list", "--json"]) == 0
    listed = json.loads(capsys.readouterr().out)["records"]
    assert not [each for each in listed if each["place"] == str(tmp_path)]
    assert main(["tune", "--log-dir", str(tmp_path), "--prune"]) == 0
    assert "0 records" in capsys.readouterr().out
    for action in ("--list", "--prune"):
        assert main(["tune", "--log-dir", str(tmp_path / "absent"), action]) == 2
        assert "`--log-dir` must be a directory that exists" in capsys.readouterr().err


def test_tune_resume_list_and_prune(tmp_path, capfd):
    def here(*arguments):
        capfd.readouterr()
        assert main(["tune", "--log-dir", str(logs), *arguments]) == 0
        return capfd.readouterr()

    logs, picture = tmp_path / "logs", tmp_path / "curves.png"
    done = tune(logs, *SMALL, "--json", "--plot", picture)
    assert done.returncode == 0, done.stderr
    facts = json.loads(done.stdout)
    advance, fill = facts["functions"]
    assert (advance["trials"], fill["trials"], facts["new_trials"]) == (1, 3, 4)
    assert fill["exhausted"] and fill["space"] == {"points": 3, "exact": True}
    for each in (advance, fill):
        assert each["error"] is None and 0 < each["tuned_us"] <= each["default_us"]
        assert each["max_error"] <= each["error_limit"] and each["bound_share"] > 0
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert "4 of 4 trials" in done.stderr and "per minute" in done.stderr

    out, error = here(*SMALL)
    assert "4 trials were finished by earlier runs" in error
    assert "0 trials in" in out and "published in" in out
    assert max(map(len, out.splitlines()[:7])) <= 80

    listed = json.loads(here("--list", "--json").out)["records"]
    mine = [each for each in listed if each["place"] == str(logs)]
    assert [(each["function"], each["kind"], each["trials"]) for each in mine] == [
        ("fill_window", "measured", 3)
    ]
    assert mine[0]["stale"] is None

    (database,) = logs.glob("*/database_*.json")
    database.with_name("database_old.json.corrupt").write_text("")
    pruned = json.loads(here("--prune", "--json").out)
    assert (pruned["records"], len(pruned["files"])) == ([], 1)
    assert pruned["scratch_bytes"] > 0 and not list(logs.glob(".scratch/*/built-*/*"))
    assert list(logs.glob(".scratch/*/*.jsonl"))


@pytest.mark.slow
def test_ctrl_c_of_a_terminal_publishes_and_reports(tmp_path):
    """A terminal sends the signal to every process of the group."""
    process = subprocess.Popen(
        command(tmp_path, "--ops", "attend_window", "--trials", "400", "--json"),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment(),
        start_new_session=True,
    )
    while not any(path.read_text().count("\n") > 8 for path in tmp_path.rglob("*.jsonl")):
        assert process.poll() is None
        time.sleep(0.1)
    os.killpg(process.pid, signal.SIGINT)
    out, error = process.communicate(timeout=120)
    assert process.returncode == 130, error
    (window,) = json.loads(out)["functions"]
    assert window["error"] is None and "crash" not in window["failures"]
    assert list(tmp_path.glob("*/database_*.json")) and "interrupted" in error


@pytest.mark.slow
def test_kill_9_and_the_same_command_again(tmp_path):
    options = ("--ops", "attend_window", "--trials", "24", "--json")
    process = subprocess.Popen(
        command(tmp_path, *options), stderr=subprocess.DEVNULL, env=environment()
    )
    while not any(path.read_text().count("\n") > 8 for path in tmp_path.rglob("*.jsonl")):
        assert process.poll() is None
        time.sleep(0.05)
    process.kill()
    process.wait()
    done = tune(tmp_path, *options)
    assert done.returncode == 0, done.stderr
    facts = json.loads(done.stdout)
    assert facts["functions"][0]["trials"] == 24 and 0 < facts["new_trials"] <= 16
