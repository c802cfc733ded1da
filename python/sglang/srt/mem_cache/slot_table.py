"""RowPool: which lines of the request table are taken.

A request keeps its row from its first launch until the last launch that could read it is done.
"""

from __future__ import annotations

PADDING_ROW = 0


class RowPool:
    """Hands out rows 1..num_rows-1, the one freed last first.

    Row 0 belongs to the padding of decode batches: its slots are scratch.
    """

    def __init__(self, num_rows: int) -> None:
        if num_rows < 2:
            raise ValueError(f"num_rows={num_rows} leaves no row beside the padding row")
        self.total = num_rows - 1
        self._free = list(range(num_rows - 1, PADDING_ROW, -1))
        self._taken: set[int] = set()

    @property
    def available(self) -> int:
        return len(self._free)

    def alloc(self) -> int | None:
        """A row, or None when all are taken."""
        if not self._free:
            return None
        row = self._free.pop()
        self._taken.add(row)
        return row

    def free(self, row: int) -> None:
        assert row in self._taken, f"row {row} is freed but not taken; {len(self._taken)} are"
        self._taken.remove(row)
        self._free.append(row)

    def check(self, in_use: int) -> None:
        """Asserts that `in_use` rows are taken and every row is accounted for once."""
        assert len(self._taken) == in_use, f"{len(self._taken)} rows taken, {in_use} in use"
        rows = sorted((*self._free, *self._taken))
        assert rows == list(range(1, self.total + 1)), (
            f"{len(self._free)} free + {len(self._taken)} taken rows, the table has {self.total}"
        )
