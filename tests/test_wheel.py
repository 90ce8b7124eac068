"""The wheel and the sdist, built and installed into a fresh environment."""

import json
import subprocess
import sys
import tarfile
import venv
import zipfile
from importlib.metadata import version
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parent.parent
PROBE = """
import json, kivi_tvm, kivi_tvm.schedules, kivi_tvm.tuning_logs, importlib.util
from importlib.resources import files
print(json.dumps({
    "package": kivi_tvm.__file__,
    "schedules": kivi_tvm.schedules.__file__,
    "log": files("kivi_tvm.tuning_logs").joinpath("README.md").is_file(),
    "top_level": importlib.util.find_spec("schedules") is not None,
}))
"""


@pytest.fixture(scope="module")
def dist(tmp_path_factory):
    """Build the sdist, and the wheel from the sdist; return their directory."""
    out = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", out, ROOT]
    subprocess.run(command, check=True)
    return out


@pytest.fixture(scope="module")
def fresh(tmp_path_factory):
    """Return a new environment that borrows the dependencies, but not kivi_tvm, from this one."""
    home = tmp_path_factory.mktemp("fresh")
    venv.create(home, with_pip=True)
    ask = "import sysconfig; print(sysconfig.get_path('purelib'))"
    site = subprocess.check_output([home / "bin" / "python", "-c", ask], text=True).strip()
    here = Path(next(p for p in sys.path if p.endswith("site-packages")))
    # A path line, not site.addsitedir: the editable install's own .pth file stays unread.
    (Path(site) / "dependencies.pth").write_text(f"{here}\n")
    return home


def wheel_names(dist):
    (wheel,) = dist.glob("*.whl")
    return zipfile.ZipFile(wheel).namelist()


def test_top_level_is_the_package_alone(dist):
    info = f"kivi_tvm-{version('kivi-tvm')}.dist-info"
    assert {name.partition("/")[0] for name in wheel_names(dist)} == {"kivi_tvm", info}


def test_linked_folders_arrive_as_files(dist):
    tracked = subprocess.check_output(
        ["git", "ls-files", "schedules", "model_export", "tuning_logs"], cwd=ROOT, text=True
    )
    expected = {f"kivi_tvm/{name}" for name in tracked.split()} | {"kivi_tvm/py.typed"}
    assert expected <= set(wheel_names(dist))


def test_sdist_holds_no_links(dist):
    (sdist,) = dist.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        assert all(member.isreg() for member in archive.getmembers())


@pytest.mark.parametrize("kind", ["*.whl", "*.tar.gz"], ids=["wheel", "sdist"])
def test_installs_and_runs(dist, fresh, kind, tmp_path):
    (archive,) = dist.glob(kind)
    pip = [fresh / "bin" / "python", "-m", "pip", "install", "--quiet", "--no-deps"]
    # Without build isolation the sdist builds with the pinned hatchling, offline.
    pip += ["--no-build-isolation", "--force-reinstall", "--no-index"]
    subprocess.run([*pip, archive], check=True)
    run = [fresh / "bin" / "python", "-c", PROBE]
    probe = json.loads(subprocess.check_output(run, cwd=tmp_path, text=True))
    assert Path(probe["package"]).is_relative_to(fresh)
    assert Path(probe["schedules"]).is_relative_to(fresh)
    assert probe["log"]
    assert not probe["top_level"]
    command = [fresh / "bin" / "kivi-tvm", "--help"]
    shown = subprocess.check_output(command, cwd=tmp_path, text=True)
    assert "demo" in shown
