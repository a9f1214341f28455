"""The prefix cache and the host's memory."""

from jaxllm.simulation.bug import HASHES, HOST, POOL, SCHEDULER, TABLES, Bug

BUGS_OF_SHARING = (
    # The prefix cache
    Bug("a block's hash is its own tokens'", HASHES, "blake2b(chain[-1] + block", "blake2b(block"),
    Bug(
        "salts are no part of a hash",
        TABLES,
        "attention, tenant, asked.cache_salt)",
        "attention, tenant)",
    ),
    Bug(
        "tenants share",
        TABLES,
        '"" if self._for_all else asked.tenant',
        '""',
    ),
    Bug(
        "a copy is said to reach one token further",
        TABLES,
        "            num_computed += num_common\n",
        "            num_computed = min(num_computed + num_common + 1, request.num_tokens - 1)\n",
    ),
    Bug(
        "differing tokens count as the same",
        HASHES,
        "return int(differ[0]) if differ.size else length",
        "return length",
    ),
    Bug(
        "the newest token is shared",
        TABLES,
        "most = (request.num_tokens - 1) // self.block_size",
        "most = request.num_tokens // self.block_size",
    ),
    Bug(
        "a copy takes in the newest token",
        TABLES,
        "end = min(num_shared + self.block_size, request.num_tokens - 1)",
        "end = min(num_shared + self.block_size, request.num_tokens)",
    ),
    Bug(
        "more is noted than was computed",
        SCHEDULER,
        "self.kv_cache.note_computed(request, end, in_this_step=True, pauses=pauses)",
        "self.kv_cache.note_computed(request, end + 3, in_this_step=True, pauses=pauses)",
    ),
    Bug(
        "what is not written yet is copied",
        TABLES,
        "(0, 0) if source in self._fresh else (source, num_common)",
        "(source, num_common)",
    ),
    Bug(
        "blocks that make way are still found",
        TABLES,
        "        self._discard(ids or ())\n",
        "",
    ),
    Bug(
        "nothing is kept",
        TABLES,
        "        self.pool.keep(block_id)\n",
        "",
    ),
    Bug(
        "what nobody finds any more is kept",
        TABLES,
        "            self.pool.forget(forgotten)\n",
        "            pass\n",
        answers=False,
        scenario="branches",
    ),
    Bug(
        "a full block is forgotten with its continuations",
        HASHES,
        "        if self._blocks[oldest].hash is not None:\n            return None\n",
        "",
        scenario="branches",
    ),
    Bug(
        "what a failed request computed is shared",
        SCHEDULER,
        "            self.kv_cache.forget_contents(request)\n",
        "            self.kv_cache.note_computed(request, 0, pauses=False)\n",
        scenario="nan-rows",
    ),
    Bug(
        "contents outlive a reset",
        TABLES,
        "        self._discard(self.prefix.block_ids())\n",
        "",
        scenario="faults",
    ),
    Bug(
        "moves are told again",
        TABLES,
        "moves, self._moves = self._moves, BlockMoves()",
        "moves = self._moves",
    ),
    Bug(
        "who shares a free block does not own it",
        POOL,
        "            del self._evictable[block_id]\n        self._owners[block_id] += 1\n",
        "            return\n        self._owners[block_id] += 1\n",
    ),
    Bug(
        "one owner's end frees a shared block",
        POOL,
        "            self._owners[block_id] -= 1\n            if",
        "            self._owners[block_id] = 0\n            if",
    ),
    Bug(
        "what is taken from the free is forgotten to count",
        TABLES,
        "num_fresh > self.pool.num_free - num_taken",
        "num_fresh > self.pool.num_free",
    ),
    Bug(
        "prompt_logprobs are skipped with what is cached",
        TABLES,
        "self.caching and not request.owes_prompt_logprobs",
        "self.caching",
    ),
    Bug(
        "rows start where nothing is cached",
        SCHEDULER,
        "self.rows.join(request, start.num_computed)",
        "self.rows.join(request, 0)",
        answers=False,
    ),
    # The host's memory
    Bug("a slot that is read is given out", HOST, "        self._read.add(block_hash)\n", ""),
    Bug("slots outlive a reset", HOST, "        self._slots.clear()\n", "", scenario="faults"),
    Bug("one slot for all", HOST, "self._free.popleft()", "self._free[0]"),
    Bug(
        "a load goes into the next block",
        TABLES,
        "self._load(request, slot, index, blocks[index])",
        "self._load(request, slot, index, blocks[min(index + 1, len(blocks) - 1)])",
    ),
    Bug("loads are forgotten", TABLES, "        self._moves.loads.append((slot, block_id))\n", ""),
    Bug(
        "saves are forgotten",
        TABLES,
        "                    self._moves.saves.append((block_id, slot))\n",
        "",
    ),
    Bug(
        "slots are found in another order",
        TABLES,
        "self.host.get(request.chain[index + 1])",
        "self.host.get(request.chain[max(loaded[0], index - 1) + 1])",
    ),
    Bug(
        "saves come after loads",
        SCHEDULER,
        "block_saves=tuple(moves.saves)",
        "block_saves=tuple((b, s) for b, s in moves.saves if (s, b) not in moves.loads "
        "and b not in {to for _, to in (*moves.copies, *moves.loads)})",
    ),
)
