"""The benchmarks: the baseline computes the op, the gate lets nothing wrong through, bytes are counted exactly.

pytest tests/test_benchmarks.py
"""

import json
import time
from functools import partial

import PIL
import pytest
import torch
from PIL import Image
from timm.data.transforms import RandomResizedCropAndInterpolation

from benchmarks import attention, baseline, contenders, features, gpu, input_pipeline, model_step, training_loop
from benchmarks.baseline import literal_pola_pp, literal_polarity_attention, patched_model_attention, patched_pola_pp
from benchmarks.common import Spread, WrongResultError, interleaved, ratios
from benchmarks.contenders import KERNELS
from data import opencv_operations
from data.sources.base import decode_fast
from models.kernels import polarity
from models.ops.polarity_attention import polarity_attention
from models.pola_pp import PolaPP
from utils.memory import saved_bytes

CPU = torch.device("cpu")
ROTATED = ("polarity_pp", "norm_aware", "nala_cosine")


@pytest.mark.parametrize(
    ("kernel", "d", "given"),
    [
        *(("polarity", d, {"keys": 5, "surroundings": given}) for d in (1, 7, 8) for given in (False, True)),
        *((kernel, 8, {}) for kernel in ROTATED),
    ],
)
def test_baseline_equals_the_reference_in_float64(kernel, d, given):
    inputs = contenders.make_inputs((2, 12, 3, d), torch.float64, CPU, KERNELS[kernel], **given)
    inputs = {name: tensor.detach().double().requires_grad_() for name, tensor in inputs.items()}
    out = KERNELS[kernel].literal(**inputs)
    expected = KERNELS[kernel].op(**inputs, backend="reference")
    assert torch.allclose(out, expected, rtol=1e-12, atol=1e-10 if kernel == "nala_cosine" else 1e-13)
    leaves, cotangent = list(inputs.values()), torch.randn_like(out)
    gradients = torch.autograd.grad(out, leaves, cotangent)
    for gradient, wanted in zip(gradients, torch.autograd.grad(expected, leaves, cotangent), strict=True):
        assert torch.allclose(gradient, wanted, rtol=1e-9, atol=1e-11)


def test_baseline_refuses_a_key_mask():
    inputs = contenders.make_inputs((1, 4, 1, 8), torch.float32, CPU)
    with pytest.raises(ValueError, match="has no key mask"):
        literal_polarity_attention(**inputs, key_mask=torch.ones(1, 4, dtype=torch.bool))


def test_literal_polaformer_pp_equals_the_model_in_float64():
    torch.manual_seed(0)
    sizes = {"embed_dims": (8, 16, 16, 24), "depths": (1, 2, 1, 1), "num_heads": (1, 2, 2, 3), "projection": 20}
    model = PolaPP(**sizes, num_classes=5, drop_path_rate=0.0).double()
    for parameter in model.parameters():
        parameter.data.add_(0.3 * torch.randn_like(parameter))
    images, parameters = torch.randn(2, 3, 52, 40, dtype=torch.float64), list(model.parameters())
    out = model(images)
    with patched_pola_pp():
        literal = model(images)
    assert torch.equal(literal, literal_pola_pp(model, images)) and not torch.equal(literal, out)
    assert torch.allclose(literal, out, rtol=1e-11, atol=1e-12)
    for gradient, wanted in zip(
        torch.autograd.grad(literal.square().sum(), parameters),
        torch.autograd.grad(out.square().sum(), parameters),
        strict=True,
    ):
        assert torch.allclose(gradient, wanted, rtol=1e-8, atol=1e-10)


def test_patch_reaches_the_models_and_is_undone():
    ours = polarity.polarity_attention
    seen = []

    def fail_inside():
        with patched_model_attention(literal_polarity_attention):
            seen.append(polarity.polarity_attention)
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail_inside()
    assert seen == [literal_polarity_attention]
    assert polarity.polarity_attention is ours


# ---------------------------------------------------------------------------------------------------------------------
# The correctness gate
# ---------------------------------------------------------------------------------------------------------------------


def _swapped_streams(q, *others, **named):
    return polarity_attention(-q, *others, **named)


def _rescaled_exponent_gradient(q, k, v, exponent, **named):
    return polarity_attention(q, k, v, exponent.detach() + 1.01 * (exponent - exponent.detach()), **named)


