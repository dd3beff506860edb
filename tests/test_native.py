"""The native backend of polarity attention: building it, finding it, and what happens where it is not there.

pytest tests/test_native.py; its numbers are in tests/test_attention_accuracy.py and test_attention_non_finite.py
"""

import os
import re
import subprocess
import sys

import pytest
import torch
from attention_accuracy import make_inputs, make_mask, run
from conftest import ROOT
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from models.ops.polarity_attention import choose_backend, native, polarity_attention

CPU = torch.device("cpu")


@pytest.mark.parametrize("backend", ["native"])
def test_auto_takes_it_where_it_was_built(backend):
    assert choose_backend("auto", CPU) == "native" == choose_backend(backend, CPU)
    with pytest.raises(ValueError, match="native backend cannot run: it computes on a CPU, the queries are on meta"):
        choose_backend(backend, torch.device("meta"))


def test_without_the_file_auto_is_eager_and_the_name_says_how_to_build_it():
    assert choose_backend("auto", CPU) == "eager"
    with pytest.raises(ValueError, match=r"is not there: `python -m models\.ops\.polarity_attention` builds it"):
        choose_backend("native", CPU)


def test_a_damaged_file_is_left_out_with_a_warning(tmp_path, monkeypatch, caplog):
    monkeypatch.setenv(native.FOLDER_VARIABLE, str(tmp_path))
    native.library().write_bytes(b"\x7fELF but no more")
    native.is_loaded.cache_clear()
    try:
        if hasattr(torch.ops.polaformer_native, "features"):
            monkeypatch.setattr(torch.ops, "polaformer_native", object())
        assert choose_backend("auto", CPU) == "eager"
        assert "the native backend is left out" in caplog.text and "remove that file" in caplog.text
    finally:
        native.is_loaded.cache_clear()


@pytest.mark.parametrize("folder", ["/root/of/another", "x" * 300, "~/nobody"])
def test_auto_is_eager_where_the_folder_cannot_be_looked_into(folder, monkeypatch):
    """One of another user (stat says no), a name too long, and no home directory."""

    def stat(path, **_):
        raise PermissionError(13, "Permission denied", path)

    monkeypatch.setenv(native.FOLDER_VARIABLE, folder)
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)
    if folder.startswith("/"):
        monkeypatch.setattr(os, "stat", stat)
    native.is_loaded.cache_clear()
    assert choose_backend("auto", CPU) == "eager"
    monkeypatch.undo()
    native.is_loaded.cache_clear()


