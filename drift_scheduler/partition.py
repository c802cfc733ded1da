"""How the device is divided between the two workers.

A share is counted in SMs on a GPU and in cores on a CPU; the scheduler only compares shares.
"""

from __future__ import annotations

from dataclasses import dataclass


class PartitionError(ValueError):
    """The device cannot be divided as asked."""


@dataclass(frozen=True, slots=True)
class Partition:
    """One way to divide the device. Counts are what the device granted, not what was asked.

    With `exclusive` both counts are the whole device's, and only one phase is launched on it.
    Around a change of partition, work launched before it may still run beside work behind it.
    """

    index: int
    prefill_sms: int
    decode_sms: int
    exclusive: bool = False

    def __str__(self) -> str:
        return "whole" if self.exclusive else f"p{self.prefill_sms}/d{self.decode_sms}"


@dataclass(frozen=True, slots=True)
class PartitionTable:
    """All partitions of a device: index 0 is the whole device, then splits by decode share.

    `splits` may be empty: then the phases take turns on the whole device.
    """

    total_sms: int
    splits: tuple[Partition, ...] = ()

    def __post_init__(self) -> None:
        for position, split in enumerate(self.splits):
            if split.index != position + 1:
                raise PartitionError(f"split {split} has index {split.index}, not {position + 1}")
            if split.exclusive or min(split.prefill_sms, split.decode_sms) < 1:
                raise PartitionError(f"split {split} leaves a phase without SMs")
            if split.prefill_sms + split.decode_sms > self.total_sms:
                raise PartitionError(f"split {split} exceeds the device's {self.total_sms} SMs")
        shares = [split.decode_sms for split in self.splits]
        if shares != sorted(set(shares)):
            raise PartitionError(f"decode shares {shares} are not strictly increasing")

    @property
    def whole(self) -> Partition:
        return Partition(0, self.total_sms, self.total_sms, exclusive=True)

    def __getitem__(self, index: int) -> Partition:
        return self.whole if index == 0 else self.splits[index - 1]

    def __len__(self) -> int:
        return 1 + len(self.splits)


def even_decode_shares(total_sms: int, splits: int, *, minimum: int, step: int) -> list[int]:
    """Decode shares of up to `splits` partitions, evenly spaced, each a multiple of `step`.

    Both sides keep at least `minimum` SMs. Fewer shares come back where the device has no room
    for more. Raises PartitionError when not even one split fits.
    """
    largest = (total_sms - minimum) // step * step
    smallest = -(-minimum // step) * step
    if largest < smallest:
        raise PartitionError(
            f"{total_sms} SMs cannot be divided in two parts of at least {minimum}"
        )
    stride = max(step, total_sms // (splits + 2) // step * step)
    shares = [stride * (i + 1) for i in range(splits)]
    return sorted({min(max(share, smallest), largest) for share in shares})
