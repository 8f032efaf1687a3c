"""The command line, as a person types it."""

import io
import logging
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
import yaml
from fvcore.nn import FlopCountAnalysis
from shortened import ordinary

import lightning_prune
from lightning_prune.cli.entry import main
from lightning_prune.datamodules import DigitsDataModule
from lightning_prune.models import ImageClassifier
from lightning_prune.reporting.history import History, write_history
from lightning_prune.reporting.measurement import Measurement

SHORT = [
    "--trainer.max_epochs=3", "--trainer.limit_train_batches=3", "--trainer.limit_val_batches=1",
    "--trainer.log_every_n_steps=1",
]  # fmt: skip
CONFIGS = Path(lightning_prune.__file__).parent / "configs"


def quickstart(**changes: object) -> dict[str, object]:
    """Return the quickstart's config with other settings for the pruning callback."""
    content = yaml.safe_load((CONFIGS / "quickstart.yaml").read_text())
    content["prune"]["init_args"].update(changes)
    return content


def test_fit_prunes_saves_and_says_how_to_load(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.chdir(tmp_path)
    config = tmp_path / "short.yaml"
    config.write_text(yaml.safe_dump(quickstart(start_epoch=1, steps=2)))
    with caplog.at_level("INFO"):
        main(["fit", "--config", str(config), *SHORT])
    told = caplog.text
    for word in ("parameters", "FLOPs", "latency (ms)", "val/accuracy", "before", "after", "ratio", "logs/quickstart"):
        assert word in told
    path = tmp_path / "logs" / "quickstart" / "version_0" / "checkpoints" / "last.ckpt"
    loading, _, rest = told.partition("load it:")[2].partition("model = ")
    names: dict[str, object] = {}
    exec(textwrap.dedent(f"{loading}model = {rest.splitlines()[0]}"), names)  # the very lines that were printed
    model = names["model"]
    assert isinstance(model, ImageClassifier)
    size = sum(p.numel() for p in model.parameters())
    assert size < sum(p.numel() for p in ImageClassifier("digits", 10, (1, 8, 8)).parameters())
    main(["test", "--config", str(config), "--ckpt_path", str(path)])
    assert "test/accuracy" in capsys.readouterr().out
    main(["validate", "--config", str(config), "--ckpt_path", str(path)])
    main(["predict", "--config", str(config), "--ckpt_path", str(path), "--return_predictions=false"])


# One for each callback; all of them are parsed, and trained, in the long run.
PARSED = ("quickstart", "vgg16_cifar10_afie", "resnet56_cifar10_rl_joint", "vgg16_cifar10_learn_to_prune")


@pytest.mark.parametrize("name", ordinary(sorted(path.stem for path in CONFIGS.glob("*.yaml")), *PARSED))
def test_every_config_begins_with_what_it_is_and_parses(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    path = CONFIGS / f"{name}.yaml"
    assert path.read_text().startswith("# ")
    with pytest.raises(SystemExit) as left:
        main(["fit", "--config", str(path), "--print_config"])
    assert left.value.code == 0
    assert "class_path: lightning_prune" in capsys.readouterr().out


def test_lightning_may_summarize_the_network_with_its_example_input(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    # It sends the example through the hooks that make network input of the data module's batches.
    monkeypatch.chdir(tmp_path)
    logged = io.StringIO()  # where the summary goes if rich is not installed
    handler = logging.StreamHandler(logged)
    logger = logging.getLogger("lightning.pytorch")
    logger.addHandler(handler)
    try:
        main(["fit", "--config", "quickstart.yaml", "--trainer.fast_dev_run=1", "--trainer.enable_model_summary=true"])
    finally:
        logger.removeHandler(handler)
    # Counted on the example, by rich or without it.
    assert "Total FLOPs" in capsys.readouterr().out or "| FLOPs | In sizes" in logged.getvalue()


@pytest.mark.long
def test_module_and_program_are_the_same_and_find_shipped_configs(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "lightning_prune", "fit", "--config", "configs/quickstart.yaml", "--print_config"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert yaml.safe_load(done.stdout)["model"]["init_args"]["network"] == "digits"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"keep": 2.0}, "keep must be the fraction that is kept"),
        ({"metric": "macs"}, "metric must be one of flops, params, channels"),
    ],
)
def test_bad_settings_end_the_command_with_their_sentence(
    changes: dict[str, object], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tmp_path / "bad.yaml"
    config.write_text(yaml.safe_dump(quickstart(**changes)))
    with pytest.raises((SystemExit, ValueError)) as raised:
        main(["fit", "--config", str(config)])
    assert message in str(raised.value) + capsys.readouterr().err


@pytest.mark.long
def test_callbacks_import_nothing_that_only_other_parts_need() -> None:
    heavy = "{'torchvision', 'gymnasium', 'matplotlib', 'sklearn'}"
    # torchmetrics, which Lightning needs, imports torchvision by itself; nothing of ours may add to that.
    code = "import sys, lightning.pytorch; before = set(sys.modules); import lightning_prune.callbacks; "
    code += f"found = {heavy} & set(sys.modules) - before; assert not found, found"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


def test_torch_loads_the_checkpoint_of_the_command_line_safely(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    config = tmp_path / "short.yaml"
    config.write_text(yaml.safe_dump(quickstart(start_epoch=1, steps=1)))
    main(["fit", "--config", str(config), *SHORT])
    path = tmp_path / "logs" / "quickstart" / "version_0" / "checkpoints" / "last.ckpt"
    assert "lightning_prune" in torch.load(path, weights_only=True)
    main(["fit", "--config", str(config), *SHORT, "--trainer.max_epochs=4", "--ckpt_path", str(path)])


@pytest.mark.long
def test_the_quickstart_halves_the_flops_and_keeps_its_accuracy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The whole quickstart beside the same run without the pruning callback, both judged on the test images."""
    monkeypatch.chdir(tmp_path)
    accuracy = {}
    for name in ("pruned", "plain"):
        content = quickstart()
        content["trainer"]["logger"]["init_args"]["name"] = name
        if name == "plain":
            del content["prune"]
        config = tmp_path / f"{name}.yaml"
        config.write_text(yaml.safe_dump(content))
        main(["fit", "--config", str(config)])
        path = tmp_path / "logs" / name / "version_0" / "checkpoints" / "last.ckpt"
        model, data = lightning_prune.load_pruned(ImageClassifier, path), DigitsDataModule()
        data.setup("test")
        batches = [data.on_after_batch_transfer(batch, 0) for batch in data.test_dataloader()]
        right = [(model(images).argmax(1) == labels).float() for images, labels in batches]
        accuracy[name] = float(torch.cat(right).mean())
        flops = FlopCountAnalysis(model, torch.zeros(1, 1, 8, 8)).unsupported_ops_warnings(False).total()
        accuracy[f"{name} flops"] = flops
    assert accuracy["pruned flops"] <= 0.5 * accuracy["plain flops"]
    assert accuracy["pruned"] >= accuracy["plain"] - 0.01, accuracy
    assert accuracy["plain"] > 0.97


def test_inspect_prints_groups_shares_and_what_is_unprunable(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["lightning-prune"])
    main(["inspect", "--config", "configs/resnet20_cifar10_taylor.yaml"])
    told = capsys.readouterr().out
    assert "network.layer1.0.conv1" in told
    assert "unprunable: network.linear (10 channels): network.linear: is an output of the network" in told
    assert "%" in told
    assert "FLOPs: 40,931,968 counted by fvcore\n" in told
    assert "#flops" not in told


def test_inspect_shows_the_flops_of_each_layer_if_asked(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["lightning-prune"])
    main(["inspect", "--verbose", "--config", "configs/quickstart.yaml"])
    told = capsys.readouterr().out
    assert "can be pruned" in told
    table = told.partition("\n\n")[2]
    assert "#flops" in table
    assert "network" in table


def test_version_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    main(["--version"])
    assert capsys.readouterr().out == f"lightning-prune {lightning_prune.__version__}\n"


LIGHT = {
    "import": "",
    "version": "main(['--version'])",
    "configs": "main(['configs'])",
    **{name: f"main(['{name}', '--help'])" for name in ("report", "export", "benchmark", "compare", "plan", "prune")},
}
HEAVY = {
    "lightning", "lightning_fabric", "jsonargparse", "torchmetrics", "torchvision", "tensorboard", "matplotlib",
    "fvcore", "gymnasium", "sklearn", "onnx", "onnxruntime", "torch._dynamo", "torch._inductor",
}  # fmt: skip


@pytest.mark.parametrize("name", ordinary(LIGHT, "import", "report"))
def test_what_is_not_needed_is_not_imported(name: str) -> None:
    call = LIGHT[name]
    code = f"""
import sys, lightning_prune
try:
    if {call!r}:
        from lightning_prune.cli.entry import main
        exec({call!r})
except SystemExit as ended:
    assert not ended.code
found = {HEAVY} & sys.modules.keys()
assert not found, found
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


def test_a_report_is_written_without_lightning(tmp_path: Path) -> None:
    history = History("m.M", "C", {}, "", {"a": 8}, {}, Measurement(100, 1000, 2.0), [])
    write_history(tmp_path, history)
    code = f"import sys; from lightning_prune.cli.entry import main; main(['report', {str(tmp_path)!r}]); "
    code += f"found = {HEAVY} & sys.modules.keys(); assert not found, found"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "report.html").is_file()