def test_without_a_home_directory_building_asks_for_a_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in (native.FOLDER_VARIABLE, "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)  # what it does for a user without entry
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")
    monkeypatch.setenv("CXX", "true")
    with pytest.raises(RuntimeError, match=f"no home directory .* name a folder by {native.FOLDER_VARIABLE}"):
        native.build()
    assert not list(tmp_path.iterdir())


def test_the_compiler_may_have_arguments(tmp_path, monkeypatch):
    monkeypatch.setenv("CXX", "false --ours")
    monkeypatch.setenv(native.FOLDER_VARIABLE, str(tmp_path))
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")
    with pytest.raises(RuntimeError, match="false failed"):
        native.build()


@pytest.mark.parametrize(
    ("compiler", "capability", "folder", "words"),
    [
        ("no-such-compiler", "AVX2", ".", "no-such-compiler is not there: install a C++ compiler"),
        ("false", "AVX2", ".", "false failed"),
        ("false", "DEFAULT", ".", "has none of AVX512, AVX2"),
        ("false", "AVX2", "/dev/null/folder", "Not a directory"),
    ],
)
def test_what_hinders_building_is_told_and_leaves_nothing(compiler, capability, folder, words, tmp_path, monkeypatch):
    monkeypatch.setenv("CXX", compiler)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    monkeypatch.setenv(native.FOLDER_VARIABLE, str(tmp_path / folder))
    with pytest.raises((RuntimeError, OSError), match=re.escape(words)):
        native.build()
    assert not list(tmp_path.iterdir())


def test_the_command_that_builds_it_ends_in_one_line(tmp_path):
    environment = {**os.environ, native.FOLDER_VARIABLE: str(tmp_path), "CXX": "no-such-compiler"}
    command = [sys.executable, "-m", "models.ops.polarity_attention"]
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert (result.returncode, result.stderr.count("\n")) == (2, 1) and "install a C++ compiler" in result.stderr


def test_the_name_of_the_file_has_source_processor_and_torch(monkeypatch, tmp_path):
    first = native.library()
    assert torch.__version__ in first.name
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2 of another")
    assert native.library() != first
    monkeypatch.undo()
    changed = tmp_path / "native.cpp"
    changed.write_bytes(native.SOURCE.read_bytes() + b"\n")
    monkeypatch.setattr(native, "SOURCE", changed)
    assert native.library() != first


@pytest.mark.parametrize("backend", ["native"])
def test_threads_do_not_change_a_bit(backend):
    inputs, mask = make_inputs(300, 280, 24, torch.float32, B=3, surroundings=True), make_mask(3, 280)
    cotangent = torch.randn(3, 300, 2, 24, generator=torch.Generator().manual_seed(3))
    one = run(backend, inputs, mask, cotangent)
    torch.set_num_threads(2)
    try:
        two = run(backend, inputs, mask, cotangent)
    finally:
        torch.set_num_threads(1)
    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))


@pytest.mark.parametrize("backend", ["native"])
@pytest.mark.parametrize("order", [(0, 1, 2, 3), (0, 2, 1, 3), (3, 2, 1, 0)])
def test_any_layout_in_memory(backend, order):
    """Rows of one projection, heads before tokens, and channels that are not neighbours."""
    inputs = make_inputs(20, 17, 9, torch.float32, B=2)
    cotangent = torch.randn(2, 20, 2, 9, generator=torch.Generator().manual_seed(3))
    expected = run(backend, inputs, None, cotangent)
    back = [order.index(axis) for axis in range(4)]
    other = [t.detach().permute(order).contiguous().permute(back).requires_grad_() for t in inputs[:3]]
    upstream = cotangent.permute(order).contiguous().permute(back)
    for value, wanted in zip(run(backend, [*other, *inputs[3:]], None, upstream), expected, strict=True):
        assert torch.equal(value, wanted)


@pytest.mark.parametrize("backend", ["native"])
def test_torch_compile_traces_the_functions_of_eager(backend):
    q, k, v, exponent, *_ = make_inputs(20, 17, 8, torch.float32, B=2)
    op = torch.compile(lambda *t: polarity_attention(*t, backend=backend), fullgraph=True, backend="aot_eager")
    out = op(q, k, v, exponent)
    assert torch.allclose(out, polarity_attention(q, k, v, exponent, backend="eager"), rtol=1e-6)
    (gradient,) = torch.autograd.grad(out.sum(), q)
    assert gradient.isfinite().all()


@pytest.mark.parametrize("backend", ["native"])
@pytest.mark.parametrize("named", ["native", "auto"])
def test_tracers_and_planners_of_memory_see_operators(backend, named):
    """Tensors without memory get shapes and gradients, and a traced graph computes anew with other inputs."""
    first, other = (make_inputs(20, 17, 8, torch.float32, B=2, seed=seed)[:4] for seed in (0, 1))
    with FakeTensorMode() as mode:
        fakes = [mode.from_tensor(t).detach().requires_grad_() for t in first]
        out = polarity_attention(*fakes, backend=named)
        assert out.shape == first[0].shape
        assert [g.shape for g in torch.autograd.grad(out.sum(), fakes)] == [t.shape for t in first]
    with torch.no_grad():
        graph = make_fx(lambda *t: polarity_attention(*t, backend=named))(*first)
        assert torch.equal(graph(*other), polarity_attention(*other, backend=named))
