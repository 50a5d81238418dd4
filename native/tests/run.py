"""Kernels of other processors, built with what is here and run: python native/tests/run.py arm

arm   aarch64-linux-gnu-g++ (Debian's g++-aarch64-linux-gnu) and the ziglang wheel, each where it is found, under
      qemu-aarch64 (Debian's qemu-user) as three processors: with i8mm, with the dot product only, with neither.
wasm  the ziglang wheel, in the engine of the wasmtime wheel.
host  the processor of this machine, with c++ and the ziglang wheel.

The program that runs is kernel_check.cc with one check_*.cc for each operator; cmake builds it under build/kernels.
Where a tool is missing, the line that says so names the package, and nothing counts as passed. The last line is the
sum; the exit status is 1 after a failure.
"""

from __future__ import annotations

import argparse
import platform
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
ZIG = f"{sys.executable};-m;ziglang;c++"
CPUS = {"max": "neon_i8mm", "neoverse-n1": "neon_dot", "cortex-a53": "neon"}
"""Of qemu, with the tier that the program has to find to be the best."""


class Missing(Exception):
    """A tool that is not here; the message says how to get it."""


@dataclass(frozen=True)
class Compiler:
    name: str
    options: tuple[str, ...]
    """For cmake."""


@dataclass
class Tally:
    passed: int = 0
    failed: int = 0
    skipped: int = 0

    def add(self, output: str, status: int) -> None:
        """Count a run by its closing line; a run without one, or that fails without saying so, is a failure."""
        found = re.search(r"^(\d+) passed, (\d+) failed\s*\Z", output, re.MULTILINE)
        self.passed += int(found[1]) if found else 0
        failed = int(found[2]) if found else 1
        self.failed += max(failed, 1 if status != 0 else 0)

    def __str__(self) -> str:
        return f"{self.passed} passed, {self.failed} failed" + (f", {self.skipped} skipped" if self.skipped else "")


def tool(name: str, package: str) -> str:
    path = shutil.which(name) or shutil.which(name, path=str(Path(sys.executable).parent))
    if path is None:
        raise Missing(f"{name} is not here: {package}")
    return path


def compilers(target: str) -> list[Compiler]:
    """Every compiler for a target that is here. Raises Missing where there is none."""
    processor, triple = {"arm": ("aarch64", "aarch64-linux-musl"), "wasm": ("wasm32", "wasm32-wasi"),
                         "host": (platform.machine(), f"{platform.machine()}-linux-gnu")}[target]
    system = () if target == "host" else (
        f"-DCMAKE_SYSTEM_NAME={'Linux' if target == 'arm' else 'Generic'}", f"-DCMAKE_SYSTEM_PROCESSOR={processor}")
    found = []
    if target == "arm" and (gcc := shutil.which("aarch64-linux-gnu-g++")):
        found.append(Compiler("gcc", (*system, f"-DCMAKE_CXX_COMPILER={gcc}", "-DCMAKE_EXE_LINKER_FLAGS=-static")))
    if target == "host" and (native := shutil.which("c++")):
        found.append(Compiler("cxx", (f"-DCMAKE_CXX_COMPILER={native}",)))
    if find_spec("ziglang"):
        flags = ("-DCMAKE_CXX_FLAGS=-msimd128 -fno-exceptions",) if target == "wasm" else ()
        zig = (f"-DCMAKE_CXX_COMPILER={ZIG}", f"-DCMAKE_CXX_COMPILER_TARGET={triple}")
        found.append(Compiler("zig", (*system, *zig, *flags)))
    if not found:
        other = ", or apt-get install g++-aarch64-linux-gnu" if target == "arm" else ""
        raise Missing(f"no compiler: pip install ziglang{other}")
    return found


def build(target: str, compiler: Compiler, engine: bool) -> Path | None:
    """The program, or None after a failure, whose messages are printed. engine: compile the whole engine too."""
    cmake = tool("cmake", "pip install cmake")
    folder = ROOT / "build" / "kernels" / f"{target}-{compiler.name}"
    ninja = shutil.which("ninja") or shutil.which("ninja", path=str(Path(sys.executable).parent))
    generator = ["-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={ninja}"] if ninja else []
    configure = [cmake, "-S", str(ROOT), "-B", str(folder), *generator, "-DEDGEWISE_PYTHON=OFF", *compiler.options]
    targets = ["kernel_check", *(["edgewise_core"] if engine else [])]
    make = [cmake, "--build", str(folder), "-j", "2", "--target", *targets]
    print(f"{target}: building with {compiler.name}", flush=True)
    for command in (configure, make):
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        if done.returncode != 0:
            print(done.stdout)
            return None
    return folder / "kernel_check"


def run_wasm(program: Path) -> int:
    """Run `_start` in wasmtime; output goes to ours. Returns the exit status."""
    import wasmtime

    engine = wasmtime.Engine()
    linker, store, config = wasmtime.Linker(engine), wasmtime.Store(engine), wasmtime.WasiConfig()
    linker.define_wasi()
    config.argv = ["kernel_check", "wasm"]
    config.inherit_stdout()
    store.set_wasi(config)
    start = linker.instantiate(store, wasmtime.Module.from_file(engine, str(program))).exports(store)["_start"]
    try:
        start(store)
    except wasmtime.ExitTrap as trap:
        return int(trap.code)
    return 0


def commands(target: str, program: Path, best: str | None) -> list[list[str]]:
    """What to run, one command for each processor. best: the tier that an earlier program found to be the best."""
    if target == "host":
        return [[str(program), *(["--run", best] if best else [])]]
    if target == "wasm":
        return [[sys.executable, str(Path(__file__).resolve()), "wasm", "--program", str(program)]]
    return [[emulator(), "-cpu", cpu, str(program), tier] for cpu, tier in CPUS.items()]


def emulator() -> str:
    return shutil.which("qemu-aarch64-static") or tool("qemu-aarch64", "apt-get install qemu-user")


def check(target: str, tally: Tally) -> None:
    if target == "arm":
        emulator()
    if target == "wasm" and not find_spec("wasmtime"):
        raise Missing("no WebAssembly engine: pip install wasmtime")
    best = None
    for compiler in compilers(target):
        program = build(target, compiler, engine=target != "wasm")
        if program is None:
            tally.failed += 1
            continue
        for command in commands(target, program, best):
            if target == "arm":
                print(f"arm: {compiler.name}, {command[2]}", flush=True)
            done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
            print(done.stdout, end="", flush=True)
            tally.add(done.stdout, done.returncode)
            if tiers := re.findall(r"^(\w+): \d+ cases equal$", done.stdout, re.MULTILINE):
                best = tiers[-1]


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("target", choices=["arm", "wasm", "host"])
    parser.add_argument("--program", type=Path, help="wasm: only run this one")
    given = parser.parse_args(arguments)
    if given.program:
        return run_wasm(given.program)
    tally = Tally()
    try:
        check(given.target, tally)
    except Missing as missing:
        print(f"skipped: {missing}")
        tally.skipped += 1
    print(tally)
    return 1 if tally.failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
