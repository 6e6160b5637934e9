"""An adapter in LightningModules of other projects: training, files, resuming."""

from __future__ import annotations

import json
import logging
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.cli import LightningCLI
from peft import AdaLoraConfig, LoHaConfig, LoraConfig, PeftConfig, PeftModel
from safetensors.torch import load_file
from torch import Tensor, nn

from lit_lora.adapters.parameter_groups import ParameterGroup, make_optimizer
from lit_lora.callbacks import AdapterCheckpoint, AdapterEMA, FiniteGradients, LoraInjection, MemoryProfiler
from lit_lora.errors import UserError
from lit_lora.quantization import NF4, Int8, Quantization
from lit_lora.quantization.frozen_layer import frozen_layers
from tests.callbacks.foreign_modules import Adversarial, Classifier, LanguageModel, images, sentences

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")  # PEFT's own, when it loads

CONV = {"r": 2, "lora_alpha": 2, "target_modules": "conv"}
ATTENTION = {"r": 2, "lora_alpha": 2, "target_modules": "attention"}


def fit(
    folder: Path,
    options: dict[str, Any],
    module: LightningModule,
    injection: LoraInjection,
    data: Any,
    *callbacks: Callback,
    epochs: int = 1,
    resume: Path | None = None,
) -> Trainer:
    saving = AdapterCheckpoint(folder, save_last=True, save_top_k=0, enable_version_counter=False)
    options = options | {"enable_checkpointing": True, "max_epochs": epochs}
    trainer = Trainer(**options, callbacks=[injection, *callbacks, saving])
    trainer.fit(module, data, ckpt_path=resume)
    return trainer


def trained(module: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in module.named_parameters() if p.requires_grad}


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(value, other[name]) for name, value in one.items())


@pytest.mark.parametrize("module_path", ["net", None])
def test_a_resnet_trains_its_adapter_alone(
    module_path: str | None, trainer_options: dict[str, Any], tmp_path: Path
) -> None:
    module, fresh = Classifier(), Classifier()
    before = {name: value.clone() for name, value in module.state_dict().items()}
    trainer = fit(
        tmp_path, trainer_options, module, LoraInjection(LoraConfig(**CONV), module=module_path), images(), epochs=2
    )
    assert trainer.callback_metrics["train/loss"] < 1.2
    after = {name.replace("base_layer.", ""): value for name, value in module.state_dict().items()}
    assert all(torch.equal(value, after[name]) for name, value in before.items()), "base and statistics stay"
    assert {name.split(".")[-3] for name in trained(module)} == {"lora_A", "lora_B"}
    [optimizer] = trainer.optimizers
    held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    assert held == {id(parameter) for parameter in module.parameters() if parameter.requires_grad}
    checkpoint = torch.load(tmp_path / "last.ckpt", weights_only=True)
    assert set(checkpoint["state_dict"]) == set(trained(module))
    # Plain PEFT, without Lightning.
    base = fresh.net if module_path else fresh
    loaded = PeftModel.from_pretrained(base, tmp_path / "last.adapter").eval()
    batch = next(iter(images()))[0]
    module.eval()
    with torch.no_grad():
        assert not torch.allclose(Classifier().eval().net(batch), module.net(batch))
        assert torch.equal(fresh.net(batch), module.net(batch))
        loaded.merge_and_unload()
        torch.testing.assert_close(fresh.net(batch), module.net(batch))


def test_resuming_is_exact_with_all_callbacks(trainer_options: dict[str, Any], tmp_path: Path) -> None:
    def run(folder: str, epochs: int, resume: Path | None = None) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        module, ema = Classifier(), AdapterEMA(0.5)
        profiler = MemoryProfiler(output_dir=str(tmp_path / folder))
        callbacks = [ema, profiler, FiniteGradients()]
        injection = LoraInjection(LoraConfig(**CONV, lora_dropout=0.5), module="net")
        fit(tmp_path / folder, trainer_options, module, injection, images(), *callbacks, epochs=epochs, resume=resume)
        return trained(module), ema.state_dict()

    whole, whole_ema = run("whole", 2)
    run("first", 1)
    resumed, ema = run("first", 2, tmp_path / "first" / "last.ckpt")
    assert same(whole, resumed)
    assert torch.equal(whole_ema["shadow_params"], ema["shadow_params"])
    assert (tmp_path / "first" / "last.ema.adapter" / "adapter_model.safetensors").is_file()
    assert (tmp_path / "whole" / "memory.json").is_file()


