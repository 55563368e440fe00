"""How many pairs a worker merges in one forward pass. No torch: bytes come in as numbers.

On a GPU, k pairs side by side fill it better than one, up to what its memory takes. Each pair's result is the same as
alone but for roundings: floating-point sums are split up differently for k rows than for one. On a CPU there is
nothing to gain, so there k is 1, and results are bit-identical whatever a worker did before.
"""

MOST = 16  # beyond this, nothing is gained
SAFE = 0.8  # of the memory that is free: allocators fragment
REGROW = 8  # merges that fit before one more pair is tried again


class SideBySide:
    """`size` pairs at a time. `fixed`: always as many, 0 to learn it from what merges need (on a GPU)."""

    def __init__(self, fixed: int, on_gpu: bool) -> None:
        self.most = fixed or (MOST if on_gpu else 1)
        self.size = fixed or 1
        self._ceiling = self.most
        self._fitted = 0

    def fitted(self, n: int, needed_bytes: int, free_bytes: int) -> None:
        """`n` pairs were merged, which took `needed_bytes` at most while `free_bytes` would have been there."""
        if n < self.size:
            return
        self._fitted += 1
        if self._fitted >= REGROW and self._ceiling < self.most:
            self._ceiling, self._fitted = self._ceiling + 1, 0
        room = int(SAFE * free_bytes * n / needed_bytes) if needed_bytes > 0 else self.most
        self.size = max(1, min(self._ceiling, room))

    def too_many(self, n: int) -> None:
        """Memory did not suffice for `n` pairs."""
        self._ceiling = self.size = max(1, n // 2)
        self._fitted = 0