def _position_left_out(*tensors, position=None, **named):
    return polarity_attention(*tensors, position=None if position is None else 0 * position, **named)


def _not_finite(*tensors, **named):
    return polarity_attention(*tensors, **named) * float("nan")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_gate_accepts_the_eager_backend(dtype):
    errors = contenders.require_correct({"eager": partial(polarity_attention, backend="eager")}, (2, 16), dtype, CPU)
    assert set(errors) == {"baseline", "eager"}
    tensors = {"output", *(f"gradient of {name}" for name in ("q", "k", "v", "exponent"))}
    fused = {"gradient of scale", "gradient of position"}
    assert set(errors["eager"]) == tensors | {f"{tensor}, with scale and position" for tensor in tensors | fused}
    assert all(0 < entry["error"] <= entry["allowed"] for entry in errors["eager"].values())


@pytest.mark.parametrize("name", ROTATED)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gate_of_rotated_kernels_accepts_the_eager_backend_and_rejects_other_positions(name, dtype):
    kernel = KERNELS[name]
    eager = {"eager": partial(kernel.op, backend="eager")}
    errors = contenders.require_correct(eager, (2, 16), dtype, CPU, kernel=kernel)
    assert set(errors["eager"]) == {"output", *(f"gradient of {each}" for each in ("q", "k", "v", *kernel.learned))}
    assert all(0 < entry["error"] <= entry["allowed"] for entry in errors["eager"].values())

    def shifted(q, *others, **named):
        return kernel.op(q.roll(1, 1), *others, backend="eager", **named).roll(-1, 1)

    with pytest.raises(WrongResultError, match="planted at .*: output is off by"):
        contenders.require_correct({"planted": shifted}, (2, 16), dtype, CPU, kernel=kernel)


@pytest.mark.parametrize(
    ("wrong", "named", "dtype"),
    [
        (_swapped_streams, "output", torch.float32),
        (_swapped_streams, "output", torch.bfloat16),
        (_rescaled_exponent_gradient, "gradient of exponent", torch.float32),
        (_position_left_out, "output, with scale and position", torch.float32),
        (_position_left_out, "output, with scale and position", torch.bfloat16),
        (_not_finite, "output", torch.float32),
    ],
)
def test_gate_rejects_a_wrong_op(wrong, named, dtype):
    with pytest.raises(WrongResultError, match=f"planted at .*: {named} is off by"):
        contenders.require_correct({"planted": wrong}, (2, 16), dtype, CPU)


def test_nothing_is_timed_or_written_after_a_wrong_result(tmp_path, monkeypatch):
    kernel = KERNELS["polarity"]._replace(op=_planted_for_eager)
    monkeypatch.setitem(KERNELS, "polarity", kernel)
    monkeypatch.setattr(attention, "measure_shape", lambda *_: pytest.fail("timed"))
    with pytest.raises(SystemExit, match="nothing is timed that is wrong: eager"):
        attention.main(["--device", "cpu", "--shapes", "1,16,1,8", "--output", str(tmp_path)])
    assert not list(tmp_path.iterdir())


def _planted_for_eager(*tensors, backend, **named):
    op = _swapped_streams if backend == "eager" else polarity_attention
    return op(*tensors, backend=backend, **named)


def test_gate_of_whole_models_rejects_other_logits(monkeypatch):
    monkeypatch.setitem(model_step.OPS, "ours", _swapped_streams)
    setting = model_step.Setting("pola_swin_t", 1, 32, repeats=1, device="cpu", threads=None)
    with pytest.raises(WrongResultError, match="logits of pola_swin_t are off by"):
        model_step.measure_eager(setting, ["float32"])


def test_gate_of_whole_models_rejects_another_polaformer_pp(monkeypatch):
    monkeypatch.setattr(baseline, "literal_pola_pp", lambda model, images: literal_pola_pp(model, images.flip(-1)))
    setting = model_step.Setting("pola_pp_b0", 2, 32, repeats=1, device="cpu", threads=None)
    with pytest.raises(WrongResultError, match="logits of pola_pp_b0 are off by"):
        model_step.measure_eager(setting, ["float32"])


# ---------------------------------------------------------------------------------------------------------------------
# Counting and timing
# ---------------------------------------------------------------------------------------------------------------------


