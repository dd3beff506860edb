"""Other people's programs, each a function that puts a model into one and asserts what comes out.

`python tests/clients.py CLIENT` runs one in a process of its own, whose PYTHONPATH has its packages.
"""

import copy
import io
import pickle
import sys
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
import timm
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

import models  # registers the variants with timm
from config import load_config

ROOT = Path(__file__).resolve().parents[1]
IMAGES = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(1))
PYRAMID = {
    "embed_dims": (16, 32),
    "depths": (1, 1),
    "num_heads": (1, 2),
    "mlp_ratios": (2, 2),
    "projection": 40,
    "layer_init_values": (1, 1),
    "stage_types": "LS",
}
SIZES = {
    "pola_swin_tiny": {"embed_dim": 16, "depths": (1, 2), "num_heads": (1, 2), "attn_type": "LS"},
    "pola_pvt_tiny": {
        "embed_dims": (16, 32),
        "depths": (1, 1),
        "num_heads": (1, 2),
        "mlp_ratios": (2, 2),
        "attn_type": "LS",
    },
    "pola_pp_b0": PYRAMID,
    "nalaformer_xt": PYRAMID,
}


def small(name: str, **options: object) -> nn.Module:
    """In evaluation mode, none of whose parameters is what an initialisation makes of it."""
    torch.manual_seed(0)
    model = timm.create_model(name, img_size=64, num_classes=5, **SIZES[name], **options).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return model


class Client(NamedTuple):
    run: Callable[[str], None]
    packages: tuple[str, ...]  # pinned, to be installed; none: what the tests need anyway


CLIENTS: dict[str, Client] = {}


def client(row: str, *packages: str) -> Callable:
    """What runs a row of docs/models.md, by its first cell, with pinned packages that the cell names."""

    def register(run: Callable[[str], None]) -> Callable:
        CLIENTS[row] = Client(run, packages)
        return run

    return register


def same(out: Tensor, expected: Tensor, atol: float = 1e-5) -> None:
    torch.testing.assert_close(out, expected, rtol=0, atol=atol)


# -- PyTorch's own


@client("`copy.deepcopy`, `pickle`, `torch.save` of a whole model, `multiprocessing`")
def copies(name: str) -> None:
    model = small(name)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), torch.load(file, weights_only=False)):
        same(other(IMAGES), model(IMAGES), 0)


@client("`torch.compile(fullgraph=True)`, also with `dynamic=True`, with gradients")
def compiled(name: str) -> None:
    for options in ({}, {"dynamic": True}):
        torch._dynamo.reset()
        model = small(name)
        out = torch.compile(model, fullgraph=True, backend="aot_eager", **options)(IMAGES)
        same(out, model(IMAGES))
        gradients = torch.autograd.grad(out.square().sum(), list(model.parameters()))
        expected = torch.autograd.grad(model(IMAGES).square().sum(), list(model.parameters()))
        for value, wanted in zip(gradients, expected, strict=True):
            torch.testing.assert_close(value, wanted, rtol=1e-3, atol=1e-4 * wanted.abs().max().item())


@client("`torch.export`, also called with gradients; `torch.onnx.export(dynamo=True)`")
def exported(name: str) -> None:
    import onnxruntime

    one_window = {"softmax_window_size": 8} if name == "pola_swin_tiny" else {}  # there layouts of kernels differ
    model, batch = small(name, **one_window), ({0: torch.export.Dim("batch")},)
    program = torch.export.export(model, (IMAGES,), dynamic_shapes=batch).module()
    same(program(IMAGES[:1]), model(IMAGES[:1]))
    program(IMAGES).square().sum().backward()
    with tempfile.TemporaryDirectory() as folder:
        torch.onnx.export(model, (IMAGES,), f"{folder}/m.onnx", dynamo=True, dynamic_shapes=batch, verbose=False)
        session = onnxruntime.InferenceSession(f"{folder}/m.onnx", providers=["CPUExecutionProvider"])
        (logits,) = session.run(None, {session.get_inputs()[0].name: IMAGES[:1].numpy()})
    same(torch.from_numpy(logits), model(IMAGES[:1]))


