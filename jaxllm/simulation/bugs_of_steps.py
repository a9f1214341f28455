"""Blocks, rows, decisions, results, recovery."""

from jaxllm.simulation.bug import (
    BUCKETS,
    COMMIT,
    LOGPROBS,
    LOOP,
    POOL,
    QUEUE,
    RECOVERY,
    REQUEST,
    ROWS,
    SCHEDULER,
    SHARES,
    STOP,
    TABLES,
    Bug,
)

FREE_BLOCKS = "        self.kv_cache.free(request)\n"
PARKED = """\
        parked = getattr(self, "parked", None)
        self.parked = request
        if parked is not None:
            self.kv_cache.free(parked)
"""
COLUMNS = "(self.num_computed, self.prefill_len, self.final_len, self.capacity)"
LEFT = "        self._left_rows.append(request.row)\n"
LIVE = "self.rows.tenancy[step.rows] == record.tenancies"
FORGET = "        self._queue_times.forget(output.request_id for output in ended)\n"
ISOLATE = "self._scheduler.isolate(self._suspects[-1].request_id if self._suspects else None)"
TO_FRONT = "insort(self._preempted, request, key=_arrival)"
POP_FREE = "self._blank.popleft() for _ in range(min(n, len(self._blank)))"
KNOWN_TOKENS = "(*self.core_request.prompt_token_ids, *self.output_token_ids)"