def test_saved_bytes_counts_each_storage_once_and_no_parameter():
    x = torch.randn(10, 20, requires_grad=True)
    weight = torch.randn(20, 5, requires_grad=True)

    def function():
        exponential = x.exp()  # saves its result, 10 × 20
        product = exponential @ weight  # saves the same result, and the weight
        return exponential.T.sigmoid(), product.square()  # saves a second 10 × 20, and the product, 10 × 5

    assert saved_bytes(function) == 4 * (200 + 100 + 200 + 50)
    assert saved_bytes(function, excluded=[weight]) == 4 * (200 + 200 + 50)


def test_saved_bytes_counts_whole_storages_and_saved_inputs():
    x = torch.randn(100, requires_grad=True)
    assert saved_bytes(lambda: x[:10].square()) == 4 * 100
    assert saved_bytes(lambda: x + 1) == 0


def test_eager_op_saves_its_inputs_and_the_state():
    B, N, h, d = 2, 64, 3, 8
    contender = contenders.Contender(
        partial(polarity_attention, backend="eager"),
        contenders.make_inputs((B, N, h, d), torch.float32, CPU),
        torch.float32,
    )
    assert contender.saved_bytes() == 4 * (3 * B * N * h * d + B * h * (d + 1) * 2 * d)


def test_rounds_are_paired_and_alternate():
    order = []
    contenders = {name: partial(lambda name: order.append(name) or len(order), name) for name in ("a", "b")}
    samples = interleaved(contenders, repeats=2, warmup=1)
    assert order == ["b", "a", "a", "b", "b", "a"]
    assert samples == {"a": [3, 6], "b": [4, 5]}
    spread = ratios([3.0, 6.0, 8.0], [1.0, 1.0, 4.0])
    assert (spread.low, spread.median, spread.high) == (2.0, 3.0, 6.0)


# ---------------------------------------------------------------------------------------------------------------------
# The programs
# ---------------------------------------------------------------------------------------------------------------------


def test_attention_writes_its_results(tmp_path, capsys):
    arguments = ["--shapes", "2,16,1,8", "1,9,2,7", "--lengths", "16", "32", "--output", str(tmp_path)]
    attention.main(["--device", "cpu", *arguments])
    (path,) = tmp_path.glob("*.json")
    results = json.loads(path.read_text())
    assert path.name == f"attention-float32-cpu-1-threads-{results['environment']['date']}.json"
    assert path.with_suffix(".png").read_bytes()[:4] == b"\x89PNG"
    assert str(tmp_path) not in path.read_text()
    assert results["environment"].keys() >= {"device_name", "threads", "cpu_flags", "torch", "git_revision"}
    assert [record["shape"] for record in results["shapes"]] == [[2, 16, 1, 8], [1, 9, 2, 7]]
    for record in results["shapes"]:
        assert set(record["contenders"]) == {"baseline", "eager", "softmax", "materialised features"}
        eager = record["contenders"]["eager"]
        assert eager["total_ms"]["low"] <= eager["total_ms"]["median"] <= eager["total_ms"]["high"]
        assert eager["speedup"].keys() == {"median", "low", "high"}
    first = results["shapes"][0]
    assert first["bytes"] == {"forward": 4 * 4 * 256, "backward": 7 * 4 * 256, "total": 11 * 4 * 256}
    floor = 1e3 * first["bytes"]["total"] / results["copy_bytes_per_s"]["median"]
    assert first["floor_ms"]["total"] == pytest.approx(floor)
    assert {(record["contender"], record["N"]) for record in results["lengths"]} == {
        (name, N) for name in ("baseline", "eager", "softmax") for N in (16, 32)
    }
    assert all(bar.keys() == {"what", "measured", "bound", "direction", "met"} for bar in results["bars"])
    assert "| what " in capsys.readouterr().out