def test_a_language_model_that_is_built_late(trainer_options: dict[str, Any], tmp_path: Path) -> None:
    def run(folder: str, epochs: int, resume: Path | None = None) -> LanguageModel:
        module = LanguageModel()
        injection = LoraInjection(LoraConfig(**ATTENTION, lora_dropout=0.1), module="model")
        fit(tmp_path / folder, trainer_options, module, injection, sentences(), epochs=epochs, resume=resume)
        return module

    whole = run("whole", 2)
    run("first", 1)
    resumed = run("first", 2, tmp_path / "first" / "last.ckpt")
    assert len(trained(whole)) == 2 * 4 * 2
    assert same(trained(whole), trained(resumed))
    plain = LanguageModel()
    plain.configure_model()
    PeftModel.from_pretrained(plain.model, tmp_path / "first" / "last.adapter").eval()
    tokens = next(iter(sentences()))[0]
    with torch.no_grad():
        assert torch.equal(plain.model(tokens).logits, resumed.model.eval()(tokens).logits)


def test_manual_optimization_with_two_optimizers(
    trainer_options: dict[str, Any], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def run(folder: str, epochs: int, resume: Path | None = None) -> Adversarial:
        module = Adversarial()
        adapter = LoraConfig(r=2, lora_alpha=2, target_modules="all-linear")
        injection = LoraInjection(adapter, module="generator", also_train=["discriminator.*"])
        callbacks = [AdapterEMA(0.5), FiniteGradients(), MemoryProfiler(output_dir=str(tmp_path / folder))]
        fit(tmp_path / folder, trainer_options, module, injection, images(), *callbacks, epochs=epochs, resume=resume)
        return module

    with caplog.at_level(logging.INFO):
        whole = run("whole", 2)
    assert "what also_train names is in the checkpoint alone" in caplog.text
    run("first", 1)
    last = tmp_path / "first" / "last.ckpt"
    resumed = run("first", 2, last)
    start, names = trained(Adversarial()), {name.partition(".")[0] for name in trained(whole)}
    assert names == {"generator", "discriminator"}
    assert all("lora_" in name for name in trained(whole) if name.startswith("generator"))
    assert not any(torch.equal(start[name], value) for name, value in trained(whole).items() if name in start)
    assert same(trained(whole), trained(resumed))
    assert torch.equal(whole.generator[0].base_layer.weight, start["generator.0.weight"])
    plain = Adversarial()
    PeftModel.from_pretrained(plain.generator, tmp_path / "whole" / "last.adapter")
    noise = torch.randn(3, 4)
    assert torch.equal(plain.generator(noise), whole.generator(noise))
    checkpoint = torch.load(tmp_path / "whole" / "last.ckpt", weights_only=True)
    plain.load_state_dict(checkpoint["state_dict"], strict=False)
    assert torch.equal(plain.discriminator[0].weight, whole.discriminator[0].weight)


def test_an_optimizer_of_frozen_parameters_alone(trainer_options: dict[str, Any], tmp_path: Path) -> None:
    injection = LoraInjection(LoraConfig(r=2, lora_alpha=2, target_modules="all-linear"), module="generator")
    with pytest.raises(UserError, match=r"optimizer 1 \(Adam\) of Adversarial has frozen parameters alone.*also_train"):
        fit(tmp_path, trainer_options, Adversarial(), injection, images())


class Captured(Classifier):
    """Lists its parameters before there is an adapter."""

    def __init__(self) -> None:
        super().__init__()
        self.listed = list(self.parameters())

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW([{"params": self.listed}, {"params": list(self.net.fc.parameters()) * 0}])


def test_parameters_that_were_listed_before(trainer_options: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(UserError, match="has frozen parameters alone, as where its parameters were listed in __init__"):
        fit(tmp_path, trainer_options, Captured(), LoraInjection(LoraConfig(**CONV)), images())


class HalfSeen(Classifier):
    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.net.layer1.parameters(), lr=0.1)
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1)]


