"""How long the pipes of an A100 are busy with a loop, and the share of its peak that this leaves.

Rates are GA100's, per sub-partition of a multiprocessor (four of them, one warp instruction a cycle
each): published arithmetic throughputs, not measurements. Not modelled: bank conflicts, caches,
DRAM, tails, clocks under power. A measured kernel is some way below these figures; they tell which
pipe is in its way, and two versions of a loop apart.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence

from tests.aot.compile import Instruction

# GA100: multiprocessors, boost clock, dense bf16 peak
N_SM, CLOCK, TENSOR_PEAK = 108, 1.41e9, 312e12
DRAM = 2039e9  # bytes/s, of the 80 GB version
# What a multiprocessor holds
REGISTERS, WARPS, BLOCKS, SHARED = 65536, 64, 32, 164 * 1024
RESERVED_SHARED = 1024  # bytes of each block, the system's

FMA = ("FFMA", "FADD", "FMUL", "IMAD")
CONVERSIONS = ("I2F", "F2I", "F2F", "MUFU")  # quarter rate, beside the special functions
CONTROL = ("BRA", "BAR", "BSSY", "BSYNC", "CALL", "DEPBAR", "EXIT", "LDGDEPBAR", "NOP", "WARPSYNC")
SHARED_ACCESS = ("LDSM", "LDS", "STS", "LDGSTS")
GLOBAL_ACCESS = ("LDG", "STG", "LDL", "STL")

# Cycles until a result that the assembler guards by a barrier is there; all else has fixed stalls.
LATENCY = {"LDSM": 30, "LDS": 25, "SHFL": 24, "MUFU": 20}
OTHER_LATENCY = 20
READ_LATENCY = 12  # until operands may be overwritten


def pipe(opcode: str) -> tuple[str, int]:
    """The pipe of an instruction and the cycles it is busy with one warp."""
    kind = opcode.split(".")[0]
    if kind == "HMMA":
        return "tensor", 4 if ".1688." in opcode else 8
    if kind in FMA:
        return "fma", 4 if ".WIDE" in opcode or ".HI" in opcode else 2
    if kind in CONVERSIONS:
        return "xu", 8
    if kind == "SHFL":
        return "shuffle", 4
    if kind in (*SHARED_ACCESS, *GLOBAL_ACCESS):
        # 128 bytes a cycle for the whole multiprocessor: its four sub-partitions take turns
        is_wide = kind == "LDSM" or ".128" in opcode
        return "L1", 16 if is_wide else 8 if ".64" in opcode else 4
    if kind in CONTROL:
        return "control", 1
    if kind.startswith(("U", "R2UR", "REDUX")):
        return "uniform", 2
    return "alu", 2


def busy(code: Iterable[Instruction]) -> Counter[str]:
    """Cycles by pipe, and ``issue``: one of every instruction."""
    cycles: Counter[str] = Counter()
    for line in code:
        name, n = pipe(line.opcode)
        cycles[name] += n
        cycles["issue"] += 1
    return cycles


def bound(code: Iterable[Instruction]) -> tuple[str, int]:
    """The pipe that is busy longest, and its cycles."""
    ((name, cycles),) = busy(code).most_common(1)
    return name, cycles


def mix(code: Iterable[Instruction]) -> Counter[str]:
    """Instructions by what they do."""
    names = {"fma": "fp32", "alu": "integer", "uniform": "integer", "L1": "shared"}
    found: Counter[str] = Counter()
    for line in code:
        name = pipe(line.opcode)[0]
        if line.kind == "IMAD":
            name = "integer"
        elif line.kind in ("FMNMX", "FSEL", "FSETP"):
            name = "fp32"
        elif line.kind in ("F2FP", "I2F", "F2I", "F2F", "PRMT"):
            name = "conversion"
        elif line.kind in GLOBAL_ACCESS or line.kind == "LDGSTS":
            name = "global"
        found[names.get(name, name)] += 1
    return found


def replay(loop: Sequence[Instruction], n_warps: int = 2, iterations: int = 8) -> float:
    """Cycles a warp and iteration take when ``n_warps`` of one sub-partition share its pipes.

    Every warp issues in order and waits as its control bits say: stalls of so many cycles, barriers
    that loads and special functions release. What comes from DRAM is taken to be there in time.
    """
    ready = [0] * n_warps  # when each warp may issue next
    at = [0] * n_warps  # its next instruction, counted through all iterations
    barriers = [[0] * 6 for _ in range(n_warps)]
    free: dict[str, int] = {}
    clock, finished = 0, []

    def earliest(warp: int) -> int:
        line = loop[at[warp] % len(loop)]
        waits = [t for b, t in enumerate(barriers[warp]) if line.control >> 11 >> b & 1]
        return max(clock, ready[warp], free.get(pipe(line.opcode)[0], 0), *waits)

    while len(finished) < n_warps * iterations:
        warp = min(range(n_warps), key=earliest)
        now = earliest(warp)
        line = loop[at[warp] % len(loop)]
        name, cycles = pipe(line.opcode)
        clock, free[name] = now + 1, now + cycles
        ready[warp] = now + max(1, line.control & 15)
        latency = LATENCY.get(line.kind, OTHER_LATENCY)
        for barrier, delay in (
            (line.control >> 5 & 7, latency),
            (line.control >> 8 & 7, READ_LATENCY),
        ):
            if barrier < 6:
                barriers[warp][barrier] = max(barriers[warp][barrier], now + delay)
        at[warp] += 1
        if at[warp] % len(loop) == 0:
            finished.append(now)
    first = len(finished) // 2  # the pipes are full by then
    return (finished[-1] - finished[first - 1]) / (len(finished) - first)


def occupancy(registers: int, shared: int, n_warps: int) -> int:
    """Warps that a multiprocessor holds, of 64; registers a thread, bytes and warps a block."""
    per_warp = -(-registers * 32 // 256) * 256
    by_registers = REGISTERS // per_warp // 4 * 4 // n_warps  # each sub-partition has its own
    by_shared = SHARED // (shared + RESERVED_SHARED)
    return min(BLOCKS, WARPS // n_warps, by_registers, by_shared) * n_warps