@pytest.mark.parametrize("kernel", ROTATED)
def test_attention_of_another_kernel_has_a_file_of_its_own(kernel, tmp_path):
    arguments = ["--kernel", kernel, "--shapes", "2,16,1,8", "--lengths", "16"]
    attention.main(["--device", "cpu", *arguments, "--output", str(tmp_path)])
    (path,) = tmp_path.glob("*.json")
    results = json.loads(path.read_text())
    date = results["environment"]["date"]
    assert path.name == f"attention-{kernel}-float32-cpu-1-threads-{date}.json"
    assert results["kernel"] == kernel
    assert [(bar["bound"], bar["direction"]) for bar in results["bars"]] == [(0.35, "at most")]
    assert set(results["shapes"][0]["contenders"]) == {"baseline", "eager", "softmax", "materialised features"}
    assert attention.parse_arguments(["--device", "cpu", "--kernel", kernel]).shapes == contenders.MAP_SHAPES


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--kernel", "polarity_pp", "--surroundings"], "--surroundings and --compile are not there for polarity_pp"),
        (["--kernel", "polarity_pp", "--compile"], "--surroundings and --compile are not there for polarity_pp"),
        (["--kernel", "polarity_pp", "--shapes", "8,16,1,6"], "positions of polarity_pp need a d that divides by 4"),
        (
            ["--device", "cpu", "--backends", "triton"],
            "polarity has no triton on this device, expected some of eager, native, reference",
        ),
        (["--kernel", "polarity_pp", "--backends", "nonsense"], "polarity_pp has no nonsense on this device"),
        (["--shapes", "8,16,3"], "'8,16,3' is no shape: expected four integers B,N,h,d"),
        (["--repeats", "8"], "'8' repeats: expected an integer of at least 9"),
    ],
)
def test_wrong_arguments_are_named(arguments, message, capsys):
    with pytest.raises(SystemExit):
        attention.parse_arguments(arguments)
    assert message in capsys.readouterr().err


def test_bars_apply_where_they_are_meant():
    def contender(speedup, milliseconds, saved):
        return {
            "speedup": Spread.of([speedup]),
            "total_ms": Spread.of([milliseconds]),
            "saved_bytes": saved,
            "times_floor": 1.3,
        }

    contenders = {
        "baseline": contender(1.0, 10.0, 100),
        "eager": contender(2.5, 4.0, 20),
        "native": contender(4.4, 2.3, 20),
        "triton": contender(11.0, 0.9, 30),
        "softmax": contender(0.1, 100.0, 50),
    }
    cpu = {
        "shape": [8, 3136, 3, 32],
        "contenders": {name: contenders[name] for name in ("baseline", "eager", "native")},
    }
    bars = attention.shape_bars(cpu, CPU, "float32")
    assert [(bar.bound, bar.met) for bar in bars] == [(2.4, True), (4.5, False), (0.25, True)]
    assert [bar.bound for bar in attention.shape_bars(cpu, CPU, "bfloat16")] == [0.25]
    pp = {**cpu, "shape": [8, 784, 2, 64]}
    bars = attention.shape_bars(pp, CPU, "float32", KERNELS["polarity_pp"])
    assert [(bar.bound, bar.met) for bar in bars] == [(1.82, True), (0.35, True)]
    gpu = {"shape": [128, 3136, 3, 32], "contenders": contenders}
    bars = attention.shape_bars(gpu, torch.device("cuda"), "bfloat16")
    assert [(bar.bound, bar.met) for bar in bars] == [(1.4, True), (10.0, True), (1.0, True), (0.25, False)]


def test_a_training_step_of_both_sides_saves_less_with_ours():
    setting = model_step.Setting("pola_pvt_t", 1, 32, repeats=1, device="cpu", threads=None)
    record = model_step.measure_eager(setting, ["float32", "bfloat16"])
    assert record["saved_bytes"]["ours"] < record["saved_bytes"]["baseline"] and record["backend"] == "eager"
    assert [(step["side"], step["precision"]) for step in record["contenders"]] == [
        *((side, precision) for precision in ("float32", "bfloat16") for side in ("baseline", "ours")),
        *(("pvt_v2_b1", precision) for precision in ("float32", "bfloat16")),
    ]
    assert model_step.step_bars(record) == []  # they are for batch 8 at 224²
    full_size = model_step.step_bars({**record, "batch_size": 8, "image_size": 224})
    assert (full_size[0].bound, full_size[-1].bound, full_size[-1].direction) == (0.64, 1.05, "at most")
    assert 1.5 in [bar.bound for bar in full_size]


