"""Prove from the CUDA half as it ships what no test without a GPU can see.

    python tools/check_cuda.py               builds the extension for every architecture, and checks all of it
    python tools/check_cuda.py SOURCE ...    compiles and checks these sources alone: quicker, while working on one

Needs the packages of requirements-cuda.txt. For every kernel: no spills, no stack, and none of ptxas' notes that it
gave up registers or pipelining; and that a call's kernel reads nothing through the cache that does not see what others
write. For Ampere's: that the matrix unit, its loads and the copies that do not wait are used. For Hopper's: that the
matrix unit, TMA and the register hand-over are used, that products are issued in groups, and that nothing is called
between the first product and the last. Of the extension: that without a driver it can be imported, computes on the CPU,
finds NVSHMEM, and says clearly what it cannot do. Ends with a table, and exit code 1 if anything failed.
"""

import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
ARCHITECTURES = ("80", "90a", "100")
# Sources for one architecture: no other can compile all of them. A kernel is Hopper's if its name says sm90, Ampere's
# if it says sm80.
ALONE = {"csrc/runtime/moe_cuda_sm90.cu": ("90a",), "csrc/runtime/moe_cuda_sm90_nvshmem.cu": ("90a",),
         "tests/cuda/engine_alone.cu": ("90a",)}  # fmt: skip
VERBS, ENGINES = "tests/cuda/verbs_compile.cu", "tests/cuda/engine_alone.cu"  # not part of the extension
COUNTED = ("HMMA", "LDGSTS", "LDSM", "HGMMA", "UTMALDG", "USETMAXREG")
# setmaxnreg ignored, for one reason or another; wgmma serialised because of a call; wgmma serialised for another reason.
FATAL_NOTES = ("C7504", "C7507", "C7509", "C7510", "C7515")
# What the extension must do where there is no driver, in a process that sees no GPU.
WITHOUT_A_DRIVER = """
import torch, flashmoe
from flashmoe import _C
assert flashmoe.build_info()["features"]["cuda"], "built without CUDA"
assert _C.num_cuda_devices() == 0
try:
    _C.CudaTeam(0)
except RuntimeError as error:
    assert "driver" in str(error) or "CUDA-capable device" in str(error), error
    print("  CudaTeam says:", error)
else:
    raise AssertionError("a team without a GPU")
torch.manual_seed(0)
x, gate_up, down = torch.randn(5, 16), torch.randn(4, 48, 16) / 4, torch.randn(4, 16, 24) / 5
ids, weights = torch.randint(0, 4, (5, 2)), torch.rand(5, 2)
y = flashmoe.fused_moe(x, ids, weights, gate_up, down)
right = flashmoe.moe_reference(x, ids, weights, gate_up, down, compute_dtype=torch.float64)
torch.testing.assert_close(y, right.float())
flashmoe.check()
print("  fused_moe computes on the CPU")
assert flashmoe.build_info()["features"]["nvshmem"], "built without NVSHMEM's headers"
from flashmoe import nvshmem
found = nvshmem.library()
assert found["found"] == ("mapped in this process before" if torch.version.cuda else "a package"), found
world = nvshmem.world()
unique_id = world.unique_id()
assert len(unique_id) == 128 and any(unique_id)
for _ in range(2):
    try:
        world.initialize(unique_id, 0, 1, 0)
    except RuntimeError as error:
        said = str(error)
        assert "no CUDA driver" in said, said
    else:
        raise AssertionError("a PE without a GPU")
print(f"  NVSHMEM {found['version']} makes a unique id; to initialise it says: {said}")
"""


@dataclass
class Kernel:
    name: str
    arch: str
    registers: int = 0
    spills: int = 0
    stack: int = 0
    sass: list[str] = field(default_factory=list)

    def count(self, opcode: str) -> int:
        return sum(opcode in line for line in self.sass)

    def problems(self) -> list[str]:
        found = [f"{self.spills} bytes spilled"] if self.spills else []
        if self.stack:
            found.append(f"{self.stack} bytes of stack")
        if not self.sass:
            found.append("no machine code")
        # What the call's kernel reads others write meanwhile; NVSHMEM's own constants do not change.
        if "moe_kernel" in self.name and "Nvshmem" not in self.name:
            cached = sum("LDG" in line and ".CONSTANT" in line for line in self.sass)
            found += [f"{cached} loads through the read-only cache"] if cached else []
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