@client("double backward (`create_graph=True`, `torch.autograd.functional.hvp`, timm's AdaHessian)")
def double_backward(name: str) -> None:
    def twice(model: nn.Module) -> Tensor:
        images = IMAGES.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(model(images).sum(), images, create_graph=True)
        return torch.autograd.grad(gradient.square().sum(), images)[0]

    with pytest.raises(RuntimeError, match="backend='reference'"):
        twice(small(name))
    if name == "pola_pvt_tiny":  # Swin's bias, which is learned, already keeps PyTorch from its fused kernel
        with pytest.raises(RuntimeError, match="flash_attention_for_cpu_backward is not implemented"):
            twice(small(name, backend="reference"))
    with sdpa_kernel(SDPBackend.MATH):
        assert twice(small(name, backend="reference")).abs().max() > 0


@client("`torch.nn.utils.prune`, also trained with, and `parametrizations.weight_norm`")
def reparametrised(name: str) -> None:
    from torch.nn.utils import prune
    from torch.nn.utils.parametrizations import weight_norm

    model, untouched = small(name), small(name)
    weights = [(module, "weight") for module in model.modules() if isinstance(module, nn.Linear | nn.Conv2d)]
    prune.global_unstructured(weights, pruning_method=prune.L1Unstructured, amount=0.3)
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    for _ in range(2):
        model(IMAGES).square().sum().backward()
        optimizer.step()
    expected = model(IMAGES)
    for module, weight in weights:
        prune.remove(module, weight)
    same(model(IMAGES), expected)
    for module in list(untouched.modules()):
        if isinstance(module, nn.Linear | nn.Conv2d):
            weight_norm(module)
    same(untouched(IMAGES), small(name)(IMAGES))


@client("`AveragedModel`, timm's `ModelEmaV3` and `freeze`")
def averaged(name: str) -> None:
    from timm.utils import ModelEmaV3, freeze
    from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

    model = small(name)
    mean, moving = AveragedModel(model, use_buffers=True), ModelEmaV3(model)
    exponential = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9))
    truncated = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9), use_buffers=True)
    for average in (mean, exponential, truncated):
        for _ in range(3):
            average.update_parameters(model)
    moving.update(model)
    for average in (mean, exponential, moving):
        same(average.eval()(IMAGES), model(IMAGES))
    if name == "pola_swin_tiny":  # PyTorch averages the integers of its index, and cuts them off
        assert (truncated.eval()(IMAGES) - model(IMAGES)).abs().max() > 1e-5
    freeze(model)
    assert not any(parameter.requires_grad for parameter in model.parameters())


@client("`torch.ao.quantization.quantize_dynamic`, `prepare_fx` and `convert_fx`")
def quantised(name: str) -> None:
    from torch.ao.quantization import get_default_qconfig_mapping, quantize_dynamic
    from torch.ao.quantization.quantize_fx import convert_fx, prepare_fx

    model = small(name)
    expected = model(IMAGES)
    same(quantize_dynamic(copy.deepcopy(model), {nn.Linear})(IMAGES), expected, 0.2 * expected.abs().max().item())
    prepared = prepare_fx(copy.deepcopy(model), get_default_qconfig_mapping("x86"), (IMAGES,))
    prepared(IMAGES)
    same(convert_fx(prepared)(IMAGES), expected, 0.2 * expected.abs().max().item())


@client("`torch.utils.checkpoint`, `DataParallel` on a CPU, `inference_mode`, `channels_last`, hooks, a profiler")
def runs(name: str) -> None:
    from torch.utils.checkpoint import checkpoint

    model = small(name)
    expected = model(IMAGES)
    same(checkpoint(model, IMAGES.clone().requires_grad_(), use_reentrant=False), expected)
    same(nn.DataParallel(model)(IMAGES), expected)
    with torch.inference_mode():
        same(model(IMAGES), expected)
    laid_out = copy.deepcopy(model).to(memory_format=torch.channels_last)
    same(laid_out(IMAGES.to(memory_format=torch.channels_last)), expected)
    with torch.profiler.profile(with_flops=True, with_modules=True) as profile:
        same(model(IMAGES), expected)
    assert any(event.flops for event in profile.key_averages())
    for module in model.modules():
        module.register_full_backward_hook(lambda *_: None)
    model(IMAGES).sum().backward()