@pytest.mark.parametrize(("model", "parameters"), [("pola_pp_b0", 7_548_712), ("nalaformer_xt", 6_142_248)])
def test_rotary_pyramids_are_timed_beside_timm_models_of_their_size(model, parameters):
    setting = model_step.Setting(model, 2, 32, repeats=1, device="cpu", threads=None)
    record = model_step.measure_eager(setting, ["float32"])
    assert 0 < record["logits_error"] < 1e-5  # both sides were computed
    assert record["saved_bytes"]["ours"] < record["saved_bytes"]["baseline"]
    sizes = {step["side"]: step["parameters"] for step in record["contenders"]}
    assert list(sizes) == ["baseline", "ours", *model_step.TIMM_PEERS[model]]
    assert sizes["ours"] == sizes["baseline"] == parameters
    assert sizes["fastvit_t12"] == pytest.approx(7.55e6, rel=0.01)


def test_steps_of_the_gpu_program_have_limits_and_their_ends_are_told(tmp_path, monkeypatch, capsys):
    found = {"steps": [], "bars": [{"what": "speed", "measured": 2.0, "bound": 1.5, "direction": "at least"}]}
    (tmp_path / "result.json").write_text(json.dumps(found))
    write = tmp_path / "write.py"
    write.write_text(f"import shutil, sys; shutil.copy('{tmp_path}/result.json', sys.argv[1]); print('one', 'two')")
    fail, wait = tmp_path / "fail.py", tmp_path / "wait.py"
    fail.write_text("raise SystemExit('no such thing')")
    wait.write_text("import time; print('begun', flush=True); time.sleep(60)")
    steps = [
        gpu.Step("writes", f"{write} {{out}}", 60),
        gpu.Step("fails", str(fail), 60),
        gpu.Step("waits", str(wait), 1.0),
    ]
    monkeypatch.setattr(gpu, "STEPS", [*steps, gpu.Step("late", str(write), 60)])
    monkeypatch.setattr(gpu.time, "monotonic", iter([0, 0, 0, 1, 1, 1, 2, 2, 2, 3, 480, 480]).__next__)
    gpu.main(["--device", "cpu", "--output", str(tmp_path / "out")])
    (path,) = (tmp_path / "out").glob("gpu-cpu-*.json")
    results = json.loads(path.read_text())
    ends = {name: record["ended"] for name, record in results["steps"].items()}
    assert ends == {
        "writes": "finished",
        "fails": "exit code 1",
        "waits": "ended after 1 s",
        "late": "left out: no time was left",
    }
    assert results["steps"]["fails"]["last_lines"] == ["no such thing"]
    assert results["steps"]["waits"]["last_lines"] == ["begun"]
    assert [(bar["what"], bar["met"]) for bar in results["bars"]] == [("speed", True)]
    assert "no such thing" in capsys.readouterr().out


