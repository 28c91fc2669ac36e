"""Loops over stored weights on a CPU that read each number once and keep all that is between in its first cache.

`merging.kernels.cpu` asks for them by name, through `machine`; the other modules need numba, and are imported only where
a loop has never been compiled on this machine. Rows are told by the address of their first entry and their kind, so that
one compiled loop serves any number of members and any mixture of dtypes. What a loop gives for an entry depends neither on
where it starts nor on where it stops.
"""

FLOAT32, BFLOAT16, FLOAT16 = 0, 1, 2
"""Kinds of rows: float32, bfloat16, float16."""
GROUP = 4
"""Rows that are read side by side, for which a processor's prefetching is made, and added up in one go."""
BLOCK = 3
"""Rows whose inner products with as many others are added up in registers: nine sums, of sixteen that there are."""
TILE = 512
"""Entries at a time: what the largest loop works on takes 27 KiB, and a first cache has 32."""
STRIDE = TILE + 48
"""From row to row of the working memory: no power of two, for which caches have few places."""
