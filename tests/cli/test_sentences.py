"""Wrong uses of the command line: one sentence each, which names the option and what is nearest."""

import sys
from pathlib import Path

import pytest
import torch
import yaml

from lightning_prune.cli import shipped_configs
from lightning_prune.cli.entry import main
from lightning_prune.cli.option_errors import nearest, reworded
from lightning_prune.cli.sentences import is_refusal, sentence
from lightning_prune.planning import check_keep

QUICK = ["fit", "--config", "quickstart"]


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["lightning-prune"])


def said(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """Return the only line that a command says before it ends."""
    with pytest.raises(SystemExit) as left:
        main(list(arguments))
    told = capsys.readouterr()
    assert told.out == ""
    if isinstance(left.value.code, str):
        return left.value.code
    assert left.value.code == 2
    assert told.err.count("\n") == 1
    return told.err.strip()


OPTIONS = [
    (
        ["--trainer.callbacks.init_args.keep", "0.3"],
        "init_args.keep; did you mean --prune.keep?",
    ),
    (["--prune.kep", "0.3"], "There is no option --prune.kep; did you mean --prune.keep"),
    (["--prune.keep", "much"], "--prune.keep takes a number or a list or null; got 'much'."),
    (["--prune", "TailorRankCallback"], "no class that is known; did you mean TaylorRankCallback?"),
    (["--model.netwrk", "digits"], "There is no option --model.netwrk; did you mean --model.network"),
    (
        ["--model", "ImageClasifier"],
        "'ImageClasifier', which is no class that is known; did you mean ImageClassifier?",
    ),
    (["--model.init_args.network", "digts"], "Unknown network 'digts': choose one of resnet20"),
    (["--model.init_args.weights", "no.pt"], "There is no weights file 'no.pt': correct the path given as `weights`."),
    (["--data.batch_sise", "3"], "There is no option --data.batch_sise; did you mean --data.batch_size?"),
    (["--trainer.max_epochs", "three"], "--trainer.max_epochs takes a whole number or null; got 'three'."),
    (["--torch_threads", "0"], "--torch_threads takes a number >0 or null; got '0'."),
    (["--ckpt_path", "nothing.ckpt"], "There is no checkpoint at 'nothing.ckpt': correct --ckpt_path."),
    (["--prune.keep", "2"], "keep must be the fraction that is kept, above 0 and at most 1; got 2.0."),
]


FEW = ("--trainer.callbacks.init_args.keep", "--prune.kep", "--model.init_args.weights", "--trainer.max_epochs")
ROWS = [
    pytest.param(options, message, id="=".join(options), marks=() if options[0] in FEW else pytest.mark.long)
    for options, message in OPTIONS
]


@pytest.mark.parametrize(("options", "message"), ROWS)
def test_a_wrong_option_gets_its_sentence(options: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert message in said(capsys, *QUICK, *options)
    assert list(Path().iterdir()) == []


def test_a_damaged_checkpoint_is_one_sentence(capsys: pytest.CaptureFixture[str]) -> None:
    torch.save({"state_dict": {"a": torch.zeros(1000)}}, "a.ckpt")
    Path("a.ckpt").write_bytes(Path("a.ckpt").read_bytes()[:2000])
    assert "'a.ckpt' cannot be read as a checkpoint" in said(capsys, *QUICK, "--ckpt_path", "a.ckpt")


def test_a_schedule_that_does_not_fit_is_refused_before_data_and_logs(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def touched(*_: object) -> None:
        raise AssertionError("the data were touched")

    monkeypatch.setattr("lightning_prune.datamodules.DigitsDataModule.setup", touched)
    told = said(capsys, *QUICK, "--trainer.max_epochs", "3")
    assert "prunes before epochs 6 to 9 (counted from 0), but the run ends after 3 epochs; raise max_epochs" in told
    assert list(Path().iterdir()) == []


def test_wrong_names_in_configs_and_of_configs(capsys: pytest.CaptureFixture[str]) -> None:
    content = yaml.safe_load((shipped_configs.FOLDER / "quickstart.yaml").read_text())
    for section, name, message in [
        ("trainer", "max_epoks", "There is no option --trainer.max_epoks; did you mean --trainer.max_epochs"),
        ("prun", "keep", "There is no option --prun.keep; did you mean --prune.keep?"),
    ]:
        changed = {**content, section: {**content.get(section, {}), name: 3}}
        Path("a.yaml").write_text(yaml.safe_dump(changed))
        assert message in said(capsys, "fit", "--config", "a.yaml")
    content["model"]["init_args"]["num_clases"] = 10
    Path("a.yaml").write_text(yaml.safe_dump(content))
    assert "There is no option --num_clases; did you mean --model.num_classes?" in said(capsys, "fit", "-c", "a.yaml")
    told = said(capsys, "fit", "--config", "quickstrt")
    assert "'quickstrt', which is neither a file nor a config that ships; did you mean quickstart?" in told


def test_wrong_commands(capsys: pytest.CaptureFixture[str]) -> None:
    told = said(capsys, "fti")
    assert told.startswith("There is no command 'fti'; did you mean fit? The commands are fit, validate, ")
    assert "Name a command. The commands are" in said(capsys)
    assert "There is no option --kep; did you mean --keep?" in said(capsys, "prune", "a.ckpt", "b.ckpt", "--kep", "1")
    assert "argument --keep: invalid float value: 'x'" in said(capsys, "prune", "a.ckpt", "b.ckpt", "--keep", "x")
    assert "inspect needs a model" in said(capsys, "inspect")
    assert "--data and --model" in said(capsys, "fit")


def test_with_traceback_the_error_itself_is_raised() -> None:
    with pytest.raises(ValueError, match="keep must be the fraction"):
        main(["prune", "a.ckpt", "b.ckpt", "--keep", "2", "--traceback"])


def test_errors_of_a_project_keep_their_traceback() -> None:
    with pytest.raises(ValueError, match="mine") as of_project:
        exec("raise ValueError('mine')")
    with pytest.raises(TypeError) as mistake_of_ours:
        nearest(None, 3)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="keep must be") as refusal:
        check_keep(2)
    assert not is_refusal(of_project.value, runs_projects=True)
    assert not is_refusal(mistake_of_ours.value, runs_projects=True)
    assert is_refusal(refusal.value, runs_projects=True)
    assert is_refusal(OSError(28, "No space left on device", "a.pt"), runs_projects=False)
    written = RuntimeError("[enforce fail at inline_container.cc:664] . unexpected pos 704 vs 598")
    assert is_refusal(written, runs_projects=True)
    assert "no space is left on its device" in sentence(written)


def test_help_says_first_what_a_command_does(capsys: pytest.CaptureFixture[str]) -> None:
    told = {
        "fit": "Train a model, and prune it while it trains",
        "inspect": "Print which channels of a model can be pruned",
        "prune": "Prune a trained checkpoint to a budget without training",
        "plan": "Measure what budgets would cost before any training",
    }
    for command, expected in told.items():
        with pytest.raises(SystemExit) as left:
            main([command, "--help"])
        assert left.value.code == 0
        shown = capsys.readouterr().out
        assert expected in " ".join(shown[:1500].split())
    main(["--help"])
    shown = capsys.readouterr().out
    assert all(f"  {command} " in shown for command in told)


def test_inspect_needs_no_data_and_takes_shapes(capsys: pytest.CaptureFixture[str]) -> None:
    Path("a.yaml").write_text("model:\n  class_path: battery.ResidualClassifier\n")
    assert "has no example_input_array; say what its forward takes" in said(capsys, "inspect", "--config", "a.yaml")
    main(["inspect", "--config", "a.yaml", "--input_shape", "1", "1", "8", "8"])
    assert "groups of" in capsys.readouterr().out
    told = said(capsys, "inspect", "--config", "a.yaml", "--input_shape", "1", "3", "8", "8")
    assert "Inputs of shape (1, 3, 8, 8) do not fit ResidualClassifier" in told


def test_what_is_not_known_is_left_as_it_is() -> None:
    assert reworded("Something else:\n  entirely", []) == "Something else: entirely"
    assert nearest("zzz", ["--keep"]) == ""
