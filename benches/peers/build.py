"""Builds what this machine can build. Everything goes into one folder, except for the languages'
own package caches.
"""

import pathlib
import shutil
import subprocess
import sys

HERE = pathlib.Path(__file__).resolve().parent
ROOT = HERE.parent.parent


class CannotBuild(Exception):
    """What is missing or failed, and what to do. `last` is the last output; it may name local
    folders, so it is shown but not stored.
    """

    def __init__(self, why, last=""):
        super().__init__(why)
        self.last = last


def tool(name, hint):
    path = shutil.which(name)
    if not path:
        raise CannotBuild(f"{name} is not on the PATH: install {hint}")
    return path


def do(command, cwd, log):
    with open(log, "ab") as out:
        out.write(f"$ {' '.join(map(str, command))}\n".encode())
        out.flush()
        code = subprocess.run(command, cwd=cwd, stdin=subprocess.DEVNULL, stdout=out, stderr=subprocess.STDOUT).returncode
    if code:
        last = log.read_text(errors="replace").strip().splitlines()[-3:]
        raise CannotBuild(f"{pathlib.Path(command[0]).name} ended with {code}", f" (see {log}): {' / '.join(last)}")


def go(folder, log):
    # Modules that go.sum does not list are not used.
    do([tool("go", "Go 1.26 or later"), "build", "-mod=readonly", "-trimpath", "-o", folder / "peers", "."], HERE / "go", log)
    return [folder / "peers"]


def rust(folder, log):
    do([tool("cargo", "Rust 1.88 or later"), "build", "--release", "--locked", "--target-dir", folder], HERE / "rust", log)
    return [folder / "release" / "shardlock-peers"]


def java(folder, log):
    java, javac = tool("java", "a JDK, 17 or later"), tool("javac", "a JDK, 17 or later")
    maven = tool("mvn", "Maven, which fetches Redisson")
    for old in ("lib", "classes"):
        shutil.rmtree(folder / old, ignore_errors=True)
    do([maven, "-q", "-B", "dependency:copy-dependencies", f"-DoutputDirectory={folder / 'lib'}"], HERE / "java", log)
    sources = sorted((HERE / "java").rglob("*.java"))
    do([javac, "--release", "17", "-d", folder / "classes", "-cp", f"{folder / 'lib'}/*", *sources], HERE / "java", log)
    # Forty of them must fit into memory together.
    return [java, "-Xmx512m", "-cp", f"{folder / 'classes'}:{folder / 'lib'}/*", "peers.Peer"]


def node(folder, log):
    node, npm = tool("node", "Node.js 18 or later"), tool("npm", "npm")
    for name in ("package.json", "package-lock.json", "peer.mjs"):
        shutil.copy(HERE / "node" / name, folder / name)
    do([npm, "ci", "--ignore-scripts", "--no-audit", "--no-fund"], folder, log)
    return [node, folder / "peer.mjs"]


def python(folder, log):
    venv = folder / "bin" / "python"
    if not venv.exists():
        do([sys.executable, "-m", "venv", folder], HERE, log)
    do([venv, "-m", "pip", "install", "-q", "--only-binary", ":all:", "-r", HERE / "python" / "requirements.txt"], HERE, log)
    return [venv, HERE / "python" / "peer.py"]


def shardlock(_folder, log):
    target = ROOT / "target"
    do([tool("cargo", "Rust 1.88 or later"), "build", "--release", "--locked", "--package", "shardlock-cli", "--target-dir", target], ROOT, log)
    return [target / "release" / "shardlock", "bench"]


PROGRAMS = {"shardlock": shardlock, "rust": rust, "go": go, "java": java, "python": python, "node": node}


def build(names, folder, say):
    """The command of each program that was built, and for each other one why it was not."""
    commands, missing = {}, {}
    for name in names:
        own = folder / name
        own.mkdir(parents=True, exist_ok=True)
        log = folder / f"{name}.log"
        log.unlink(missing_ok=True)
        say(f"building {name}")
        try:
            commands[name] = [str(word) for word in PROGRAMS[name](own, log)]
        except CannotBuild as why:
            missing[name] = str(why)
            say(f"NOT BUILT {name}: {why}{why.last}")
    return commands, missing