@client("`safetensors.torch.save_model` and `load_model`; `huggingface_hub.PyTorchModelHubMixin`; timm's `save_for_hf`")
def stored(name: str) -> None:
    from huggingface_hub import PyTorchModelHubMixin
    from safetensors.torch import load_model, save_model
    from timm.models import save_for_hf

    class Wrapped(nn.Module, PyTorchModelHubMixin):
        def __init__(self, name: str = name) -> None:
            super().__init__()
            self.model = timm.create_model(name, img_size=64, num_classes=5, **SIZES[name])

    model, wrapped = small(name), Wrapped()
    wrapped.model.load_state_dict(model.state_dict())
    with tempfile.TemporaryDirectory() as folder:
        save_model(model, f"{folder}/alone.safetensors")
        other = timm.create_model(name, img_size=64, num_classes=5, **SIZES[name]).eval()
        load_model(other, f"{folder}/alone.safetensors")
        wrapped.save_pretrained(f"{folder}/mixin")
        save_for_hf(model, f"{folder}/timm", model_args={"img_size": 64, **SIZES[name]}, safe_serialization=True)
        for again in (
            other,
            Wrapped.from_pretrained(f"{folder}/mixin").eval().model,
            timm.create_model(f"local-dir:{folder}/timm", pretrained=True).eval(),
        ):
            same(again(IMAGES), model(IMAGES), 0)


@client("FSDP2 (`fully_shard`) with a bfloat16 policy, also from the meta device")
def sharded(name: str) -> None:
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        _sharded(name)
    finally:
        torch.distributed.destroy_process_group()


def _sharded(name: str) -> None:
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    mesh = torch.distributed.init_device_mesh("cpu", (1,))
    expected = small(name)
    for start in ("cpu", "meta"):
        with torch.device(start):
            model = timm.create_model(name, img_size=64, num_classes=5, **SIZES[name]).eval()
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):  # its running statistics stay float32, and so have its weights to
                fully_shard(module, mesh=mesh, mp_policy=MixedPrecisionPolicy(output_dtype=torch.bfloat16))
        fully_shard(model, mesh=mesh, mp_policy=policy)
        if start == "meta":
            model.to_empty(device="cpu")
        with torch.no_grad():
            for parameter, value in zip(model.parameters(), expected.parameters(), strict=True):
                parameter.to_local().copy_(value)
            for buffer, value in zip(model.buffers(), expected.buffers(), strict=True):
                buffer.copy_(value)
        out = model(IMAGES)
        same(out.float(), expected(IMAGES), 0.05 * expected(IMAGES).abs().max().item() + 0.02)
        out.float().square().sum().backward()
        assert all(parameter.grad.to_local().isfinite().all() for parameter in model.parameters())


@client("`torch.jit.script` (deprecated in torch 2.12)")
def scripted(name: str) -> None:
    model = small(name)
    refusal = "Expected inferred type to be interface type|Unknown type annotation|is not a valid constant"
    refusal += "|expected type comment"  # it takes a comment for mypy for one
    with pytest.raises((AssertionError, RuntimeError, TypeError, ValueError), match=refusal):
        torch.jit.script(model)


# -- other packages


@client(
    "transformers 5.24, `AutoModelForImageClassification` on the folder of `tools/export.py --format hub`",
    "transformers==5.24.0",
    "tokenizers==0.23.3",
    "regex==2026.11.19",
)
def transformers_wrapper(name: str) -> None:
    from transformers import AutoModelForImageClassification

    from tools.export import main as export
    from utils.checkpoints.writing import save_checkpoint

    config = load_config(str(ROOT / "configs" / f"{name.replace('_tiny', '_t')}.yaml"), ["DATA.IMG_SIZE", "64"])
    model = models.build_model(config, 5).eval()
    with tempfile.TemporaryDirectory() as folder:
        content = {"model": model.state_dict(), "classes": list("abcde"), "config": config.dump()}
        save_checkpoint(content, Path(folder) / "small.pth")
        assert export(["--checkpoint", f"{folder}/small.pth", "--output", folder, "--format", "hub"]) == 0
        (exported,) = (path.parent for path in Path(folder).glob("*/config.json"))
        wrapper = AutoModelForImageClassification.from_pretrained(exported).eval()
        same(wrapper(IMAGES).logits, model(IMAGES), 0)
        wrapper.save_pretrained(f"{folder}/again")
        same(AutoModelForImageClassification.from_pretrained(f"{folder}/again").eval()(IMAGES).logits, model(IMAGES), 0)


