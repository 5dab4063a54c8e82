"""Compile the CUDA sources for every architecture and prove from the machine code what no test without a GPU can see.

    python tools/check_cuda.py [SOURCE ...]     (needs the packages of requirements-cuda.txt)

For every kernel: no spills, and none of ptxas' notes that it gave up registers or pipelining. For Ampere's: that the
matrix unit, its loads and the copies that do not wait are used. For Hopper's: that the matrix unit, TMA and the
register hand-over are used, that products are issued in groups, and that nothing is called between the first product
and the last. Ends with a table, and exit code 1 if anything failed.
"""

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
# What each source is compiled for. A kernel is Hopper's if its name says sm90, Ampere's if it says sm80.
SOURCES = {
    "tests/cuda/verbs_compile.cu": ("80", "90a", "100"),
    "csrc/runtime/moe_cuda_exact.cu": ("80", "90a", "100"),
    "csrc/runtime/moe_cuda_sm80.cu": ("80", "90a", "100"),
    "csrc/runtime/moe_cuda_sm90.cu": ("90a",),
}
COUNTED = ("HMMA", "LDGSTS", "LDSM", "HGMMA", "UTMALDG", "USETMAXREG")
# setmaxnreg ignored; wgmma serialised because of a call; wgmma serialised for another reason.
FATAL_NOTES = ("C7504", "C7509", "C7510")


@dataclass
class Kernel:
    name: str
    registers: int = 0
    spills: int = 0
    stack: int = 0
    sass: list[str] = field(default_factory=list)

    def count(self, opcode: str) -> int:
        return sum(opcode in line for line in self.sass)

    def problems(self) -> list[str]:
        found = [f"{self.spills} bytes spilled"] if self.spills else []
        if "sm80" in self.name.lower():
            found += [f"no {opcode}" for opcode in ("HMMA", "LDGSTS", "LDSM") if not self.count(opcode)]
        if "sm90" not in self.name.lower():
            return found
        # Three warpgroups start with 168 registers a thread, and move them; fewer have enough as they are.
        wanted = ("HGMMA", "UTMALDG") + (("USETMAXREG",) if self.registers >= 168 else ())
        found += [f"no {opcode}" for opcode in wanted if not self.count(opcode)]
        products = [place for place, line in enumerate(self.sass) if "HGMMA" in line]
        if products:
            between = self.sass[products[0] : products[-1]]
            if any(re.search(r"\bCALL\b", line) for line in between):
                found.append("a CALL among the products")
            if self.count("WARPGROUP.ARRIVE") * 2 > len(products):
                found.append(f"{self.count('WARPGROUP.ARRIVE')} groups for {len(products)} products: serialised")
        return found


def toolkit() -> Path:
    """The folder of the CUDA compiler in this environment."""
    found = Path(sysconfig.get_path("purelib")) / "nvidia" / "cu13"
    if not (found / "bin" / "nvcc").exists():
        sys.exit(f"no CUDA compiler in {found}: pip install -r requirements-cuda.txt")
    return found


def compile_for(source: str, arch: str, folder: Path) -> tuple[list[Kernel], list[str], float]:
    """Kernels of the source as compiled for sm_<arch>, problems of the compilation, and its seconds."""
    cuda, cubin = toolkit(), folder / f"{Path(source).stem}.{arch}.cubin"
    environment = os.environ | {"PATH": f"{cuda / 'bin'}:{os.environ['PATH']}"}
    command = [cuda / "bin" / "nvcc", "-std=c++20", "-O3", "-DNDEBUG", "-I", ROOT / "csrc", "-Xptxas", "-v", "-cubin",
               "-gencode", f"arch=compute_{arch},code=sm_{arch}", "-o", cubin, ROOT / source]  # fmt: skip
    start = time.monotonic()
    built = subprocess.run(command, capture_output=True, text=True, env=environment)
    seconds, notes = time.monotonic() - start, built.stdout + built.stderr
    if built.returncode:
        return [], [f"does not compile:\n{notes}"], seconds
    problems = [line for line in notes.splitlines() if "warning" in line or any(note in line for note in FATAL_NOTES)]
    dump = subprocess.run([cuda / "bin" / "cuobjdump", "-sass", cubin], capture_output=True, text=True, env=environment)
    if dump.returncode:
        return [], [*problems, f"cuobjdump: {dump.stderr}"], seconds
    kernels = read_ptxas(notes)
    read_sass(dump.stdout, kernels)
    if not kernels:
        problems.append("has no kernels")
    return list(kernels.values()), problems, seconds


def read_ptxas(notes: str) -> dict[str, Kernel]:
    kernels, name = {}, ""
    for line in notes.splitlines():
        if match := re.search(r"Compiling entry function '(\w+)'", line):
            name = match[1]
            kernels[name] = Kernel(name)
        elif match := re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", line):
            if name:
                kernels[name].stack, kernels[name].spills = int(match[1]), int(match[2]) + int(match[3])
        elif (match := re.search(r"Used (\d+) registers", line)) and name:
            kernels[name].registers = int(match[1])
            name = ""
    return kernels


def read_sass(dump: str, kernels: dict[str, Kernel]) -> None:
    kernel = None
    for line in dump.splitlines():
        if match := re.search(r"Function : (\w+)", line):
            kernel = kernels.get(match[1])
        elif kernel and re.match(r"\s+/\*[0-9a-f]{4,}\*/\s+\S", line):
            kernel.sass.append(line)


def readable(name: str) -> str:
    """Without its namespaces and arguments, where binutils is there to tell them."""
    if shutil.which("c++filt") is None:
        return name
    text = subprocess.run(["c++filt", name], capture_output=True, text=True).stdout.strip()
    text = re.sub(r"\(anonymous namespace\)|flashmoe::|gpu::|^void ", "", text).lstrip(":")
    return re.sub(r"\((DType)\)(\d)", r"\1 \2", text).split("(")[0]


def main() -> int:
    chosen = sys.argv[1:] or list(SOURCES)
    jobs = [(source, arch) for source in chosen for arch in SOURCES[source]]
    failed = False
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(os.cpu_count()) as pool:
        results = pool.map(lambda job: compile_for(*job, Path(folder)), jobs)
        for (source, arch), (kernels, problems, seconds) in zip(jobs, results, strict=True):
            print(f"{source}  sm_{arch}  {seconds:.1f} s")
            for problem in problems:
                print(f"  FAILED: {problem}")
            failed = failed or bool(problems)
            for kernel in kernels:
                found = kernel.problems()
                failed = failed or bool(found)
                opcodes = ", ".join(f"{kernel.count(o)} {o}" for o in COUNTED if kernel.count(o))
                print(f"  {kernel.registers:3d} registers, {kernel.spills} spilled  {readable(kernel.name)}  {opcodes}")
                for problem in found:
                    print(f"    FAILED: {problem}")
    print("FAILED" if failed else f"OK: {len(jobs)} compilations")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