def test_a_step_of_the_gpu_program_ends_with_all_that_it_has_started(tmp_path):
    """What a killed program has started would hold the output open; bytes and half a file lose no other step."""
    child = tmp_path / "child.py"
    child.write_text("import subprocess\nsubprocess.run(['sleep', '30'])")
    started = time.monotonic()
    assert gpu.run_step(gpu.Step("waits", str(child), 1), "cpu", tmp_path, 1)["ended"] == "ended after 1 s"
    assert time.monotonic() - started < 15
    child.write_text("import os, sys\nos.write(1, b'\\xff')\nopen(sys.argv[1] + '/half.json', 'w').write('{')")
    record = gpu.run_step(gpu.Step("writes", f"{child} {{out}}", 60), "cpu", tmp_path, 60)
    assert (record["ended"], record["result"]) == ("finished", None)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--device", "cuda"], "--device cuda: PyTorch finds no NVIDIA GPU"),
        (["--device", "cpu", "--output", "/dev/null/x"], "--output /dev/null/x: Not a directory"),
    ],
)
def test_what_cannot_end_well_is_not_begun(arguments, words, monkeypatch):
    monkeypatch.setattr(gpu.common.torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(gpu, "STEPS", [])
    with pytest.raises(SystemExit, match=f"^{words}"):
        gpu.main(arguments)


@pytest.mark.slow
def test_the_gpu_program_can_be_rehearsed_on_a_cpu(tmp_path):
    gpu.main(["--device", "cpu", "--output", str(tmp_path)])
    (path,) = tmp_path.glob("gpu-cpu-*.json")
    steps = json.loads(path.read_text())["steps"]
    assert {record["ended"] for record in steps.values()} == {"finished"}
    assert steps["training run"]["result"]["top1"][0] > 30 and path.with_suffix(".png").exists()


# ---------------------------------------------------------------------------------------------------------------------
# The input pipeline
# ---------------------------------------------------------------------------------------------------------------------


def test_input_images_differ_and_the_prepared_ones_have_the_short_side(tmp_path):
    data = input_pipeline.make_images(tmp_path, 4)
    plain, prepared = ([path for path in sorted((tmp_path / name).glob("*/*/*"))] for name in ("plain", "prepared"))
    assert [path.relative_to(tmp_path / "plain") for path in plain] == [
        path.relative_to(tmp_path / "prepared") for path in prepared
    ]
    assert len({path.read_bytes() for path in plain}) == len(plain) == 4 + 8
    assert {Image.open(path).size for path in plain} == {(500, 375)}
    assert {Image.open(path).size for path in prepared} == {(341, 256)}
    assert data["mean_kb"] > data["prepared_mean_kb"] > 10


def _brighter(content, name):
    image = decode_fast(content, name)
    return torch.where(image < 255, image + 1, image)


def _shifted_crop(image, scale, ratio):
    top, left, height, width = REAL_CROP(image, scale, ratio)
    return top, max(left - (not isinstance(image, Image.Image)), 0), height, width


REAL_CROP = RandomResizedCropAndInterpolation.get_params


@pytest.mark.parametrize(
    ("target", "name", "planted", "message"),
    [
        (input_pipeline, "decode_fast", _brighter, "decoding deviates by 0.9"),
        (RandomResizedCropAndInterpolation, "get_params", staticmethod(_shifted_crop), "random resized crop deviates"),
        (opencv_operations, "_look_up", lambda image, levels: image, "augmentation with AUG.BACKEND opencv deviates"),
        (input_pipeline, "repair_posterize", lambda steps: steps.pop(1), "ours with pillow .* deviates"),
    ],
    ids=["pixels", "crop", "no levels", "no flip"],
)
def test_input_gate_rejects_what_is_not_the_same(target, name, planted, message, tmp_path, monkeypatch):
    monkeypatch.setattr(target, name, planted)
    monkeypatch.setattr(input_pipeline, "measure_loaders", lambda *_: pytest.fail("timed"))
    with pytest.raises(SystemExit, match=f"nothing is timed that is wrong: {message}"):
        input_pipeline.main(["--images", "8", "--batch-size", "4", "--output", str(tmp_path)])
    assert not list(tmp_path.iterdir())


def test_input_pipeline_writes_its_results(tmp_path, capsys):
    arguments = ["--images", "4", "--batch-size", "2", "--repeats", "9", "--entries", "50", "100"]
    input_pipeline.main([*arguments, "--output", str(tmp_path)])
    (path,) = tmp_path.glob("*.json")
    results = json.loads(path.read_text())
    assert path.name == f"input_pipeline-cpu-1-threads-{results['environment']['date']}.json"
    assert results["environment"].keys() >= {"pillow", "simplejpeg", "torchvision", "timm", "git_revision"}
    assert str(tmp_path) not in path.read_text()
    deviations = results["deviations"]
    assert deviations["decoding"] == {"mean": 0.0, "max": 0, "share_differing": 0.0}
    assert 0 < deviations["augmentation with AUG.BACKEND opencv"]["mean"] < 0.5 and results["opencv"]
    largest = 0.1 if int(PIL.__version__.partition(".")[0]) >= 13 else 0.3
    assert 0 < deviations["random resized crop"]["mean"] < largest
    loaders = results["loaders"]
    assert list(loaders) == [
        "torchvision + timm",
        "ours, pillow",
        "ours, simplejpeg",
        "ours, simplejpeg, short side 256",
        "ours, simplejpeg + opencv",
        "ours, simplejpeg + opencv, short side 256",
    ]
    for entry in loaders.values():
        rate, milliseconds = entry["images_per_s"], entry["ms_per_image"]
        assert rate["low"] <= rate["median"] <= rate["high"]
        assert rate["median"] == pytest.approx(1e3 / milliseconds["median"])
    assert loaders["torchvision + timm"]["speedup"] == {"median": 1.0, "low": 1.0, "high": 1.0}
    assert [bar["bound"] for bar in results["bars"]] == [1.4, 1.9, 2.4, 3.0, 150.0, 1.0]
    assert results["bars"][0]["measured"] == loaders["ours, simplejpeg"]["speedup"]["median"]
    assert results["memory"][1]["index_bytes"] < 100 * 80
    printed = capsys.readouterr().out
    assert "Ours leaves normalisation and erasing to the device" in printed and "| what " in printed


def test_input_bars_are_judged_by_growth_and_size():
    memory = [
        {"entries": 100, "index_bytes": 6000, "bytes_kept_by_reading": 500},
        {"entries": 1100, "index_bytes": 132_000, "bytes_kept_by_reading": 2500},
    ]
    index, kept = input_pipeline.memory_bars(memory)
    assert index.measured == pytest.approx(120 * 1_281_167 / 2**20) and index.met
    assert kept.measured == 2.0 and not kept.met


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--repeats", "8"], "--repeats 8: expected at least 9"),
        (["--images", "4", "--batch-size", "5"], "--batch-size 5: expected 1 to --images 4"),
        (["--entries", "10", "10"], "--entries 10 10: expected the smaller number first"),
    ],
)
def test_wrong_arguments_of_the_input_benchmark_are_named(arguments, message, capsys):
    with pytest.raises(SystemExit):
        input_pipeline.parse_arguments(arguments)
    assert message in capsys.readouterr().err