@client(
    "accelerate 1.15, `init_empty_weights` with and without buffers, `load_checkpoint_and_dispatch`, `cpu_offload`,"
    " `disk_offload`",
    "accelerate==1.15.0",
    "psutil==7.2.2",
)
def accelerated(name: str) -> None:
    from accelerate import cpu_offload, disk_offload, init_empty_weights, load_checkpoint_and_dispatch
    from safetensors.torch import save_model

    model = small(name)
    with tempfile.TemporaryDirectory() as folder:
        save_model(model, f"{folder}/model.safetensors", metadata={"format": "pt"})
        for buffers in (True, False):
            with init_empty_weights(include_buffers=buffers):
                other = timm.create_model(name, img_size=64, num_classes=5, **SIZES[name])
            other = load_checkpoint_and_dispatch(other, f"{folder}/model.safetensors", device_map={"": "cpu"})
            same(other.eval()(IMAGES), model(IMAGES), 0)
        same(cpu_offload(small(name), execution_device="cpu")(IMAGES), model(IMAGES), 0)
        same(disk_offload(small(name), f"{folder}/disk", execution_device="cpu")(IMAGES), model(IMAGES), 0)


@client(
    "fvcore 0.1.5, `FlopCountAnalysis` and `ActivationCountAnalysis`, as timm's `benchmark.py` calls them",
    "fvcore==0.1.5.post20221221",
    "iopath==0.1.10",
    "portalocker==4.4.2",
    "tabulate==0.10.0",
    "yacs==0.1.8",
)
def counted(name: str) -> None:
    """The documented sums of the real models, and both counters agree but for the norms, which one does not count."""
    from fvcore.nn import ActivationCountAnalysis, FlopCountAnalysis
    from torch.utils.flop_counter import FlopCounterMode

    documented = {
        "pola_swin_tiny": (4.62, 4.61),
        "pola_pvt_tiny": (2.26, 2.26),
        "pola_pp_b0": (0.64, 0.64),
        "nalaformer_xt": (0.63, 0.62),
    }[name]
    model, images = timm.create_model(name).eval(), torch.ones(1, 3, 224, 224)
    analysis = FlopCountAnalysis(model, images)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(images)
    found = analysis.total() / 1e9, counter.get_total_flops() / 2e9
    assert (round(found[0], 2), round(found[1], 2)) == documented
    norms = sum(count for operator, count in analysis.by_operator().items() if operator.endswith("norm")) / 1e9
    assert abs(found[0] - norms - found[1]) < 0.01 * found[1]
    assert ActivationCountAnalysis(model, images).total() > 0


@client("torchinfo 1.8, ptflops 0.7 and thop 0.1", "torchinfo==1.8.0", "ptflops==0.7.5", "thop==0.1.1.post2209072238")
def summarised(name: str) -> None:
    import ptflops
    import thop
    import torchinfo

    model = small(name)
    expected, parameters = model(IMAGES), sum(parameter.numel() for parameter in model.parameters())
    assert torchinfo.summary(model, input_data=IMAGES, verbose=0).total_params == parameters
    quiet = {"as_strings": False, "print_per_layer_stat": False, "verbose": False}
    assert ptflops.get_model_complexity_info(model, (3, 64, 64), backend="aten", **quiet)[1] == parameters
    assert thop.profile(copy.deepcopy(model), (IMAGES,), verbose=False)[0] > 0
    same(model(IMAGES), expected, 0)


