"""Further caches, for tests of the protocol: none of them is known to any forward."""

from __future__ import annotations

import torch
from torch import Tensor

from cordee.model.cache import Cache, CacheStep, Core, KVCache, kept_shape
from cordee.model.config import ModelConfig

PAGE = 4


class PagedCache(Cache):
    """Rows are lists of pages of four places, in one pool for all rows. Rows that were one share their full pages."""

    def __init__(self, config: ModelConfig, batch_size: int, max_length: int, num_pages: int = 64):
        super().__init__(batch_size, max_length)
        self.free = list(range(num_pages))
        self.used_by = [0] * num_pages  # rows
        self.tables: list[list[int]] = [[] for _ in range(batch_size)]
        shapes = [kept_shape(layer.attention) for layer in config.layers]
        # What was never written must never count: not a number.
        self.pools = [torch.full((num_pages, heads, slots, PAGE, dim), float("nan")) for heads, slots, dim in shapes]

    def extend(self, num_tokens: int, real: Tensor | None, device: torch.device) -> CacheStep:
        step = super().extend(num_tokens, real, device)
        for row, table in enumerate(self.tables):
            if step.counts[row] and table and step.lengths[row] % PAGE:
                table[-1] = self._own(table[-1])
            while len(table) * PAGE < self.lengths[row]:
                table.append(self._take())
        return step

    def append(self, layer: int, kv: Tensor, step: CacheStep) -> None:
        rows, columns, places = step.kept
        pages = self._table()[rows, places // PAGE]
        self.pools[layer][pages, :, :, places % PAGE] = kv[rows, :, :, columns]

    def attend(self, layer: int, q: Tensor, kv: Tensor, step: CacheStep, core: Core) -> Tensor:
        self.append(layer, kv, step)
        held = self._read(self.pools[layer], step).unbind(2)
        return core(q, held[0], held[-1], step.mask)

    def keep(self, rows: Tensor) -> None:
        super().keep(rows)
        kept = [list(self.tables[row]) for row in rows.tolist()]
        for table in kept:
            for page in table:
                self.used_by[page] += 1
        for table in self.tables:
            self._give_back(table)
        self.tables = kept

    def join(self, other: PagedCache) -> None:
        """`other` is a cache of the same pool (see `fresh_rows`)."""
        super().join(other)
        self.tables += other.tables

    def fresh_rows(self, count: int) -> PagedCache:
        """New rows of the same pool, to be filled on their own and joined."""
        rows = object.__new__(PagedCache)
        rows.__dict__.update(self.__dict__)
        rows.lengths, rows.notes, rows.tables = [0] * count, {}, [[] for _ in range(count)]
        return rows

    def clear(self) -> None:
        super().clear()
        for table in self.tables:
            self._give_back(table)
            table.clear()

    def _table(self) -> Tensor:
        longest = max(map(len, self.tables))
        return torch.tensor([table + [0] * (longest - len(table)) for table in self.tables])

    def _read(self, pool: Tensor, step: CacheStep) -> Tensor:
        x = (
            pool[self._table()].movedim(1, 3).flatten(3, 4)[:, :, :, : step.filled]
        )  # [batch, heads, slots, filled, dim]
        lengths = torch.tensor(self.lengths)[:, None, None, None, None]
        return x.masked_fill(torch.arange(step.filled)[:, None] >= lengths, 0.0)  # a core may weigh by zero, not skip

    def _take(self) -> int:
        page = self.free.pop()
        self.used_by[page] = 1
        return page

    def _own(self, page: int) -> int:
        """A page that may be written: a copy where other rows use it too."""
        if self.used_by[page] == 1:
            return page
        copy = self._take()
        self.used_by[page] -= 1
        for pool in self.pools:
            pool[copy] = pool[page]
        return copy

    def _give_back(self, table: list[int]) -> None:
        for page in table:
            self.used_by[page] -= 1
            if not self.used_by[page]:
                self.free.append(page)
                for pool in self.pools:
                    pool[page] = float("nan")


class WindowCache(KVCache):
    """Layers with a window keep no more places of a row than the window shows: place p is in slot p mod window."""

    def __init__(self, config: ModelConfig, batch_size: int, max_length: int):
        super().__init__(config, batch_size, max_length)
        self.windows = [getattr(layer.attention, "window", None) for layer in config.layers]
        for layer, window in enumerate(self.windows):
            if window is not None:
                self.buffers[layer] = self.buffers[layer][:, :, :, :window].clone()

    def append(self, layer: int, kv: Tensor, step: CacheStep) -> None:
        window = self.windows[layer]
        if window is None:
            super().append(layer, kv, step)
            return
        rows, columns, places = step.kept
        last = (
            places.expand(torch.broadcast_shapes(rows.shape, places.shape)) >= torch.tensor(self.lengths)[rows] - window
        )
        rows, columns, slots = (x.expand_as(last)[last] for x in (rows, columns, places % window))
        self.buffers[layer][rows, :, :, slots] = kv[rows, :, :, columns]

    def attend(self, layer: int, q: Tensor, kv: Tensor, step: CacheStep, core: Core) -> Tensor:
        window = self.windows[layer]
        if window is None:
            return super().attend(layer, q, kv, step, core)
        lengths = torch.tensor(step.lengths)[:, None]
        slots = torch.arange(self.buffers[layer].shape[3])
        held = lengths - 1 - (lengths - 1 - slots) % window  # the last place before this step that a slot had
        hidden = self.max_length  # a place that no query reaches
        new = step.indices.expand(len(q), -1)
        if step.real is not None:
            new = new.masked_fill(~step.real, hidden)
        places = torch.cat((held.masked_fill(held < 0, hidden), new), 1)
        y = core(q, *torch.cat((self.buffers[layer], kv), 3).unbind(2), step.mask_over(places))
        self.append(layer, kv, step)
        return y