Kernels = dict[tuple[str, str], Kernel]  # by name and architecture


def toolkit() -> Path:
    """The folder of the CUDA compiler in this environment."""
    for folder in sys.path:
        found = Path(folder) / "nvidia" / "cu13"
        if (found / "bin" / "nvcc").exists():
            return found
    sys.exit("no CUDA compiler in this environment: pip install -r requirements-cuda.txt")


def nvshmem_flags(source: str) -> list:
    """What a source needs whose kernels call NVSHMEM."""
    if not source.endswith("_nvshmem.cu"):
        return []
    headers = toolkit().parent / "nvshmem" / "include"
    headers = Path(os.environ.get("FLASHMOE_NVSHMEM_DEVICE_INCLUDE", headers))
    return ["-isystem", headers, "-DNVSHMEM_ENABLE_ALL_DEVICE_INLINING"]


def environment() -> dict[str, str]:
    # The packages keep their libraries in lib, where the compiler looks in lib64.
    cuda = toolkit()
    path, libraries = os.environ["PATH"], os.environ.get("LIBRARY_PATH")
    return os.environ | {
        "PATH": f"{cuda / 'bin'}:{path}", "LIBRARY_PATH": f"{cuda / 'lib'}" + (f":{libraries}" if libraries else ""),
    }  # fmt: skip


def compile_for(source: str, arch: str, folder: Path) -> tuple[Kernels, list[str], float]:
    """Kernels of the source as compiled for sm_<arch>, problems of the compilation, and its seconds."""
    cubin = folder / f"{Path(source).stem}.{arch}.cubin"
    command = [toolkit() / "bin" / "nvcc", "-std=c++20", "-O3", "-DNDEBUG", "-I", ROOT / "csrc", "-Xptxas", "-v", "-cubin",
               "-gencode", f"arch=compute_{arch},code=sm_{arch}", *nvshmem_flags(source), "-o", cubin, ROOT / source]  # fmt: skip
    start = time.monotonic()
    built = subprocess.run(command, capture_output=True, text=True, env=environment())
    seconds, notes = time.monotonic() - start, built.stdout + built.stderr
    if built.returncode:
        return {}, [f"does not compile:\n{notes}"], seconds
    return *check_code(notes, cubin), seconds


def build_extension() -> tuple[Kernels, list[str], float, Path | None]:
    """Kernels of flashmoe._C as it ships, problems, seconds, and the library."""
    import cmake
    import ninja
    import pybind11

    folder, cuda = ROOT / "build" / "check-cuda", toolkit()
    program = Path(cmake.CMAKE_BIN_DIR) / "cmake"
    # Only what is compiled now leaves notes.
    for objects in (folder / "CMakeFiles").glob("flashmoe_cuda*.dir"):
        shutil.rmtree(objects)
    commands = [
        [program, "-S", ROOT, "-B", folder, "-G", "Ninja", "--log-level=WARNING", "-DFLASHMOE_CUDA=ON",
         "-DCMAKE_CUDA_FLAGS=-Xptxas -v", f"-DCMAKE_CUDA_COMPILER={cuda / 'bin' / 'nvcc'}",
         f"-DCUDA_CUDART={next((cuda / 'lib').glob('libcudart.so*'))}", f"-DPython_EXECUTABLE={sys.executable}",
         f"-DCMAKE_MAKE_PROGRAM={Path(ninja.BIN_DIR) / 'ninja'}", f"-Dpybind11_DIR={pybind11.get_cmake_dir()}"],
        [program, "--build", folder, "--target", "_C"],
    ]  # fmt: skip
    start, notes = time.monotonic(), ""
    for command in commands:
        built = subprocess.run(command, capture_output=True, text=True, env=environment())
        notes += built.stdout + built.stderr
        if built.returncode:
            return {}, [f"does not build:\n{notes[-4000:]}"], time.monotonic() - start, None
    library = next(folder.glob("_C.*.so"))
    kernels, problems = check_code(notes, library)
    found = {kernel.arch for kernel in kernels.values()}
    problems += [f"has no kernels for sm_{arch}" for arch in ARCHITECTURES if f"sm_{arch}" not in found]
    return kernels, problems, time.monotonic() - start, library