@client("captum 0.9, `IntegratedGradients`, `InputXGradient`", "captum==0.9.0")
def attributed(name: str) -> None:
    from captum.attr import InputXGradient, IntegratedGradients

    model = small(name)
    _, gap = IntegratedGradients(model).attribute(IMAGES, target=1, n_steps=32, return_convergence_delta=True)
    assert gap.abs().max() < 0.05
    assert InputXGradient(model).attribute(IMAGES, target=1).abs().max() > 0


@client("torchao 0.18, `Int8WeightOnlyConfig`", "torchao==0.18.0")
def quantised_by_torchao(name: str) -> None:
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    model = small(name)
    quantize_(model, Int8WeightOnlyConfig())
    expected = small(name)(IMAGES)
    same(model(IMAGES), expected, 0.05 * expected.abs().max().item())


@client("peft 0.21, LoRA on projections and MLPs, merged afterwards", "peft==0.21.2")
def adapted(name: str) -> None:
    from peft import LoraConfig, get_peft_model

    targets = ["qkvg", "qkv", "qg", "q", "kv", "fc1", "fc2"]
    model, expected = small(name), small(name)(IMAGES)
    adapted = get_peft_model(model, LoraConfig(target_modules=targets, modules_to_save=["head"]))
    same(adapted(IMAGES), expected)
    optimizer = torch.optim.SGD([parameter for parameter in adapted.parameters() if parameter.requires_grad], 0.01)
    for _ in range(2):
        adapted(IMAGES).square().sum().backward()
        optimizer.step()
    learned = adapted(IMAGES)
    assert (learned - expected).abs().max() > 1e-3
    same(adapted.merge_and_unload()(IMAGES), learned)


@client(
    "pytorch_lightning 2.6 and torchmetrics 1.9, training and a checkpoint",
    "pytorch_lightning==2.6.6",
    "torchmetrics==1.9.0",
    "lightning_utilities==0.15.3",
)
def trained_by_lightning(name: str) -> None:
    import pytorch_lightning
    import torchmetrics

    class Task(pytorch_lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model, self.accuracy = small(name), torchmetrics.Accuracy("multiclass", num_classes=5)

        def training_step(self, batch: tuple[Tensor, Tensor], _: int) -> Tensor:
            logits = self.model(batch[0])
            self.log("accuracy", self.accuracy(logits, batch[1]))
            return nn.functional.cross_entropy(logits, batch[1])

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.AdamW(self.parameters(), 1e-3)

    task = Task()
    with tempfile.TemporaryDirectory() as folder:
        quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
        trainer = pytorch_lightning.Trainer(max_steps=2, accelerator="cpu", default_root_dir=folder, **quiet)
        trainer.fit(task, torch.utils.data.DataLoader([(image, 0) for image in IMAGES], batch_size=1))
        trainer.save_checkpoint(f"{folder}/task.ckpt")
        again = Task.load_from_checkpoint(f"{folder}/task.ckpt", weights_only=False)
    same(again.eval().model(IMAGES), task.eval().model(IMAGES), 0)
    assert (task.model(IMAGES) - small(name)(IMAGES)).abs().max() > 1e-4


@client("opacus 1.6, `GradSampleModule`", "opacus==1.6.0", "opt_einsum==3.4.0")
def private(name: str) -> None:
    from opacus import GradSampleModule

    model, plain = small(name, drop_path_rate=0.0).train(), small(name, drop_path_rate=0.0).train()
    if name != "pola_pvt_tiny":
        with pytest.raises(NotImplementedError, match="buffers"):
            GradSampleModule(model)
        return
    GradSampleModule(model, loss_reduction="sum")(IMAGES).square().sum().backward()
    plain(IMAGES).square().sum().backward()
    for parameter, wanted in zip(model.parameters(), plain.parameters(), strict=True):
        found = parameter.grad_sample.sum(0)
        torch.testing.assert_close(found, wanted.grad, rtol=0, atol=1e-4 * wanted.grad.abs().max().item())


def main(row: str) -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    for name in SIZES:
        CLIENTS[row].run(name)


if __name__ == "__main__":
    main(sys.argv[1])