def test_an_adapter_that_the_optimizer_does_not_see(trainer_options: dict[str, Any], tmp_path: Path) -> None:
    message = r"\d+ trained tensors are in no optimizer of HalfSeen, the first is net.conv1.lora_A.default.weight"
    with pytest.raises(UserError, match=message):
        fit(tmp_path, trainer_options, HalfSeen(), LoraInjection(LoraConfig(**CONV)), images())


@pytest.mark.parametrize("stage", ["validate", "test", "predict"])
def test_a_stage_alone_loads_the_adapter(stage: str, trainer_options: dict[str, Any], tmp_path: Path) -> None:
    module = Classifier()
    fit(tmp_path, trainer_options, module, LoraInjection(LoraConfig(**CONV)), images())
    trainers = [
        Trainer(**trainer_options | {"enable_checkpointing": True}, callbacks=[*more, AdapterCheckpoint(tmp_path)])
        for more in ([], [LoraInjection(LoraConfig(**CONV))])
    ]
    options = {} if stage == "predict" else {"verbose": False}
    here = getattr(trainers[0], stage)(module, images(), **options)
    fresh = Classifier()
    again = getattr(trainers[1], stage)(fresh, images(), ckpt_path=tmp_path / "last.ckpt", **options)
    assert torch.equal(torch.cat(here), torch.cat(again)) if stage == "predict" else here == again
    assert same(trained(module), trained(fresh))


def test_fit_again(trainer_options: dict[str, Any], tmp_path: Path) -> None:
    module, injection = Classifier(), LoraInjection(LoraConfig(**CONV), module="net")
    trainer = fit(tmp_path / "a", trainer_options, module, injection, images())
    once = trained(module)
    trainer.fit_loop.max_epochs = 2
    trainer.fit(module, images())
    assert trained(module).keys() == once.keys()
    assert not same(trained(module), once)
    # Another trainer and another callback with the same settings go on with the same adapter.
    fit(tmp_path / "b", trainer_options, module, LoraInjection(LoraConfig(**CONV), module="net"), images())
    assert trained(module).keys() == once.keys()
    assert "configure_model" not in module.__dict__
    assert "configure_optimizers" not in module.__dict__
    other = LoraInjection(LoraConfig(**CONV | {"lora_alpha": 4}), module="net")
    with pytest.raises(UserError, match="adapter of other settings already: lora_alpha is 4, was 2"):
        fit(tmp_path / "c", trainer_options, module, other, images())
    assert "configure_model" not in module.__dict__, "also after an error"


def test_a_module_with_an_adapter_of_its_own(trainer_options: dict[str, Any], tmp_path: Path) -> None:
    module = Classifier()
    module.net = PeftModel(module.net, LoraConfig(r=2, target_modules=["fc"]))
    with pytest.raises(UserError, match=r"Classifier has an adapter of its own already, in net\..*fc"):
        fit(tmp_path, trainer_options, module, LoraInjection(LoraConfig(**CONV)), images())


@pytest.mark.parametrize("quantization", [Int8(skip=["net.conv1"]), NF4()])
def test_frozen_layers_are_quantized(
    quantization: Quantization, trainer_options: dict[str, Any], tmp_path: Path
) -> None:
    adapter = LoraConfig(**CONV, modules_to_save=["fc"])
    module = Classifier()
    trainer = fit(
        tmp_path, trainer_options, module, LoraInjection(adapter, quantization=quantization), images(), epochs=2
    )
    convolutions = sum(isinstance(layer, nn.Conv2d) for layer in Classifier().modules())
    assert len(list(frozen_layers(module))) == convolutions - len(quantization.skip)
    assert trainer.callback_metrics["train/loss"] < 1.2
    assert any("fc.modules_to_save" in name for name in trained(module))


