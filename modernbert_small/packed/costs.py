"""What a phase costs on some machines: time, memory and disk, from what it counts and from measured rates."""

from dataclasses import dataclass

from modernbert_small.packed.machine import Machine

# Fitted to phases 3 and 5 in docs/LOG.md, in bf16 and in float32, to within 5 %: a process without a model.
PROCESS_BYTES = 1_300_000_000
GRADIENT_BYTES = 4  # of a trained parameter, in float32
STEP_SECONDS = 0.002  # what the Trainer does once a step on one CPU core, at least (docs/LOG.md)
# Assumed: bytes a second at which GPUs exchange gradients, within a machine and between machines (100 Gbit/s).
WITHIN_MACHINE, BETWEEN_MACHINES = 100e9, 12.5e9


@dataclass(frozen=True)
class PhaseCost:
    """What a phase runs.

    Attributes:
        phase: the script's name.
        model: which models it loads.
        parameters: of these models together.
        bytes_per_parameter: of weights and, where they are trained, gradients and optimiser.
        flops: of the whole phase; 0 where they are not counted.
        seconds: of work on the CPU that is not dealt: one process does it, or every process does all of it.
        activations: values that a batch keeps in memory; where there are steps, the batch of a whole step.
        disk: bytes that the phase writes and keeps.
        dealt_seconds: of work on the CPU that the processes share, as long as one process takes for it.
        steps: of the optimiser; after each one the processes exchange gradients. 0 where nothing is trained.
        most_processes: that can share the work; 0 if any number can.
        held: bytes that each process keeps for the rows of the corpus.
    """

    phase: str
    model: str
    parameters: int
    bytes_per_parameter: int
    flops: float
    seconds: float = 0.0
    activations: float = 0.0
    disk: float = 0.0
    dealt_seconds: float = 0.0
    steps: float = 0.0
    most_processes: int = 0
    held: float = 0.0

    @property
    def bytes(self) -> int:
        """Memory of all parameters."""
        return self.parameters * self.bytes_per_parameter

    def processes(self, machine: Machine) -> int:
        """How many processes to use: as many as there are, or fewer if training is faster so.

        More processes compute a step faster, and exchange gradients over slower connections.
        """
        possible = self._at_most(machine.processes)
        if not self.steps:
            return possible
        return min(
            {1, self._at_most(machine.gpus), possible}, key=lambda count: (self._duration(machine, count), count)
        )

    def memory(self, machine: Machine) -> float:
        """Bytes of each process: of itself, all parameters, and a batch's activations."""
        shared = self.processes(machine) if self.steps else 1
        return PROCESS_BYTES + self.bytes + self.activations / shared * (2 if machine.bf16 else 4)

    def machine_memory(self, machine: Machine) -> float:
        """Bytes of RAM on one machine: its processes, without what lies in the memory of their GPUs."""
        each = PROCESS_BYTES if machine.has_gpu else self.memory(machine)
        return min(self.processes(machine), machine.gpus) * (each + self.held)

    def duration(self, machine: Machine) -> float:
        """Seconds, without evaluations, loading and downloads."""
        return self._duration(machine, self.processes(machine))

    def _at_most(self, count: int) -> int:
        return min(count, self.most_processes or count)

    def _duration(self, machine: Machine, count: int) -> float:
        """Seconds with so many processes."""
        on_cpu = self.seconds + self.dealt_seconds / count
        if not self.flops:
            return on_cpu
        on_device = self.flops / (machine.flops_per_second * machine.utilisation[self.phase] * count)
        if not self.steps:
            return max(on_cpu, on_device)  # the next texts are read and tokenised while the device computes
        step = on_device / self.steps + self._exchange_seconds(machine, count)
        return on_cpu + self.steps * max(step, STEP_SECONDS)

    def _exchange_seconds(self, machine: Machine, count: int) -> float:
        """Of one step. Each process sends and receives all gradients but its share, twice (ring all-reduce)."""
        rate = WITHIN_MACHINE if count <= machine.gpus else BETWEEN_MACHINES
        return 2 * GRADIENT_BYTES * self.parameters * (count - 1) / count / rate