BUGS_OF_STEPS = (
    # Blocks
    Bug("the null block is handed out", POOL, "deque(range(1, num_", "deque(range(0, num_"),
    Bug(
        "allocated blocks stay free",
        POOL,
        POP_FREE,
        "self._blank[i] for i in range(min(n, len(self._blank)))",
    ),
    Bug(
        "one block more than there is",
        POOL,
        "n > self.num_free:",
        "n > self.num_free + 1:",
        answers=False,
    ),
    Bug(
        "a block is freed twice",
        POOL,
        "                self._blank.append(block_id)\n",
        "                self._blank.extend([block_id] * 2)\n",
    ),
    Bug(
        "a freed block is lost",
        POOL,
        "                self._blank.append(block_id)\n",
        "                pass\n",
    ),
    Bug(
        "a freed table is kept",
        TABLES,
        "_tables.pop(request.request_id, None)",
        "_tables.get(request.request_id)",
        answers=False,
    ),
    Bug(
        "the last part of a block has none",
        TABLES,
        "return -(-num_tokens // self.block_size)",
        "return num_tokens // self.block_size",
    ),
    Bug(
        "what never fits is let in",
        TABLES,
        "self.num_blocks_for(num_tokens) <= self.pool.num_usable",
        "True",
    ),
    Bug("what just fits is refused", TABLES, "<= self.pool.num_usable", "< self.pool.num_usable"),
    Bug("a table grows over its first blocks", TABLES, "enumerate(ids, first)", "enumerate(ids)"),
    Bug("blocks are not freed", SCHEDULER, FREE_BLOCKS, ""),
    Bug("freed blocks are parked for a while", SCHEDULER, FREE_BLOCKS, PARKED, answers=False),
    Bug(
        "blocks are freed before the last step",
        SCHEDULER,
        "self.kv_cache.allocate_slots(request, num_",
        "self.kv_cache.free(request) or self.kv_cache.allocate_slots(request, num_",
    ),
    # Rows
    Bug("a row that is left is not told", SCHEDULER, LEFT, ""),
    Bug("a row is told twice", SCHEDULER, LEFT, LEFT + LEFT),
    Bug(
        "rows left before a reset are told after it",
        SCHEDULER,
        "        self.in_flight.clear()\n        self._left_rows.clear()\n",
        "        self.in_flight.clear()\n",
    ),
    Bug("a row is lost", ROWS, "        heappush(self._free, row)\n", ""),
    Bug(
        "the last tenant's position stays",
        ROWS,
        COLUMNS,
        COLUMNS.replace("self.num_computed, ", ""),
        answers=False,
    ),
    Bug(
        "the last tenant's capacity stays",
        ROWS,
        COLUMNS,
        COLUMNS.replace(", self.capacity", ""),
        answers=False,
    ),
    Bug("a tenancy is used again", ROWS, "        self._num_tenancies += 1\n", ""),
    Bug(
        "a block is asked for one token late",
        ROWS,
        ">= self.capacity[decoding]",
        "> self.capacity[decoding]",
    ),
    Bug(
        "a row runs past its end",
        ROWS,
        "prefilled & (self.num_computed < self.final_len - 1)",
        "prefilled & (self.num_computed < self.final_len)",
    ),
    Bug(
        "only the prompt is prefilled on resuming",
        ROWS,
        "self.prefill_len[row] = request.num_tokens",
        "self.prefill_len[row] = request.num_prompt_tokens",
    ),
    Bug(
        "a resumed row starts one token on",
        ROWS,
        "self.num_computed[row] = num_computed\n",
        "self.num_computed[row] = num_computed + (request.num_preemptions > 0)\n",
    ),
    Bug(
        "capacity counts new blocks only",
        SCHEDULER,
        "self.rows.capacity[row] += len",
        "self.rows.capacity[row] = len",
        answers=False,
    ),
    # Decisions
    Bug(
        "the budget is overrun by an admission",
        SHARES,
        "            chunk = min(num_tokens, self.left)\n        else",
        "            chunk = num_tokens\n        else",
    ),
    Bug(
        "the budget is spent twice",
        SHARES,
        "        self.left -= chunk\n        return chunk\n\n    def",
        "        return chunk\n\n    def",
        answers=False,
    ),
    Bug(
        "a program too small for the step",
        BUCKETS,
        "bucket.num_tokens >= num_tokens",
        "bucket.num_tokens >= num_tokens - 1",
    ),
    Bug(
        "nobody is admitted once one was preempted",
        SCHEDULER,
        "preemptions == self.num_preemptions",
        "self.num_preemptions == 0",
    ),
    Bug(
        "admitted requests go on waiting",
        SCHEDULER,
        "        self.waiting.remove(request.request_id)\n        row =",
        "        row =",
    ),
    Bug(
        "a preempted request is lost",
        SCHEDULER,
        "        self.num_preemptions += 1\n        self.waiting.prepend(request)\n",
        "        self.num_preemptions += 1\n",
    ),
    Bug("a preempted request waits behind all others", QUEUE, TO_FRONT, "self.add(request)"),
    Bug(
        "the oldest is preempted",
        ROWS,
        "np.flatnonzero(due))[::-1]",
        "np.flatnonzero(due))",
    ),
    Bug(
        "an id in use is taken again",
        SCHEDULER,
        "if core_request.request_id in self.requests:",
        "if not core_request.request_id:",
    ),
    Bug(
        "an ended request is remembered",
        SCHEDULER,
        "        del self.requests[request.request_id]\n",
        "        self.requests.pop(request.request_id) if request.row else None\n",
        answers=False,
    ),
    Bug(
        "a token is sampled one step early",
        SCHEDULER,
        "(ends >= table.prefill_len[rows])",
        "(ends >= table.prefill_len[rows] - 1)",
    ),
    # Results
    Bug(
        "a result counts for the row's next tenant",
        SCHEDULER,
        LIVE,
        "self.rows.tenancy[step.rows] >= 0",
    ),
    Bug("a result counts though its request has left", SCHEDULER, LIVE, "step.rows >= 0"),
    Bug(
        "output is forgotten on resuming",
        REQUEST,
        KNOWN_TOKENS,
        "self.core_request.prompt_token_ids",
    ),
    Bug("a token of NaN is taken", COMMIT, "good = live & output.finite", "good = live"),
    Bug(
        "a row of NaN goes on",
        COMMIT,
        "events += scheduler.fail(table.request_id[row], NOT_FINITE)",
        "events += []",
    ),
    Bug(
        "a row of NaN fails its neighbour",
        COMMIT,
        "scheduler.fail(table.request_id[row], NOT_FINITE)",
        "scheduler.fail(table.request_id[rows[0]], NOT_FINITE)",
    ),
    Bug(
        "tokens are taken from chunks that do not sample",
        COMMIT,
        "plain = good & drawn & ~eventful",
        "plain = good & ~eventful",
    ),
    Bug(
        "log-probabilities of another row",
        COMMIT,
        "token_logprobs(arrays, entry, tokens",
        "token_logprobs(arrays, entry - 1, tokens",
    ),
    Bug(
        "prompt log-probabilities one token off",
        COMMIT,
        "arrays, offset, start, num_tokens)",
        "arrays, max(offset - 1, 0), start, num_tokens)",
    ),
    Bug(
        "prompt log-probabilities are told again",
        LOGPROBS,
        "first = max(start, request.num_prompt_logprobs)",
        "first = start",
    ),
    Bug("min_tokens is ignored", STOP, "output and len(output) >= params.min_tokens", "output"),
    Bug(
        "stop tokens are looked for at the end only",
        REQUEST,
        "return token_id in self.stop_ids or ",
        "return ",
    ),
    Bug(
        "one token too many",
        STOP,
        "len(output) >= request.max_output_tokens",
        "len(output) > request.max_output_tokens",
    ),
    # The loop, and recovery
    Bug("an aborted request has no end", LOOP, "        outputs.events[:0] = self._events\n", ""),
    Bug(
        "an end is told twice", LOOP, "        self._events = []\n        return", "        return"
    ),
    Bug(
        "a failed step stays in flight",
        LOOP,
        "        self._in_flight = None\n        self.executor",
        "        self.executor",
        scenario="faults",
    ),
    Bug("the executor is not reset", LOOP, "        self.executor.reset()\n", ""),
    Bug("steps in flight outlive a reset", SCHEDULER, "        self.in_flight.clear()\n", ""),
    Bug(
        "one passing fault is blamed on a request",
        RECOVERY,
        "MAX_FAILURES_ALONE = 2",
        "MAX_FAILURES_ALONE = 1",
        scenario="faults",
    ),
    Bug(
        "isolation has no end",
        RECOVERY,
        ISOLATE,
        "self._scheduler.isolate(self._suspects[-1].request_id) if self._suspects else None",
    ),
    Bug(
        "an aborted suspect is waited for",
        LOOP,
        FORGET + "        self.recovery.advance()\n",
        FORGET,
        scenario="faults",
    ),
)