def test_batch_norm_that_goes_on_learning_is_in_the_files(trainer_options: dict[str, Any], tmp_path: Path) -> None:
    module, fresh = Classifier(), Classifier()
    adapter = LoraConfig(**CONV, modules_to_save=["layer2.0.bn1", "fc"])
    fit(tmp_path, trainer_options, module, LoraInjection(adapter, "net", update_statistics=True), images())
    assert not torch.equal(module.net.bn1.running_mean, fresh.net.bn1.running_mean)
    assert "net.bn1.running_mean" in torch.load(tmp_path / "last.ckpt", weights_only=True)["state_dict"]
    loaded = PeftModel.from_pretrained(fresh.net, tmp_path / "last.adapter").eval()
    batch = next(iter(images()))[0]
    with torch.no_grad():
        assert torch.equal(loaded(batch), module.eval().net(batch))


def test_layers_to_train_in_full_keep_their_own_statistics(trainer_options: dict[str, Any], tmp_path: Path) -> None:
    module, fresh = Classifier(), Classifier()
    adapter = LoraConfig(**CONV, modules_to_save=["layer2.0.bn1", "fc"])
    fit(tmp_path, trainer_options, module, LoraInjection(adapter, "net"), images())
    copied: Any = module.net.layer2[0].bn1.modules_to_save["default"]
    assert copied.training
    assert not torch.equal(copied.running_mean, fresh.net.layer2[0].bn1.running_mean)
    assert torch.equal(module.net.bn1.running_mean, fresh.net.bn1.running_mean)
    loaded = PeftModel.from_pretrained(fresh.net, tmp_path / "last.adapter").eval()
    batch = next(iter(images()))[0]
    with torch.no_grad():
        assert torch.equal(loaded(batch), module.eval().net(batch))


class Parts(LightningModule):
    """A module with parts that tests put together."""

    def __init__(self, **parts: nn.Module) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.ModuleDict(parts)
        self.head = nn.Linear(4, 1)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        x = batch[0].flatten(1)[:, :4]
        for name, part in self.net.items():
            x = part(x) if name != "unused" else x
        loss: Tensor = self.head(x).square().mean()
        return loss

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], lr=0.1)


def linear() -> nn.Linear:
    return nn.Linear(4, 4)


SHARED = linear()


@pytest.mark.parametrize(
    ("parts", "options", "message"),
    [
        ({"a": linear()}, {"module": "nets"}, "module='nets' is no part of Parts, which has net, head"),
        (
            {"a": linear()},
            {"target_modules": ["q"]},
            "'q' matches no layer of ModuleDict.*Names that occur in this model are a",
        ),
        (
            {"a": linear()},
            {"target_modules": "conv"},
            "'conv' matches no layer of ModuleDict.*Presets are attention, mlp",
        ),
        ({"a": linear()}, {"also_train": ["heads.*"]}, r"also_train: 'heads.\*' matches no parameter of Parts"),
        (
            {"a": linear()},
            {"also_train": ["net.a.bias"]},
            r"net.a.bias lies in the adapted part.*modules_to_save: \[a\]",
        ),
        ({"a": nn.LazyLinear(4)}, {}, "a.weight has no shape before the first forward pass"),
        (
            {"a": nn.Sequential(SHARED), "b": nn.Sequential(SHARED)},
            {},
            r"a\.0 and b\.0 are the same layer, and PEFT adapts it in the first place alone",
        ),
    ],
)
def test_what_cannot_be_adapted(
    parts: dict[str, nn.Module],
    options: dict[str, Any],
    message: str,
    trainer_options: dict[str, Any],
    tmp_path: Path,
) -> None:
    options = {"module": "net"} | options
    adapter = LoraConfig(r=2, lora_alpha=2, target_modules=options.pop("target_modules", "all-linear"))
    with pytest.raises(UserError, match=message):
        fit(tmp_path, trainer_options, Parts(**parts), LoraInjection(adapter, **options), images())


