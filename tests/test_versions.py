"""The versions that pyproject.toml allows: the lowest and the newest ones, each in an environment of its own."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

tomllib = pytest.importorskip("tomllib", reason="Python before 3.11 cannot read pyproject.toml")
requirements = pytest.importorskip("packaging.requirements")

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
# Extras of the lowest versions; `export` asks for a newer PyTorch than the package does, and is tried with the newest.
EXTRAS = {"lowest": ("quickstart", "agents", "report"), "newest": ("quickstart", "agents", "report", "export")}
RUNNERS = ("pytest", "pytest-xdist", "hypothesis")
# The Pythons that these tests run on.
PYTHONS = {"lowest": "3.10", "newest": "3.13"}
# Graph, surgery, criteria, and the first rows of the battery.
TESTS = (["tests/graph", "tests/surgery", "tests/criteria"], ["tests/test_battery.py", "-k", "magnitude or taylor"])


def required(environment: str) -> list[str]:
    """Return what the package requires in an environment, with extras, and what runs its tests."""
    extras = PROJECT["optional-dependencies"]
    runners = [each for each in extras["test"] if requirements.Requirement(each).name in RUNNERS]
    return [*PROJECT["dependencies"], *(each for extra in EXTRAS[environment] for each in extras[extra]), *runners]


def lowest(requirement: str) -> str:
    """Return the lowest version that a requirement allows."""
    parsed = requirements.Requirement(requirement)
    (bound,) = {each.version for each in parsed.specifier if each.operator in (">=", "==")}
    extras = f"[{','.join(sorted(parsed.extras))}]" if parsed.extras else ""
    return f"{parsed.name}{extras}=={bound}"


def interpreter(version: str) -> str:
    """Return a Python of a version, or skip the test."""
    ask = "import sys; print(sys.executable)"
    environment = {**os.environ, "PYENV_VERSION": version}  # where that is how versions are told apart
    for command in (f"python{version}", sys.executable):
        try:
            done = subprocess.run([command, "-c", ask], env=environment, capture_output=True, text=True, check=True)
        except (OSError, subprocess.CalledProcessError):
            continue
        if command != sys.executable or sys.version.startswith(version):
            return done.stdout.strip()
    pytest.skip(f"there is no Python {version}")


def install(python: str, folder: Path, packages: list[str]) -> str:
    """Make an environment with some packages; returns its Python, or skips the test if nothing can be downloaded."""
    subprocess.run([python, "-m", "venv", folder], check=True)
    made = str(folder / "bin" / "python")
    reach = [
        made,
        "-m",
        "pip",
        "download",
        "--quiet",
        "--no-deps",
        "--dest",
        str(folder / "reach"),
        "typing-extensions",
    ]
    if subprocess.run(reach, capture_output=True, check=False).returncode:
        pytest.skip("the registry is out of reach")
    done = subprocess.run(
        [made, "-m", "pip", "install", "--quiet", *packages], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return made


@pytest.fixture(scope="module", params=PYTHONS)
def python(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> str:
    """Return the Python of an environment with the lowest or with the newest versions."""
    packages = required(request.param)
    if request.param == "lowest":
        packages = list(map(lowest, packages))
    version = PYTHONS[request.param]
    return install(interpreter(version), tmp_path_factory.mktemp(request.param) / "environment", packages)


@pytest.mark.long
@pytest.mark.parametrize("tests", TESTS, ids=lambda tests: tests[0])
def test_the_lowest_and_the_newest_versions_pass(python: str, tests: list[str]) -> None:
    command = [python, "-m", "pytest", "-n", "0", "-q", "-p", "no:cacheprovider", *tests]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]
    assert " passed" in done.stdout


def test_bounds_are_read_as_by_hand() -> None:
    assert lowest("jsonargparse[signatures]>=4.39,<5") == "jsonargparse[signatures]==4.39"
    assert lowest("fvcore>=0.1.5.post20221221") == "fvcore==0.1.5.post20221221"


@pytest.mark.parametrize("environment", EXTRAS)
def test_everything_required_has_a_lowest_version(environment: str) -> None:
    assert {"torch", "lightning", "pytest"} <= {lowest(each).partition("==")[0] for each in required(environment)}


def test_classifiers_name_pythons_that_are_allowed() -> None:
    allowed = requirements.SpecifierSet(PROJECT["requires-python"])
    named = {each.rpartition(" :: ")[2] for each in PROJECT["classifiers"] if "Python :: 3." in each}
    assert PYTHONS["lowest"] in named
    assert all(each in allowed for each in {*named, *PYTHONS.values()})