def check_code(notes: str, binary: Path) -> tuple[Kernels, list[str]]:
    warning = re.compile("warning #|(?:ptxas|nvcc) warning|" + "|".join(FATAL_NOTES))
    problems = [line for line in notes.splitlines() if warning.search(line)]
    kernels = read_ptxas(notes)

    def disassemble(arch: str) -> subprocess.CompletedProcess:
        command = [toolkit() / "bin" / "cuobjdump", "-sass", "-arch", arch, binary]
        return subprocess.run(command, capture_output=True, text=True, env=environment())

    # One disassembler works for half a minute on all of them.
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for dump in pool.map(disassemble, {arch: None for _, arch in kernels}):
            if dump.returncode:
                return {}, [*problems, f"cuobjdump: {dump.stderr}"]
            read_sass(dump.stdout, kernels)
    return kernels, problems if kernels else [*problems, "has no kernels"]


def read_ptxas(notes: str) -> Kernels:
    kernels, kernel = {}, None
    for line in notes.splitlines():
        if match := re.search(r"Compiling entry function '(\w+)' for '(\w+)'", line):
            kernel = kernels[match[1], match[2]] = Kernel(match[1], match[2])
        elif match := re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", line):
            # The kernel's own, and then those of each function that it calls.
            if kernel:
                kernel.stack += int(match[1])
                kernel.spills += int(match[2]) + int(match[3])
        elif (match := re.search(r"Used (\d+) registers", line)) and kernel:
            kernel.registers = int(match[1])
    return kernels


def read_sass(dump: str, kernels: Kernels) -> None:
    kernel, arch = None, ""
    for line in dump.splitlines():
        if match := re.search(r"code for (sm_\w+)", line):
            arch = match[1]
        elif match := re.search(r"Function : (\w+)", line):
            kernel = kernels.get((match[1], arch))
        elif kernel and re.match(r"\s+/\*[0-9a-f]{4,}\*/\s+\S", line):
            kernel.sass.append(line)


def readable(name: str) -> str:
    """Without its namespaces and arguments, where binutils is there to tell them."""
    if shutil.which("c++filt") is None:
        return name
    text = subprocess.run(["c++filt", name], capture_output=True, text=True).stdout.strip()
    text = re.sub(r"\(anonymous namespace\)|flashmoe::|gpu::|^void ", "", text).lstrip(":")
    return re.sub(r"\((DType)\)(\d)", r"\1 \2", text).split("(")[0]


def report(title: str, kernels: Kernels, problems: list[str], seconds: float) -> bool:
    """Prints what was found; whether all of it is well."""
    print(f"{title}  {seconds:.1f} s")
    for problem in problems:
        print(f"  FAILED: {problem}")
    well = not problems
    for kernel in sorted(kernels.values(), key=lambda kernel: (kernel.arch, kernel.name)):
        found = kernel.problems()
        well = well and not found
        opcodes = ", ".join(f"{kernel.count(o)} {o}" for o in COUNTED if kernel.count(o))
        memory = f"{kernel.registers:3d} registers, {kernel.spills} bytes spilled, {kernel.stack} of stack"
        print(f"  {kernel.arch:6s} {memory}  {readable(kernel.name)}  {opcodes}")
        for problem in found:
            print(f"    FAILED: {problem}")
    sys.stdout.flush()
    return well


def try_without_driver(library: Path, folder: Path) -> bool:
    """The package with this library, in a process that sees no GPU."""
    shutil.copytree(ROOT / "flashmoe", folder / "flashmoe", ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    shutil.copy2(library, folder / "flashmoe")
    hidden = os.environ | {"CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(folder)}
    ran = subprocess.run([sys.executable, "-c", WITHOUT_A_DRIVER], env=hidden, cwd=folder, capture_output=True, text=True)
    print(f"without a driver\n{ran.stdout}{ran.stderr if ran.returncode else ''}", end="")
    return ran.returncode == 0


def main() -> int:
    chosen = sys.argv[1:]
    jobs = [(source, arch) for source in chosen or [VERBS, ENGINES] for arch in ALONE.get(source, ARCHITECTURES)]
    well = True
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(os.cpu_count()) as pool:
        results = pool.map(lambda job: compile_for(*job, Path(folder)), jobs)
        for (source, _), result in zip(jobs, results, strict=True):
            well &= report(source, *result)
        if not chosen:
            *result, library = build_extension()
            well &= report("flashmoe._C", *result)
            well &= library is not None and try_without_driver(library, Path(folder))
    print("OK" if well else "FAILED")
    return int(not well)


if __name__ == "__main__":
    sys.exit(main())
