"""What pip, reckless and a shell make of this project. No test here needs a network."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest

import backend
from serving.keeper import SERVER_NAME
from tests import support
from tests.support import PluginProcess, change, run_cli
from tests.test_environment import PACKAGES, make_venv

COMPLETE = "_BACKUP_CLI_COMPLETE"
OTHER_LISTS = ["requirements.txt", "requirements-postgres.txt"]
RECKLESS = all(map(shutil.which, ["reckless", "lightningd", "lightning-cli", "git"]))


def run(*command: object, check: int = 0, **options: Any) -> str:
    """What ``command`` prints."""
    done: subprocess.CompletedProcess[str] = subprocess.run(
        [str(part) for part in command],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        **{"timeout": support.ANSWER_S, **options},
    )
    assert done.returncode == check, done.stdout
    return done.stdout


def copy_of_the_tree(target: Path) -> Path:
    """The files that a commit of now would hold."""
    names = run("git", "ls-files", "-z", "-co", "--exclude-standard", cwd=support.ROOT)
    for name in filter(None, names.split("\0")):
        source = support.ROOT / name
        if source.is_file():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(source, target / name)
    return target


def listed(name: str) -> set[str]:
    """The requirements in ``pyproject.toml`` under ``name``."""
    text = (support.ROOT / "pyproject.toml").read_text()
    (block,) = re.findall(rf"^{name} = \[\n(.*?)^\]", text, re.MULTILINE | re.DOTALL)
    return set(re.findall(r'"(.*)"', block))


def test_the_requirements_are_one_list() -> None:
    required = set((support.ROOT / "requirements.txt").read_text().split())
    assert listed("dependencies") == required
    dev = set((support.ROOT / "requirements-dev.txt").read_text().split("\n")) - {""}
    postgres = set((support.ROOT / "requirements-postgres.txt").read_text().split())
    assert listed("postgres") == postgres
    assert listed("dev") - postgres | {f"-r {name}" for name in OTHER_LISTS} == dev
    for line in required | postgres:
        assert re.fullmatch(r"[\w\[\]-]+>=[\d.]+,<[\d.]+", line)


def test_one_version() -> None:
    assert run_cli("--version").stdout == f"backup-cli, version {backend.RELEASE}\n"
    assert SERVER_NAME.endswith(f" {backend.RELEASE}")


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The ``bin`` of a venv into which pip installed this tree."""
    if setuptools_release() < 77:
        pytest.skip("setuptools 77 is needed to build a package (requirements-dev.txt)")
    tree = copy_of_the_tree(tmp_path_factory.mktemp("tree"))
    python = make_venv(tmp_path_factory.mktemp("place") / "venv", packages=True)
    pip = [sys.executable, "-m", "pip", "--python", python, "install", "--quiet", "--no-deps"]
    run(*pip, "--no-build-isolation", "--no-index", "--disable-pip-version-check", tree)
    return python.parent


def setuptools_release() -> int:
    try:
        return int(metadata.version("setuptools").partition(".")[0])
    except metadata.PackageNotFoundError:
        return 0


def test_pip_installs_the_commands(installed: Path, node_dir: Path, url: str) -> None:
    cli, plugin = installed / "backup-cli", installed / "cln-backup-plugin"
    assert backend.RELEASE in run(cli, "--version")
    said = run(cli, "init", "--lightning-dir", node_dir, url)
    assert f"important-plugin={plugin}" in said
    assert f"{cli} restore" in said
    serves(plugin, node_dir)


def test_pip_is_named_for_the_package_of_postgresql(installed: Path, tmp_path: Path) -> None:
    (tmp_path / "psycopg.py").write_text("raise ImportError('No module named psycopg')\n")
    done = subprocess.run(
        [installed / "backup-cli", "status", "postgresql://me@host/db"],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        check=False,
    )
    assert f"Run `{installed}/python -m pip install 'psycopg[binary]'`." in done.stderr


def test_the_package_holds_all_modules_in_one_place(installed: Path) -> None:
    (site,) = installed.parent.glob("lib/python*/site-packages")
    names = {path.name.partition("-")[0] for path in site.iterdir()}
    assert names == {"cln_backup", "packages.pth"}
    tracked = run("git", "ls-files", "*.py", "backup-cli", cwd=support.ROOT).split()
    for name in tracked:
        if Path(name).parts[0] not in ("tests", "bench", "cln_backup"):
            assert (site / "cln_backup" / "program" / name).exists(), name
    assert (site / "cln_backup" / "__init__.py").exists()


