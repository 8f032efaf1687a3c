"""What the tests of callbacks share."""

from pathlib import Path

import pytest


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let Trainers that are told of no folder write where nothing is to be kept."""
    monkeypatch.chdir(tmp_path)
