"""`fusedres info` says what `fusedres.info()` knows, to people and to programs."""

import json
import subprocess
import sys

import fusedres
from fusedres.cli import info, main


def test_json(capsys):
    assert main(["info", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == fusedres.info()


def test_text_names_everything(capsys):
    assert main(["info"]) == 0
    text = capsys.readouterr().out
    facts = fusedres.info()
    for fact in (facts["version"], facts["torch"], facts["cpu"]["name"], facts["cpu"]["capability"], *facts["devices"]):
        assert fact in text
    for name in facts["libraries"]:
        assert name in text
    for name, devices in facts["ops"].items():
        lines = [line.split(maxsplit=2) for line in text.splitlines() if line.split()[:1] == [name]]
        assert [line[1] for line in lines] == [by["served_by"] for by in devices.values()]


def test_text_carries_the_loaders_message():
    facts = fusedres.info()
    facts["libraries"]["_ops_cpu"] = {"loaded": False, "path": None, "error": "undefined\n symbol: x"}
    assert "_ops_cpu   absent  undefined symbol: x" in info.render(facts)


def test_import_is_light():
    code = (
        "import sys, fusedres, fusedres.cli; "
        "heavy = {'matplotlib', 'rich', 'sklearn', 'triton', 'PIL', 'scipy'} & set(sys.modules); "
        "sys.exit(str(heavy) if heavy else 0)"
    )
    environment_path = fusedres.__path__[0].rpartition("/")[0]
    done = subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path.insert(0, {environment_path!r}); {code}"],
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
