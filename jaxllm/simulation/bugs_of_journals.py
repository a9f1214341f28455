"""What a journal forgets, so that a replay would decide otherwise or go on with other tokens."""

from jaxllm.simulation.bug import JOURNAL, Bug

WRITER, RECORDS, REPLAY = f"{JOURNAL}.core", f"{JOURNAL}.records", f"{JOURNAL}.replay"

BUGS_OF_JOURNALS = (
    Bug("aborts are not recorded", WRITER, "self._journal.write(Aborted(self._now(), names))", ""),
    Bug(
        "the policy is not recorded",
        WRITER,
        "scheduling or SchedulingConfig()",
        "SchedulingConfig()",
    ),
    Bug(
        "limits are not recorded",
        WRITER,
        "self.scheduler.plan, self._now(), self._last_limit",
        "self.scheduler.plan, self._now(), None",
    ),
    Bug(
        "failures are not recorded",
        WRITER,
        "self._journal.write(Failed(self._now(), where, text[:MAX_ERROR_CHARS]))",
        "",
    ),
    Bug(
        "rows that were not finite are not recorded",
        RECORDS,
        'b"" if output.finite.all() else output.finite.tobytes()',
        'b""',
    ),
    Bug("moves are not recorded", RECORDS, "block_saves=step.block_saves", "block_saves=()"),
    Bug(
        "tokens are recorded in another order",
        RECORDS,
        "int32_bytes(output.token_ids)",
        "int32_bytes(output.token_ids[::-1])",
    ),
)
