"""What this project's sources must not do, read off the syntax trees: run a shell, load a pickle of others, run code of a model."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SOURCES = sorted(path for folder in ("pesc", "tasks", "flows", "deployments") for path in (ROOT / folder).rglob("*.py"))
SHELLS = {
    "os.system", "os.popen", "os.spawnl", "os.spawnv", "os.execl", "os.execlp", "subprocess.getoutput", "subprocess.getstatusoutput",
    "asyncio.create_subprocess_shell", "pty.spawn", "commands.getoutput",
}  # fmt: skip
SHELL_PROGRAMS = {"sh", "bash", "dash", "zsh", "/bin/sh", "/bin/bash", "cmd", "cmd.exe", "powershell"}
OWN_MESSAGES = {"pesc/launch/pool.py", "pesc/launch/relay.py", "tasks/cluster.py"}
"""Pickles that go between processes which this project has started: shards and their results."""


def calls(tree: ast.AST) -> Iterator[tuple[str, ast.Call]]:
    """Every call with its dotted name, as far as it has one."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func), node


def keyword(call: ast.Call, name: str) -> ast.expr | None:
    return next((item.value for item in call.keywords if item.arg == name), None)


def shell_faults(tree: ast.AST) -> list[str]:
    """Calls that would have a shell read a command line."""
    found = []
    for name, call in calls(tree):
        shell = keyword(call, "shell")
        if name in SHELLS or (shell is not None and not (isinstance(shell, ast.Constant) and not shell.value)):
            found.append(f"line {call.lineno}: {name}")
        if name.startswith("subprocess.") and call.args:
            command = call.args[0]
            first = command.elts[0] if isinstance(command, ast.List | ast.Tuple) and command.elts else command
            is_line = isinstance(command, ast.JoinedStr) or (isinstance(command, ast.Constant) and isinstance(command.value, str))
            if is_line or (isinstance(first, ast.Constant) and first.value in SHELL_PROGRAMS):
                found.append(f"line {call.lineno}: {name} of {ast.unparse(first)}")
    return found


def pickle_faults(tree: ast.AST, path: str) -> list[str]:
    """Calls that would run what a file says."""
    found = []
    for name, call in calls(tree):
        is_true = [
            isinstance(value := keyword(call, wanted), ast.Constant) and value.value is True for wanted in ("weights_only", "allow_pickle")
        ]
        loads_pickle = name.split(".")[0] in ("pickle", "cloudpickle", "dill", "joblib", "marshal", "shelve") and name.split(".")[-1] in (
            "load",
            "loads",
            "open",
            "Unpickler",
        )
        if (
            (loads_pickle and path not in OWN_MESSAGES)
            or (name in ("torch.load", "torch.serialization.load") and not is_true[0])
            or is_true[1]
            or name in ("yaml.unsafe_load", "yaml.full_load", "pandas.read_pickle", "pd.read_pickle", "torch.jit.load", "torch.hub.load")
            or (
                name == "yaml.load"
                and "Safe" not in ast.unparse(keyword(call, "Loader") or ast.Constant(None))
                and path != "pesc/recipe.py"
            )
        ):
            found.append(f"line {call.lineno}: {name}")
    return found


def trust_faults(tree: ast.AST) -> list[str]:
    """Loads of models and tokenizers that leave open whether code of theirs is run."""
    found = []
    for name, call in calls(tree):
        owner, _, method = name.rpartition(".")
        if method in ("from_pretrained", "from_config") and owner.startswith("Auto"):
            spread = [ast.unparse(item.value) for item in call.keywords if item.arg is None]
            if keyword(call, "trust_remote_code") is None and not set(spread) & {"code", "where", "options"}:
                found.append(f"line {call.lineno}: {name}")
    return found


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_the_sources_run_no_shell_no_pickle_and_no_code_of_a_model(path):
    tree, name = ast.parse(path.read_text(encoding="utf-8")), path.relative_to(ROOT).as_posix()
    assert shell_faults(tree) == []
    assert pickle_faults(tree, name) == []
    assert trust_faults(tree) == []


@pytest.mark.parametrize(
    "text",
    [
        "os.system('ls')", "subprocess.run(line, shell=True)", "subprocess.run(f'ls {x}')", "subprocess.Popen(['bash', '-c', x])", "subprocess.run('ls')",
        "subprocess.run(x, shell=flag)", "subprocess.getoutput(x)",
    ],
)  # fmt: skip
def test_a_shell_is_found(text):
    assert shell_faults(ast.parse(text))


@pytest.mark.parametrize(
    "text",
    [
        "pickle.load(f)", "pickle.loads(b)", "torch.load(p)", "torch.load(p, weights_only=False)", "np.load(p, allow_pickle=True)", "yaml.load(t)",
        "yaml.load(t, Loader=yaml.Loader)", "joblib.load(p)", "torch.load(p, weights_only=flag)",
    ],
)  # fmt: skip
def test_a_pickle_is_found(text):
    assert pickle_faults(ast.parse(text), "pesc/any.py")


def test_what_is_safe_is_left_alone():
    text = "torch.load(p, weights_only=True); np.load(p); yaml.load(t, Loader=yaml.SafeLoader); subprocess.run([program, x], shell=False); pickle.dumps(x)"
    assert pickle_faults(ast.parse(text), "pesc/any.py") == []
    assert shell_faults(ast.parse(text)) == []
    assert trust_faults(ast.parse("AutoModel.from_pretrained(p, trust_remote_code=False); PeftConfig.from_pretrained(p)")) == []


def test_a_load_that_leaves_trust_open_is_found():
    assert trust_faults(ast.parse("AutoTokenizer.from_pretrained(p)"))
    assert trust_faults(ast.parse("AutoModelForCausalLM.from_pretrained(p, **settings)"))
