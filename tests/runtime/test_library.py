"""A library opens and runs without the compiler, beside it, and beside torch in either order.

Each case is a process of its own: what is loaded first is what is under test.
"""

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from kivi_tvm.compile import LAUNCH
from kivi_tvm.host import find_cxx, find_runtime_library

HERE = Path(__file__).parent
# Every script may use these; `threads()` is how many threads a call of 64 rows ran on.
PRELUDE = """
    import sys
    sys.path.insert(0, {here!r})
    path = {library!r}

    def threads(library):
        import torch
        ids = torch.zeros(64, dtype=torch.int64)
        library["thread_ids"](ids)
        assert bool((ids != 0).all())
        return len(set(ids.tolist()))

    def opened():
        from kivi_tvm.runtime.library import open_library
        return open_library(path)
"""
BLOCK_TVM = 'sys.modules["tvm"] = None'


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    """A library as builds make them."""
    return linked(tmp_path_factory, LAUNCH)


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """A library without a launch function of its own."""
    return linked(tmp_path_factory)


def linked(tmp_path_factory, *sources):
    if find_cxx() is None:
        pytest.skip("needs a C++ compiler to link a library")
    path = tmp_path_factory.mktemp("library") / "threads.so"
    run_python(HERE / "parallel_kernel.py", path, *sources)
    return path