def test_tied_weights_are_named(trainer_options: dict[str, Any], tmp_path: Path) -> None:
    parts = {"a": linear(), "b": linear()}
    parts["b"].weight = parts["a"].weight
    module, adapter = Parts(**parts), LoraConfig(r=2, lora_alpha=2, target_modules=["net.b"])
    with pytest.warns(UserWarning, match=r"net\.b shares its weight with net\.a: the adapter changes the first alone"):
        fit(tmp_path, trainer_options, module, LoraInjection(adapter, quantization=Int8()), images())
    assert [layer.weight_shape for layer in frozen_layers(module)] == [(1, 4)], "only the head is quantized"


def test_torchs_own_encoder_layers(
    trainer_options: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Sequence(Parts):
        def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
            loss: Tensor = self.head(self.net["a"](batch[0].flatten(1)[:, :8].view(-1, 2, 4))).square().mean()
            return loss

    def module() -> Sequence:
        torch.manual_seed(0)
        return Sequence(a=nn.TransformerEncoderLayer(4, 2, 8, dropout=0.0, batch_first=True))

    def injection() -> LoraInjection:
        return LoraInjection(LoraConfig(r=2, lora_alpha=2, target_modules="attention+mlp"), "net")

    with pytest.raises(UserError, match=r"a is an nn.TransformerEncoderLayer.*set_fastpath_enabled\(False\)"):
        fit(tmp_path, trainer_options, module(), injection(), images())
    monkeypatch.setattr("torch.backends.mha._is_fastpath_enabled", False)
    adapted = module()
    fit(tmp_path, trainer_options, adapted, injection(), images())
    x = torch.randn(2, 3, 4)
    with torch.no_grad():
        trained_output, output, base = (
            adapted.net["a"].train()(x),
            adapted.net["a"].eval()(x),
            module().net["a"].eval()(x),
        )
    torch.testing.assert_close(trained_output, output)
    assert (output - base).abs().max() > 1e-4


def test_a_layer_that_is_never_called(trainer_options: dict[str, Any], tmp_path: Path) -> None:
    adapter = LoraConfig(r=2, lora_alpha=2, target_modules="all-linear")
    with pytest.warns(UserWarning, match=r"2 of 4 trained tensors have no gradient.* net\.unused\.lora_A"):
        fit(tmp_path, trainer_options, Parts(a=linear(), unused=linear()), LoraInjection(adapter, "net"), images())


class Compiled(Classifier):
    """Compiles its network in one of the ways that users do, and may call it before training."""

    def __init__(self, how: str) -> None:
        super().__init__()
        compile_options: dict[str, Any] = {"backend": "eager"}
        if how == "blocks":
            for block in self.net.layer1:
                block.compile(**compile_options)
        elif how == "in place":
            self.net.compile(**compile_options)
        else:
            self.net: Any = torch.compile(self.net, **compile_options)
        if how == "called":
            self.net(torch.randn(4, 3, 16, 16))


@pytest.mark.filterwarnings(
    "ignore:The .grad attribute of a Tensor that is not a leaf"
)  # torch's own, when it compiles
@pytest.mark.parametrize("module_path", ["net", None])
@pytest.mark.parametrize("how", ["blocks", "in place", "wrapped", "called"])
def test_compiled_modules(how: str, module_path: str | None, trainer_options: dict[str, Any], tmp_path: Path) -> None:
    torch._dynamo.reset()
    adapters = []
    for module in (compiled := Compiled(how), plain := Classifier()):
        if how == "called":
            plain.net.load_state_dict(compiled.net._orig_mod.state_dict() if module is compiled else {}, strict=False)
        torch.manual_seed(1)
        folder = tmp_path / type(module).__name__
        fit(folder, trainer_options, module, LoraInjection(LoraConfig(**CONV), module_path), images())
        adapters.append(load_file(folder / "last.adapter" / "adapter_model.safetensors"))
    assert adapters[0].keys() == adapters[1].keys(), "nothing in the names tells that it was compiled"
    for name, value in adapters[0].items():
        torch.testing.assert_close(value, adapters[1][name])


@pytest.mark.parametrize(
    ("options", "adapter", "module", "message"),
    [
        ({"strategy": "ddp_spawn"}, LoraConfig(**CONV), Classifier, "DDPStrategy starts processes in which the module"),
        ({"strategy": "fsdp"}, LoraConfig(**CONV), Classifier, "use strategy lit_lora_fsdp"),
        ({}, AdaLoraConfig(target_modules=["0"], total_step=9), Adversarial, "AdaLoraConfig reads all gradients"),
    ],
)
def test_what_cannot_train_an_adapter(
    options: dict[str, Any],
    adapter: PeftConfig,
    module: type[LightningModule],
    message: str,
    trainer_options: dict[str, Any],
) -> None:
    if options.get("strategy") == "fsdp":  # which Lightning itself refuses on a CPU
        from lightning.pytorch.strategies import FSDPStrategy

        trainer = Trainer(**trainer_options)
        trainer.strategy.__class__ = FSDPStrategy
        with pytest.raises(UserError, match=message):
            LoraInjection(adapter).setup(trainer, module(), "fit")
        return
    trainer = Trainer(**trainer_options | options, callbacks=[LoraInjection(adapter)])
    with pytest.raises(UserError, match=message):
        LoraInjection(adapter).setup(trainer, module(), "fit")


def test_an_adapter_needs_targets() -> None:
    with pytest.raises(UserError, match="LoraConfig needs target_modules; presets are attention"):
        LoraInjection(LoraConfig())
    with pytest.raises(UserError, match=r"call save_adapter after trainer\.fit"):
        LoraInjection(LoraConfig(**CONV)).save_adapter("x")


def test_half_precision_of_the_trainer_warns(trainer_options: dict[str, Any], tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="trainer.precision='bf16-true' casts the adapter too"):
        fit(
            tmp_path,
            trainer_options | {"precision": "bf16-true"},
            Classifier(),
            LoraInjection(LoraConfig(**CONV)),
            images(),
        )


def test_adalora_prunes_and_resumes(trainer_options: dict[str, Any], tmp_path: Path) -> None:
    class StopsAfterAnEpoch(Callback):
        def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
            trainer.should_stop = True

    def run(folder: str, *callbacks: Callback, resume: Path | None = None) -> tuple[dict[str, Tensor], Any]:
        adapter = AdaLoraConfig(
            init_r=4, target_r=1, tinit=1, tfinal=1, total_step=8, lora_alpha=4, target_modules="attention"
        )
        module = LanguageModel()
        fit(
            tmp_path / folder,
            trainer_options,
            module,
            LoraInjection(adapter, "model"),
            sentences(),
            *callbacks,
            epochs=2,
            resume=resume,
        )
        checkpoint = torch.load(tmp_path / folder / "last.ckpt", weights_only=True)
        return trained(module), checkpoint["adapter_method"]["rank_pattern"]

    whole, ranks = run("whole")
    run("first", StopsAfterAnEpoch())
    resumed, again = run("first", resume=tmp_path / "first" / "last.ckpt")
    assert sum(sum(kept) for kept in ranks.values()) < 8 * 4
    assert ranks == again
    assert same(whole, resumed)


def test_another_method(trainer_options: dict[str, Any], tmp_path: Path) -> None:
    module = Classifier(lr=0.03)
    adapter = LoHaConfig(r=2, alpha=2, target_modules="conv")
    trainer = fit(tmp_path, trainer_options, module, LoraInjection(adapter), images(), epochs=6)
    assert trainer.callback_metrics["train/loss"] < 1.0  # 1.4 before
    assert {name.split(".")[-2] for name in trained(module)} == {"hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"}


def test_it_tells_how_to_load_the_adapter(
    trainer_options: dict[str, Any], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO):
        fit(tmp_path, trainer_options, Classifier(), LoraInjection(LoraConfig(**CONV), "net"), images())
    expected = f"peft.PeftModel.from_pretrained(module.net, '{tmp_path / 'last.adapter'}')"
    assert expected in caplog.text
    assert "also_train" not in caplog.text
    caplog.clear()
    with caplog.at_level(logging.INFO):
        injection = LoraInjection(LoraConfig(**CONV))
        Trainer(**trainer_options | {"max_steps": 1}, callbacks=[injection]).fit(Classifier(), images())
    assert [record.message for record in caplog.records if "from_pretrained(module, 'FOLDER')" in record.message]
    injection.save_adapter(tmp_path / "mine")
    PeftModel.from_pretrained(Classifier(), tmp_path / "mine")


def test_files_tell_that_they_lack_a_second_adapter(trainer_options: dict[str, Any], tmp_path: Path) -> None:
    injection = LoraInjection(LoraConfig(**CONV))
    Trainer(**trainer_options | {"max_steps": 1}, callbacks=[injection]).fit(Classifier(), images())
    targets = injection.model.peft_config["default"].target_modules
    injection.model.add_adapter("style", LoraConfig(**CONV | {"target_modules": targets}))
    injection.model.base_model.set_adapter(["default", "style"])
    with pytest.warns(UserWarning, match=r"without \d+ other trained tensors, .* write style with save_pretrained"):
        injection.save_adapter(tmp_path / "mine")


def test_a_checkpoint_of_another_adapter_is_refused(trainer_options: dict[str, Any], tmp_path: Path) -> None:
    fit(tmp_path, trainer_options, Classifier(), LoraInjection(LoraConfig(**CONV)), images())
    other = LoraInjection(LoraConfig(**CONV | {"lora_alpha": 4}))
    with pytest.raises(UserError, match="lora_alpha is 4, in the checkpoint 2"):
        fit(tmp_path, trainer_options, Classifier(), other, images(), epochs=2, resume=tmp_path / "last.ckpt")


class Grouped(Classifier):
    def configure_optimizers(self) -> Any:
        return make_optimizer(
            partial(torch.optim.AdamW, lr=1e-3), self, [ParameterGroup("net.*.lora_B.*", lr_ratio=16)]
        )


def test_groups_of_parameters(trainer_options: dict[str, Any], tmp_path: Path) -> None:
    trainer = fit(tmp_path, trainer_options, Grouped(), LoraInjection(LoraConfig(**CONV)), images())
    b, rest = trainer.optimizers[0].param_groups
    assert (b["lr"], rest["lr"], len(b["params"]), len(rest["params"])) == (16e-3, 1e-3, 6, 6)


@pytest.mark.filterwarnings("ignore:LightningCLI's args parameter")
@pytest.mark.filterwarnings("ignore:.*configure_optimizers.* will be overridden by")
@pytest.mark.parametrize("built_early", [False, True])
def test_a_projects_own_command_line(built_early: bool, trainer_options: dict[str, Any], tmp_path: Path) -> None:
    adapter = {"class_path": "peft.LoraConfig", "init_args": CONV | {"loftq_config": None}}
    init_args = {"adapter": adapter, "module": "net", "quantization": {"class_path": "lit_lora.quantization.Int8"}}
    options = {name: str(value) if isinstance(value, Path) else value for name, value in trainer_options.items()}
    config = tmp_path / "config.yaml"
    callbacks = [{"class_path": "lit_lora.callbacks.LoraInjection", "init_args": init_args}]
    config.write_text(json.dumps({"trainer": options | {"max_epochs": 1, "callbacks": callbacks}}))
    cli = LightningCLI(
        Classifier,
        run=False,
        save_config_callback=None,
        seed_everything_default=False,
        auto_configure_optimizers=built_early,
        args=["--config", str(config), *(["--optimizer", "torch.optim.AdamW"] if built_early else [])],
    )
    if not built_early:
        cli.trainer.fit(cli.model, images())
        assert {name.split(".")[-3] for name in trained(cli.model)} == {"lora_A", "lora_B"}
        return
    # This command line has made the optimizer of the weights that there were.
    with pytest.raises(UserError, match=r"LightningCLI\(auto_configure_optimizers=True\)"):
        cli.trainer.fit(cli.model, images())