def test_manifest() -> None:
    """The fields of Core Lightning's reckless, as its coming releases read them."""
    manifest = json.loads((support.ROOT / "manifest.json").read_text())
    assert set(manifest) == {
        *("name", "short_description", "long_description"),
        *("entrypoint", "requirements", "dependencies"),
    }
    assert os.access(support.ROOT / manifest["entrypoint"], os.X_OK)
    assert manifest["entrypoint"] == f"{manifest['name']}.py", "reckless wants it so without it"


def test_reckless_wrapper(node_dir: Path, url: str, tmp_path: Path) -> None:
    """What reckless writes in place of backup.py, with the code in source/backup."""
    home = tmp_path / "reckless" / "backup"
    source = copy_of_the_tree(home / "source" / "backup")
    python = make_venv(home / ".venv", packages=True)
    wrapper = home / "backup.py"
    wrapper.write_text(
        f"#!{python}\nimport sys\nimport runpy\n\n"
        f"if '{source}' not in sys.path:\n    sys.path.append('{source}')\n"
        f"if '{home}' in sys.path:\n    sys.path.remove('{home}')\n"
        'runpy.run_module("backup", {}, "__main__")'
    )
    wrapper.chmod(0o755)
    use_plugin(wrapper, [str(python), str(source / "backup-cli")], node_dir, url)


def use_plugin(plugin: Path, cli: list[str], node_dir: Path, url: str) -> None:
    run(*cli, "init", "--lightning-dir", node_dir, url)
    serves(plugin, node_dir)


def serves(plugin: Path, node_dir: Path) -> None:
    """A commit, and a look at the backup through the plugin."""
    with PluginProcess(node_dir, [str(plugin)]) as running:
        running.manifest()
        running.write(*change(1, "CREATE TABLE vars (name TEXT, intval INTEGER)"))
        running.init(node_dir)
        assert running.call("backup-status")["version"] == 1
        assert running.close() == 0


@pytest.mark.skipif(not RECKLESS, reason="Core Lightning with its reckless is not on PATH")
def test_reckless_installs(
    node_dir: Path, url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = copy_of_the_tree(tmp_path / "source" / "backup")
    git = ["git", "-C", source, "-c", "user.name=t", "-c", "user.email=t@localhost"]
    run("git", "init", "--quiet", source)
    run(*git, "add", "--all")
    run(*git, "commit", "--quiet", "--message", "all")
    directory = tmp_path / "node"
    (directory / "reckless").mkdir(parents=True)
    # Its venv is of the Python that runs it, as these tests' packages are.
    reckless = [sys.executable, str(shutil.which("reckless")), "-r", "-v", "-l", str(directory)]
    answers = "Y\n" * 20  # It asks before it makes its configuration.
    # The packages are here already; pip may not fetch any.
    site = os.pathsep.join(map(str, PACKAGES))
    environment = dict(os.environ, PYTHONPATH=site, PIP_NO_INDEX="1")
    options: dict[str, Any] = {"input": answers, "env": environment}
    run(*reckless, "source", "list", **options)
    (directory / "reckless" / ".sources").write_text(f"{source}\n")
    said = run(*reckless, "install", "backup", **options)
    assert "plugin installed" in said
    plugin = directory / "reckless" / "backup" / "backup.py"
    assert "runpy.run_module" in plugin.read_text(), said
    python = plugin.parent / ".venv" / "bin" / "python"
    cli = plugin.parent / "source" / "backup" / "backup-cli"
    monkeypatch.setenv("PYTHONPATH", site)
    use_plugin(plugin, [str(python), str(cli)], node_dir, url)
    enabled = (directory / "reckless" / "regtest-reckless.conf").read_text()
    assert f"plugin={plugin}" in enabled


@pytest.mark.skipif(shutil.which("bash") is None, reason="bash is not on PATH")
def test_bash_completes(tmp_path: Path) -> None:
    """The script that click gives, loaded by a real bash, and what it then offers."""
    python = f"#!{sys.executable}\n"
    command = tmp_path / "bin" / "backup-cli"
    command.parent.mkdir()
    command.write_text(
        f"{python}import runpy, sys\nsys.path.insert(0, {str(support.ROOT)!r})\n"
        f"runpy.run_path({str(support.CLI)!r}, run_name='__main__')\n"
    )
    command.chmod(0o755)
    script = (
        f'eval "$({COMPLETE}=bash_source backup-cli)"\n'
        "COMP_WORDS=(backup-cli res) COMP_CWORD=1\n"
        "_backup_cli_completion backup-cli\n"
        'echo "${COMPREPLY[@]}"\n'
    )
    path = f"{command.parent}{os.pathsep}{os.environ['PATH']}"
    said = run("bash", "-c", script, env=dict(os.environ, PATH=path))
    assert set(said.split()) >= {"restore", "resync"}