def run_python(*arguments, **variables):
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("TVM_", "KIVI_TVM_RUNTIME"))}
    search = os.pathsep.join(filter(None, sys.path))
    done = subprocess.run(
        [sys.executable, *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=120,
        env={**kept, "PYTHONPATH": search, **variables},
    )
    assert done.returncode == 0, f"status {done.returncode}\n{done.stdout}{done.stderr}"
    return done.stdout.split()


def run(library, body, **variables):
    """Words printed by a script in a fresh process, after `PRELUDE`."""
    head = textwrap.dedent(PRELUDE).format(here=str(HERE), library=str(library))
    return run_python("-c", head + textwrap.dedent(body), **variables)


def test_runs_without_the_compiler_on_as_many_threads_as_torch(library):
    body = f"""
    {BLOCK_TVM}
    import torch
    library = opened()
    for n in (3, 1, 2, 2, 8):
        torch.set_num_threads(n)
        print(threads(library))
    assert library.on_torch_threads and "tvm.base" not in sys.modules
    """
    assert run(library, body, TVM_NUM_THREADS="4") == ["3", "1", "2", "2", "8"]


def test_makes_no_threads_beside_those_of_torch(library):
    body = f"""
    {BLOCK_TVM}
    import os, torch
    def alive():
        return set(os.listdir("/proc/self/task"))
    torch.set_num_threads(3)
    library = opened()
    torch.ones(1 << 22).sum()  # wakes torch's threads
    before = alive()
    print(threads(library), alive() == before)
    """
    assert run(library, body) == ["3", "True"]


def test_a_loop_inside_of_a_parallel_one_gets_one_thread_and_does_it_all(library):
    body = f"""
    {BLOCK_TVM}
    import ctypes, torch
    torch.set_num_threads(2)
    library, counts = opened(), []
    omp = ctypes.CDLL(str(torch.__path__[0]) + "/lib/libtorch_cpu.so")
    body = ctypes.CFUNCTYPE(None, ctypes.c_void_p)(lambda _: counts.append(threads(library)))
    omp.GOMP_parallel(body, None, 2, 0)
    print(counts)
    """
    assert run(library, body) == ["[1,", "1]"]


def test_a_library_without_a_launch_function_uses_the_pool_of_tvm(plain):
    body = f"""
    {BLOCK_TVM}
    from kivi_tvm.runtime.library import configure_threads
    library = opened()
    for n in (3, 1, 2, 2, 8):
        print(configure_threads(n), threads(library))
    assert not library.on_torch_threads and "tvm.base" not in sys.modules
    """
    words = run(plain, body, TVM_NUM_THREADS="4")
    assert words == ["3", "3", "1", "1", "2", "2", "2", "2", "4", "4"]


def test_default_is_every_processor_unpinned(plain):
    body = f"""
    {BLOCK_TVM}
    import os
    from kivi_tvm.host import available_processors
    from kivi_tvm.runtime.library import configure_threads
    before = os.sched_getaffinity(0)
    n = available_processors()
    library = opened()
    assert (configure_threads(n), threads(library)) == (n, n)
    tasks = [os.sched_getaffinity(int(task)) for task in os.listdir("/proc/self/task")]
    assert all(allowed == before for allowed in tasks), tasks
    print(os.environ["TVM_BIND_THREADS"], os.environ["TVM_NUM_THREADS"] == str(n))
    """
    assert run(plain, body) == ["0", "True"]


def test_threads_are_configured_per_python_thread(plain):
    body = f"""
    {BLOCK_TVM}
    from concurrent.futures import ThreadPoolExecutor
    from kivi_tvm.runtime.library import configure_threads
    library = opened()
    configure_threads(1)
    with ThreadPoolExecutor(1) as pool:
        print(pool.submit(configure_threads, 3).result(), pool.submit(threads, library).result())
    print(threads(library))
    """
    assert run(plain, body, TVM_NUM_THREADS="4") == ["3", "3", "1"]


@pytest.mark.parametrize(
    "order",
    [
        "import torch; library = opened()",
        "library = opened(); import torch",
        "import tvm, torch; library = opened()",
        "library = opened(); import torch, tvm",
        pytest.param("import torch, tvm; library = opened()", marks=pytest.mark.slow),
        pytest.param("library = opened(); import tvm, torch", marks=pytest.mark.slow),
    ],
)
def test_any_order_of_torch_tvm_and_the_library(library, order):
    body = f"""
    {order}
    print(threads(library) > 0)
    if "tvm" in sys.modules:
        import parallel_kernel
        from kivi_tvm.runtime.library import Library
        print(threads(Library(parallel_kernel.compiled(), "in-process")) > 0)
    """
    assert run(library, body) == ["True"] * (1 + ("tvm" in order))


def test_runtime_library_by_variable_and_its_error(library, tmp_path):
    body = f"""
    {BLOCK_TVM}
    print(threads(opened()) > 0)
    """
    runtime = tmp_path / "moved" / "libtvm_runtime.so"
    runtime.parent.mkdir()
    runtime.write_bytes(find_runtime_library().read_bytes())
    assert run(library, body, KIVI_TVM_RUNTIME_LIBRARY=str(runtime)) == ["True"]
    runtime.write_bytes(b"not a library")
    body = f"""
    {BLOCK_TVM}
    from kivi_tvm.runtime.library import LibraryError
    try:
        opened()
    except LibraryError as error:
        print("raised", "runtime library" in str(error))
    """
    assert run(library, body, KIVI_TVM_RUNTIME_LIBRARY=str(runtime)) == ["raised", "True"]


def test_errors_name_the_file(library, tmp_path):
    from kivi_tvm.runtime.library import LibraryError, open_library

    with pytest.raises(LibraryError, match=r"threads\.so has no function 'absent'"):
        open_library(library)["absent"]
    broken = tmp_path / "broken.so"
    broken.write_bytes(b"text")
    with pytest.raises(LibraryError, match=r"cannot open .*broken\.so"):
        open_library(broken)


def test_a_name_without_a_slash_is_a_file(library, monkeypatch):
    from kivi_tvm.runtime.library import open_library

    monkeypatch.chdir(library.parent)
    assert open_library(Path(library.name)).origin == str(library)


def test_thread_count_must_be_positive():
    from kivi_tvm.runtime.library import configure_threads

    with pytest.raises(ValueError, match="`n` must be at least 1, got 0"):
        configure_threads(0)