# ---------------------------------------------------------------------------------------------------------------------
# Training loop
# ---------------------------------------------------------------------------------------------------------------------


def test_training_loop_writes_its_results(tmp_path, capsys):
    arguments = ["--steps", "3", "--repeats", "2", "--checkpoint-repeats", "0", "--threads", "1"]
    training_loop.main([*arguments, "--output", str(tmp_path)])
    (path,) = tmp_path.glob("training_loop-cpu-1-threads-*.json")
    results = json.loads(path.read_text())
    (bar,) = results["bars"]
    assert bar["measured"] == results["overhead"]["overhead_ms"]["median"] and "ms per step" in capsys.readouterr().out
    ours, bare = (results["overhead"]["step_ms"][name]["median"] for name in ("ours", "bare"))
    assert ours > 0 and bare > 0


def test_training_loops_that_differ_are_not_timed(tmp_path, monkeypatch):
    monkeypatch.setattr(training_loop, "clip_grad_norm_", lambda *arguments: None)
    monkeypatch.setattr(training_loop, "COMMON", training_loop.COMMON + " TRAIN.CLIP_GRAD 0.01")
    with pytest.raises(SystemExit, match="our loop and the bare one leave other weights"):
        training_loop.main(["--steps", "2", "--checkpoint-repeats", "0", "--output", str(tmp_path)])


@pytest.mark.slow
def test_checkpoints_of_the_training_loop_are_written(tmp_path, monkeypatch):
    monkeypatch.setattr(training_loop, "CHECKPOINT_EVERY", 2)
    monkeypatch.setattr(training_loop, "COMMON", training_loop.COMMON + " DATA.IMG_SIZE 32")
    record = training_loop.measure_checkpoints(tmp_path, 1, 1)
    assert record["steps"] == 24 and record["checkpoint_mib"] > 100
    assert len(list((tmp_path / "with").glob("*.pth"))) == 1


def test_features_benchmark_writes_ratios_and_bars(tmp_path, capsys):
    arguments = "--models pola_pvt_tiny --batch-size 1 --image-size 32 --repeats 3 --output"
    features.main([*arguments.split(), str(tmp_path)])
    (path,) = tmp_path.iterdir()
    content = json.loads(path.read_text())
    (record,) = content["models"]
    assert all(0 < ratio["low"] <= ratio["median"] <= ratio["high"] for ratio in record["ratio"].values())
    shown = capsys.readouterr().out
    assert all(f"pola_pvt_tiny: {key} over forward" in shown for key in ("forward_intermediates", "features_only"))
    assert record["ratio"].keys() == {"forward again", "forward_intermediates", "features_only"}
    assert [bar["bound"] for bar in content["bars"]] == [1.03, 1.03]


def test_features_benchmark_times_nothing_that_is_wrong(tmp_path, monkeypatch):
    monkeypatch.setattr("models.classifier._formatted", lambda tokens, grid, output_fmt: torch.rand(3))
    with pytest.raises(SystemExit, match="nothing is timed that is wrong: pola_pvt_tiny: .* features_only differ"):
        features.main(["--models", "pola_pvt_tiny", "--image-size", "32", "--output", str(tmp_path)])
    assert not list(tmp_path.iterdir())
